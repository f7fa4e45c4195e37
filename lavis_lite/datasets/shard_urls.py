"""What a user writes for a set of shards, as the list of them: braces, stars, addresses, commands."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def is_local(url: str) -> bool:
    """Whether one shard is a file of this machine, and not an address or a command."""
    return "://" not in url and not url.startswith("pipe:")


def is_local_tar(url: str) -> bool:
    """Whether one shard can be read at random: an uncompressed local tar."""
    return is_local(url) and url.endswith(".tar")


def expand(pattern: str, folder: Path = Path()) -> list[str]:
    """The shards that a pattern stands for, in its order; local ones below `folder` unless their paths are absolute.

    "a/{00..02}.tar" -> a/00.tar, a/01.tar, a/02.tar; several patterns are joined by "::". In local paths "~",
    $VARIABLES, and *, ? and [ are expanded too; a path that none of the latter fits stays as it is, like one without
    them that isn't there.
    """
    return [shard for part in parts(pattern) for shard in _expand_part(part, folder)]


def parts(pattern: str) -> list[str]:
    """The patterns that "::" joins."""
    return pattern.split("::")


def _expand_part(part: str, folder: Path) -> list[str]:
    if is_local(part) and _is_file(folder / part):  # whatever signs are in its name
        return [str(folder / part)]
    return [
        path for name in _braces(part) for path in (_expand_stars(folder, name) if is_local(name) else [name])
    ]


def names(pattern: str) -> list[str]:
    """What a pattern names, with all but *, ? and [ expanded; looks at no file."""
    return [name for one in parts(pattern) for name in _braces(one)]


def _braces(pattern: str) -> list[str]:
    import webdataset as wds

    pattern = os.path.expanduser(os.path.expandvars(pattern)) if is_local(pattern) else pattern
    expanded: list[str] = wds.SimpleShardList(pattern).urls
    return expanded


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than a name may be
        return False


def _expand_stars(folder: Path, name: str) -> list[str]:
    path = folder / name
    if _is_file(path) or not any(sign in name for sign in "*?["):
        return [str(path)]
    found = glob.glob(os.path.join(glob.escape(str(folder)), name))
    return sorted(str(Path(one)) for one in found) or [str(path)]
