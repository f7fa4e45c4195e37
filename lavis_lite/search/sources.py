"""Where pictures come from: folders, and tar shards whose members are read at random.

A picture's name is its path, or for a member of a tar file "00000.tar::000000012.jpg@1536+40213": where its bytes
begin and how many there are, so that one picture is read without those before it.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from lavis_lite.common.errors import DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import SUFFIXES, decode_image, read_image

logger = get_logger(__name__)

_MEMBER = re.compile(r"(?s)^(.+\.tar)::(.+)@(\d+)\+(\d+)$")


def list_pictures(source: str | os.PathLike[str]) -> Iterator[str]:
    """The names of all pictures of a folder (with those below it), a tar file, or a pattern of tar files.

    Args:
        source: "photos", "shards/00000.tar", "shards/{00000..00031}.tar" or "shards/*.tar".

    Names are absolute, in the order of folders and shards. Of a shard that breaks off the pictures before that
    are given, and a warning says where. Raises DataError when there is nothing.
    """
    where = os.path.abspath(os.path.expanduser(os.fspath(source)))
    if os.path.isdir(where):
        names = _of_folder(where)
    else:
        shards = _expand(where)
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
        raise DataError(f"--images '{source}': there are no pictures ({', '.join(sorted(SUFFIXES))})")


def open_picture(name: str) -> Image.Image:
    """The picture of a name in RGB; raises UnreadableSample when it is missing, broken or no picture."""
    member = _MEMBER.match(name)
    if member is None:
        return read_image(name)
    try:
        with open(member[1], "rb") as file:
            file.seek(int(member[3]))
            content = file.read(int(member[4]))
    except OSError as error:
        raise UnreadableSample(name, error.strerror or "can't be read") from error
    if len(content) < int(member[4]):
        raise UnreadableSample(name, "the shard ends before its member does")
    return decode_image(io.BytesIO(content), name)


def short_name(name: str) -> str:
    """A name as people read it, without the place within the shard."""
    member = _MEMBER.match(name)
    return name if member is None else f"{member[1]}::{member[2]}"


def _of_folder(root: str) -> Iterator[str]:
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield os.path.join(folder, name)


def _of_tar(shard: str) -> Iterator[str]:
    last = "its beginning"
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.isreg() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield f"{shard}::{member.name}@{member.offset_data}+{member.size}"
                last = f"member {member.name}"
                archive.members = []  # type: ignore[attr-defined]  # else they pile up
    except (tarfile.TarError, OSError) as error:
        logger.warning("%s is broken after %s (%s); the pictures before that are used", shard, last, error)


def _expand(pattern: str) -> list[str]:
    """The files of a brace or glob pattern, in order."""
    if "{" in pattern and not os.path.exists(pattern):
        from webdataset.shardlists import expand_urls

        return list(expand_urls(pattern))
    return (
        sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
    )
