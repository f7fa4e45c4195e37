"""Where pictures come from: folders, and tar shards whose members are read at random.

A picture's name is its path, or the address of a tar file's member (`tar_members.Address`): what `read_image` reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.errors import DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import SUFFIXES
from lavis_lite.datasets.shard_urls import expand
from lavis_lite.datasets.tar_members import Address, samples_of

logger = get_logger(__name__)


def list_pictures(source: str | os.PathLike[str]) -> Iterator[str]:
    """The names of all pictures of a folder (with those below it), a tar file, or a pattern of tar files.

    Args:
        source: "photos", "shards/00000.tar", "shards/{00000..00031}.tar" or "shards/*.tar".

    Names are absolute, in the order of folders and shards. Of a shard that breaks off the pictures before that
    are given, and a warning says where. Raises DataError when there is nothing.
    """
    pattern = os.fspath(source)
    where = os.path.abspath(os.path.expanduser(os.path.expandvars(pattern)))
    if os.path.isdir(where):
        names = _of_folder(where)
    else:
        shards = [os.path.abspath(shard) for shard in expand(pattern)]
        absent = [shard for shard in shards if not os.path.isfile(shard)]
        if absent or not shards:
            raise DataError(
                f"--images '{source}': no such folder or tar file"
                + (f" ({len(absent)} of {len(shards)} are missing, first '{absent[0]}')" if shards else "")
            )
        odd = next((shard for shard in shards if not shard.endswith(".tar")), None)
        if odd:
            raise DataError(f"--images: '{odd}' is neither a folder nor an uncompressed .tar file")
        names = (name for shard in shards for name in _of_tar(shard))
    empty = True
    for name in names:
        empty = False
        yield name
    if empty:
        raise DataError(f"--images '{source}': there are no pictures ({', '.join(SUFFIXES)})")


def short_name(name: str) -> str:
    """A name as people read it, without the place within the shard."""
    member = Address.parse(name)
    return name if member is None else f"{member.tar}::{member.name}"


def _of_folder(root: str) -> Iterator[str]:
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield os.path.join(folder, name)


def _of_tar(shard: str) -> Iterator[str]:
    try:
        for sample in samples_of(Path(shard)):
            for extension, member in sample.members.items():
                if f".{extension}".endswith(SUFFIXES):
                    yield str(member)
    except UnreadableSample as error:
        logger.warning("%s: %s; the pictures before that are used", error.path, error.reason)
