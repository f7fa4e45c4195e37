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


def expand_braces(pattern: str) -> list[str]:
    """ "a/{00..02}.tar" -> a/00.tar, a/01.tar, a/02.tar; "~" and $VARIABLES are expanded in paths."""
    import webdataset as wds

    pattern = os.path.expanduser(os.path.expandvars(pattern)) if is_local(pattern) else pattern
    urls: list[str] = wds.SimpleShardList(pattern).urls
    return urls


def find_local(folder: Path, name: str) -> list[str]:
    """The files that a name stands for, in alphabetical order; * and ? are expanded."""
    path = str(folder / name)
    if any(sign in name for sign in "*?["):
        return sorted(glob.glob(path))
    return [path] if os.path.isfile(path) else []
