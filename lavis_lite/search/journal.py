"""What an unfinished build has encoded so far, so that a killed one goes on where it was.

Vectors of a batch are appended to vectors.bin, then a line with the images' names to batches.jsonl: a batch whose line
is whole is done and never encoded again; what a killed process left behind the last whole line is cut off.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_lite.common.errors import DataError
from lavis_lite.search.manifest import BUILDING, NAMES, PARTS, VECTORS, FileSum, PartEntry, fresh_name

HEADER, BATCHES = "header.json", "batches.jsonl"


class Journal:
    """The folder `building` of an index, opened to go on with it.

    Args:
        root: of the index.
        header: what all of it was encoded with.
        shape: (Q, E) of an image's vectors. dtype: of their numbers, as they are stored.

    names: of the images whose vectors are there, in their order. unreadable: {name: reason}.

    Raises DataError when the folder was begun with another header.
    """

    def __init__(
        self, root: Path, header: Mapping[str, Any], *, shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        self.root, self.folder = root, root / BUILDING
        self._shape, self._dtype = shape, dtype
        self.names: list[str] = []
        self.unreadable: dict[str, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_header(header)
        self._vectors = open(self.folder / VECTORS, "ab+")  # noqa: SIM115  # closed by __exit__
        self._batches = open(self.folder / BATCHES, "ab+")  # noqa: SIM115
        self._recover()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vectors.close()
        self._batches.close()

    def append(
        self, names: Sequence[str], vectors: np.ndarray[Any, Any], unreadable: Mapping[str, str]
    ) -> None:
        """Keep a batch: vectors [n, Q, E] of the images `names`, and the reasons of those that can't be read."""
        content = np.ascontiguousarray(vectors, dtype=self._dtype).tobytes()
        self._vectors.write(content)
        self._vectors.flush()
        line = {"names": list(names), "unreadable": dict(unreadable), "crc": zlib.crc32(content)}
        self._batches.write(json.dumps(line).encode() + b"\n")
        self._batches.flush()
        self.names += names
        self.unreadable.update(unreadable)

    def finish(self) -> PartEntry:
        """Make a part of the index of it; it belongs to the index once a manifest names it."""
        self.__exit__(None, None, None)
        return write_part(self.root, self.names, lambda target: _same_file(self.folder / VECTORS, target))

    def remove(self) -> None:
        """Forget it, once its images are in the index."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def parts_of(root: Path) -> list[str] | None:
        """The parts that the index had when its unfinished build was begun; None without one."""
        try:
            parts: list[str] = json.loads((root / BUILDING / HEADER).read_text())["parts"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return parts

    def _check_header(self, header: Mapping[str, Any]) -> None:
        path = self.folder / HEADER
        if not (self.folder / BATCHES).exists() or not path.exists():
            path.write_text(json.dumps(header) + "\n")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        differing = [key for key in header if found.get(key) != header[key]]
        if differing:
            raise DataError(
                f"'{self.folder}' was begun with {', '.join(f'{key} {found.get(key)}' for key in differing)}, not "
                f"{', '.join(str(header[key]) for key in differing)}; go on with that, or remove the folder"
            )

    def _recover(self) -> None:
        """Read the whole batches, and cut off what is behind the last of them."""
        vector_bytes = batch_bytes = 0
        self._vectors.seek(0)
        self._batches.seek(0)
        for line in self._batches:
            batch = _whole(line)
            if batch is None:
                break
            size = len(batch["names"]) * self._shape[0] * self._shape[1] * self._dtype.itemsize
            content = self._vectors.read(size)
            if (
                zlib.crc32(content) != batch["crc"]
            ):  # after a power cut a line may be there without its vectors
                break
            vector_bytes, batch_bytes = vector_bytes + size, batch_bytes + len(line)
            self.names += batch["names"]
            self.unreadable.update(batch["unreadable"])
        self._vectors.truncate(vector_bytes)
        self._batches.truncate(batch_bytes)


def _same_file(source: Path, target: Path) -> None:
    """Another name for a file; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _whole(line: bytes) -> dict[str, Any] | None:
    """A line's batch; None when the line was cut."""
    if not line.endswith(b"\n"):
        return None
    try:
        batch = json.loads(line)
    except ValueError:
        return None
    return batch if isinstance(batch, dict) else None


def write_part(root: Path, names: Sequence[str], write_vectors: Callable[[Path], object]) -> PartEntry:
    """Write a part of the index at `root`, its vectors by `write_vectors(file)`; for a manifest to name it."""
    name = fresh_name()
    part = root / PARTS / name
    part.mkdir(parents=True)
    write_names(part / NAMES, names)
    write_vectors(part / VECTORS)
    for path in (part / NAMES, part / VECTORS):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files = tuple(FileSum.of(root, f"{PARTS}/{name}/{file}") for file in (VECTORS, NAMES))
    return PartEntry(name, len(names), files)


def write_names(path: Path, names: Sequence[str]) -> None:
    """Names as an Arrow file, which readers map into memory instead of reading it."""
    table = pa.table({"name": pa.array([os.fsencode(name) for name in names], pa.large_binary())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1 << 16)


def read_names(path: Path) -> pa.ChunkedArray:
    """The column that `write_names` wrote, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("name")


def each_name(column: pa.ChunkedArray) -> Iterator[str]:
    """The names of a column, one after the other."""
    for chunk in column.chunks:
        for name in chunk:
            yield os.fsdecode(name.as_py())
