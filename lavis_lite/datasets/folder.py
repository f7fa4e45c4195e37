"""A folder of pictures or clips, each with its captions in a .txt file of the same name beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.images import SUFFIXES
from lavis_lite.datasets.readers import Row, bad_text


class Kind(NamedTuple):
    """Files that rows show. name: of several. one: of one. suffixes: theirs, in lower case, the usual one first."""

    name: str
    one: str
    suffixes: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether a file with that name is one."""
        return os.path.splitext(name)[1].lower() in self.suffixes


PICTURES = Kind("pictures", "picture", SUFFIXES)


def read_rows(root: Path, *, where: str, uncaptioned: bool = False, kind: Kind = PICTURES) -> Iterator[Row]:
    """Rows in the order of their paths, subfolders included; each non-empty line of a .txt file is a caption.

    A picture (or clip, by `kind`) without a usable .txt file becomes a row with a problem, met like an unreadable
    picture; with `uncaptioned` one without any .txt file is a row without captions. where: as of `Source`.

    Raises DataError when there are none, or (unless uncaptioned) no .txt file beside any of them.
    """
    pictures = captioned = 0
    for relative, names in _walk(root):
        texts = {name for name in names if name.endswith(".txt")}
        for name in sorted(names - texts):
            if not kind.has(name):
                continue
            pictures += 1
            text = os.path.splitext(name)[0] + ".txt"
            captioned += text in texts
            picture = os.path.join(relative, name)
            if uncaptioned and text not in texts and not bad_text(picture):
                yield Row(picture)
            else:
                yield _row(root, picture, os.path.join(relative, text), text in texts)
    if not (pictures if uncaptioned else captioned):
        found = (
            f"{pictures} {kind.name} and none with a .txt file beside it" if pictures else f"no {kind.name}"
        )
        remedy = (
            f"give {where} another folder"
            if where.startswith("--")
            else f"set {where}.annotations to a file with the captions, or {where}.images to another folder"
        )
        raise DataError(f"{root}: {found}; {remedy}")


def fingerprint(root: Path, kind: Kind = PICTURES) -> str:
    """Changes when one of the kind or a .txt file comes or goes or a .txt file is edited, and with no other file."""
    digest = hashlib.sha256()
    for relative, names in _walk(root):
        for name in sorted(name for name in names if kind.has(name) or name.endswith(".txt")):
            path = os.path.join(relative, name)
            digest.update(os.fsencode(path) + b"\0")
            if name.endswith(".txt"):
                with contextlib.suppress(OSError):  # a link to nowhere: reading it says so
                    status = os.stat(os.path.join(root, path))
                    digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _walk(root: Path) -> Iterator[tuple[str, set[str]]]:
    """(folder relative to `root`, names of its files), in the order of folders; hidden ones left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        yield "" if relative == "." else relative, {name for name in names if not name.startswith(".")}


def _row(root: Path, picture: str, text: str, exists: bool) -> Row:
    if bad_text(picture):
        return Row(picture.encode("utf-8", "replace").decode(), problem="its file name is not valid UTF-8")
    if not exists:
        return Row(picture, problem=f"no caption file {root / text} beside it")
    try:
        lines = (root / text).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return Row(picture, problem=f"its caption file {root / text} is not valid UTF-8 (byte {error.start})")
    except OSError as error:
        return Row(picture, problem=f"its caption file {root / text} can't be read: {error.strerror}")
    captions = [line.strip() for line in lines if line.strip()]
    return Row(picture, captions, problem=None if captions else f"its caption file {root / text} is empty")
