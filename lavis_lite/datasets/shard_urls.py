"""What a user writes for a set of shards, as the list of them: braces, stars, addresses, commands."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def is_local(pattern: str) -> bool:
    """Whether shards are files of this machine, and not addresses or commands."""
    return "://" not in pattern and not pattern.startswith("pipe:")


def is_local_tar(pattern: str) -> bool:
    """Whether shards can be read at random: uncompressed local tars."""
    return is_local(pattern) and pattern.endswith(".tar")


def expand(pattern: str, folder: Path = Path()) -> list[str]:
    """The shards that a pattern stands for, in its order; local ones below `folder` unless their paths are absolute.

    "a/{00..02}.tar" -> a/00.tar, a/01.tar, a/02.tar; several patterns are joined by "::". In local paths "~",
    $VARIABLES, and *, ? and [ are expanded too; a path that none of the latter fits stays as it is, like one without
    them that isn't there.
    """
    if is_local(pattern) and (folder / pattern).is_file():  # whatever signs are in its name
        return [str(folder / pattern)]
    return [path for one in pattern.split("::") for path in _expand_one(one, folder)]


def _expand_one(pattern: str, folder: Path) -> list[str]:
    import webdataset as wds

    local = is_local(pattern)
    pattern = os.path.expanduser(os.path.expandvars(pattern)) if local else pattern
    names: list[str] = wds.SimpleShardList(pattern).urls
    return [path for name in names for path in _expand_stars(folder, name)] if local else names


def _expand_stars(folder: Path, name: str) -> list[str]:
    path = folder / name
    if path.is_file() or not any(sign in name for sign in "*?["):
        return [str(path)]
    found = glob.glob(os.path.join(glob.escape(str(folder)), name))
    return sorted(str(Path(one)) for one in found) or [str(path)]
