"""Tar shards as random access: where each member lies, and reading one without the others.

A shard is an uncompressed tar in webdataset's layout: members with the same key, the name up to the first dot
of its last part, follow each other and make one sample (`000.jpg`, `000.json`). An extension that comes again under its
key begins another one: else it would have one picture and the captions of another.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lavis_lite.datasets.base import UnreadableSample

BLOCK = 512
# A member's address: "00000.tar::000000012.jpg@1536+40213", where its bytes begin and how many there are.
_ADDRESS = re.compile(r"(?s)^(.+\.tar)::(.+)@(\d+)\+(\d+)$")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# webdataset's names for what belongs to no sample.
_META = re.compile(r"__[^/]*__($|/)")


class Address(NamedTuple):
    """One member of a tar file. offset, size: of its content, in bytes."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}::{self.name}@{self.offset}+{self.size}"

    @classmethod
    def parse(cls, path: str) -> Address | None:
        """The address that a path is; None for the path of a file of its own."""
        match = _ADDRESS.match(path)
        return cls(match[1], match[2], int(match[3]), int(match[4])) if match else None


@dataclass
class Sample:
    """The members of one key: {extension in lower case: address}, in the order of the file."""

    key: str
    members: dict[str, Address] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member's name; None for a name without an extension.

    webdataset's rule: the extension begins at the first dot of the last part, "a/b.seg.png" -> ("a/b", "seg.png").
    """
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def key_and_extension(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """`split_name` of a member; None for one that belongs to no sample."""
    return split_name(member.name) if member.isreg() and not _META.match(member.name) else None


def read_member(address: Address) -> bytes:
    """A member's bytes.

    Raises UnreadableSample when the file is missing, ends too early, or has something else at this place: it was
    changed after its members were looked up.
    """
    try:
        with open(address.tar, "rb") as file:
            file.seek(address.offset - BLOCK)
            header, content = file.read(BLOCK), file.read(address.size)
    except OSError as error:
        raise UnreadableSample(str(address), error.strerror or "can't be read") from error
    if len(content) < address.size:
        raise UnreadableSample(str(address), "the shard ends before its member does")
    # Right before a member's content is a header with its size, whatever longer headers stand before that one.
    if header[257:262] != b"ustar" or _octal(header[124:136]) != address.size:
        raise UnreadableSample(str(address), "the shard was changed after its members were looked up")
    return content


def samples_of(path: Path, start: int = 0) -> Iterator[Sample]:
    """The samples of a shard in their order, from its headers alone: contents are skipped, not read.

    start: the place of a member's header, to leave out what is before it.
    Raises UnreadableSample at the place where the file breaks off or isn't a tar, after all samples before it.
    """
    size, current = os.path.getsize(path), None
    for member in _members(path, start):
        named = key_and_extension(member)
        if named is None:
            continue
        if member.offset_data + member.size > size:
            yield from [current] if current else []
            raise UnreadableSample(str(path), f"it ends within member {member.name}")
        key, extension = named
        if current is None or current.key != key or extension in current.members:
            yield from [current] if current else []
            current = Sample(key)
        current.members[extension] = Address(str(path), member.name, member.offset_data, member.size)
    yield from [current] if current else []


def sample_of(address: Address, before: Address | None = None) -> Sample:
    """The sample that a member belongs to; UnreadableSample where it isn't in the shard.

    before: a member of an earlier sample, if one is known: a tar is read forwards only, and this saves the way from its
    beginning. One of another shard is none; nor is one of the same key, which may lie in the middle of a sample that
    would seem to go on into this one.
    """
    start = before.offset - BLOCK if before is not None and _is_of_earlier(before, address) else 0
    for sample in samples_of(Path(address.tar), start):
        if any(member.offset == address.offset for member in sample.members.values()):
            return sample
    raise UnreadableSample(str(address), "the shard was changed after its members were looked up")


def _is_of_earlier(before: Address, address: Address) -> bool:
    """Whether a member surely belongs to an earlier sample of the same shard."""
    first, second = split_name(before.name), split_name(address.name)
    other_key = first is None or second is None or first[0] != second[0]
    return other_key and before.tar == address.tar and before.offset < address.offset


def _members(path: Path, start: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar; UnreadableSample where they are broken or end without an end-of-archive block."""
    name = "its first member"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_at(file, start), mode="r:") as archive:
            while (member := archive.next()) is not None:
                name = f"member {member.name}"
                yield member
                archive.members = []  # type: ignore[attr-defined]  # else they pile up
            if not _ends_properly(path, archive.offset):
                raise UnreadableSample(str(path), f"it is broken or cut off after {name}")
    except (tarfile.TarError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSample(str(path), f"broken after {name}: {reason}") from error


def _at(file: BinaryIO, place: int) -> BinaryIO:
    file.seek(place)
    return file


def _ends_properly(path: Path, offset: int) -> bool:
    """Whether a tar has its block of zeros where its members end: `tarfile` takes the end of a cut file for one."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    return block == bytes(BLOCK)


def _octal(field_bytes: bytes) -> int:
    """A number of a tar header: octal text, or (from 8 GiB) binary behind a set top bit."""
    if field_bytes[0] & 0x80:
        return int.from_bytes(field_bytes[1:], "big")
    text = field_bytes.rstrip(b"\0 ").lstrip()
    try:
        return int(text or b"0", 8)
    except ValueError:
        return -1
