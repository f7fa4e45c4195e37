"""Which process does which piece of work: claims as files in a folder that all of them see.

A claim on NAME is the file NAME.claim.N; the one with the highest N holds. A new claim is a file that didn't exist
(O_EXCL, atomic on local and network file systems alike), so one of several takers gets it. A claim whose owner is gone
is taken over with N + 1, never by removing the old file: nobody can remove a newer claim by mistake. An owner is gone
when its process is (seen on the same machine, at once), or when it has not said that it lives for `stale_after`
seconds. An owner that was only slow finds the higher number and lets go.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Saying so more often than this costs a network file system more than it tells.
BEAT_SECONDS = 1.0
_NAME = re.compile(r"(?P<name>.+)\.claim\.(?P<number>\d+)")


@dataclass
class Claim:
    """A piece of work that this process has taken."""

    path: Path
    name: str
    number: int
    owner: str
    _beaten: float = 0.0

    def beat(self) -> None:
        """Say that the owner lives; at most every second, so that it can be said often."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)
            self._beaten = time.monotonic()

    def holds(self) -> bool:
        """Whether nobody has taken it over."""
        held = _numbers(self.path.parent, self.name)
        return bool(held) and max(held) == self.number and self._is_mine()

    def release(self) -> None:
        """Let go, done or not."""
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        # Numbers begin again when all claims on something are cleared.
        try:
            return bool(json.loads(self.path.read_text(encoding="utf-8")).get("id") == self.owner)
        except (FileNotFoundError, ValueError):
            return False


class Claims:
    """The claims in a folder.

    stale_after: seconds without a sign of life after which an owner counts as gone; more than the longest that
    an owner works between two `beat`s.
    """

    def __init__(self, folder: Path, *, stale_after: float) -> None:
        self.folder = folder
        self.stale_after = stale_after
        folder.mkdir(parents=True, exist_ok=True)
        own = {"pid": os.getpid(), "started": _started(os.getpid()), "id": uuid.uuid4().hex}
        self._me: dict[str, Any] = {**_machine(), **own}

    def take(self, name: str) -> Claim | None:
        """The claim on `name`; None while another process has it."""
        numbers = _numbers(self.folder, name)
        last = max(numbers, default=0)
        if numbers and not self._gone(self._path(name, last)):
            return None
        return self._create(name, last + 1)

    @property
    def owner(self) -> str:
        """A name for this process that no other has."""
        return f"{self._me['host']}-{self._me['pid']}-{self._me['id'][:8]}"

    def clear(self, names: Collection[str]) -> None:
        """Remove all claims on what is done."""
        for entry in os.listdir(self.folder):
            match = _NAME.fullmatch(entry)
            if match and match["name"] in names:
                (self.folder / entry).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.claim.{number}"

    def _create(self, name: str, number: int) -> Claim | None:
        path = self._path(name, number)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(self._me, file)
        except FileExistsError:
            return None
        return Claim(path, name, number, self._me["id"])

    def _gone(self, path: Path) -> bool:
        """Whether the owner of a claim is; a claim that was just released counts too."""
        try:
            age = self.now() - path.stat().st_mtime
            owner = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True
        except ValueError:  # killed, or looked at, between creating the file and writing to it
            owner = {}
        if age > self.stale_after:
            return True
        here = all(owner.get(key) == value for key, value in _machine().items())
        return here and _started(int(owner["pid"])) != owner["started"]

    def now(self) -> float:
        """The time by the clock that stamps the files, which on a network file system is not this machine's."""
        with tempfile.TemporaryFile(dir=self.folder) as probe:
            return os.fstat(probe.fileno()).st_mtime


def _numbers(folder: Path, name: str) -> list[int]:
    matches = (_NAME.fullmatch(entry) for entry in os.listdir(folder))
    return [int(match["number"]) for match in matches if match and match["name"] == name]


def _machine() -> dict[str, str]:
    """What tells whether a process number means the same process here: name, boot and (containers) namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        return {
            "host": socket.gethostname(),
            "boot": boot.read_text().strip(),
            "pids": os.readlink(namespace),
        }
    return {"host": socket.gethostname()}


def _started(pid: int) -> str | None:
    """When a process was started, so that a number given again isn't mistaken for it; None when there is none.

    Without /proc: that it runs.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except OSError as error:
            return None if isinstance(error, ProcessLookupError) else "runs"
        return "runs"
    # A zombie has ended, whoever has yet to ask how.
    return None if fields[0] in "ZX" else fields[19]
