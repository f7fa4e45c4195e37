"""Tars that are read from beginning to end: addresses, commands, compressed files. None that is cut passes as whole."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tarfile
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple

from lavis_lite.datasets.shard_urls import is_local
from lavis_lite.datasets.tar_members import BLOCK, key_and_extension

CHUNK = 1 << 16
# Without a byte from a command for so long it counts as broken. Only time in which somebody waits for it counts: curl's
# own limit would also end a transfer that waits until training takes more.
STALL_SECONDS = 120.0
# curl retries only before the first byte (later ones would come twice), and gives up before the limit above.
CURL = (
    # --globoff: brackets and braces in an address are its own; what stands for several shards is expanded before.
    *("curl", "--fail", "--silent", "--show-error", "--location", "--globoff"),
    *("--connect-timeout", "30", "--retry", "30", "--retry-delay", "2", "--retry-max-time", "60"),
)
CURL_SCHEMES = ("http://", "https://", "ftps://", "sftp://", "scp://")


class BrokenStream(Exception):
    """A stream that ends before its tar does, that is none, or whose command failed. Its text is the reason."""


def why(error: BrokenStream | OSError) -> str:
    """The reason for which a stream ended, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class StreamSample(NamedTuple):
    """The members of one key: {extension in lower case: bytes}, in their order."""

    key: str
    members: dict[str, bytes]


def stream_samples(url: str) -> Iterator[StreamSample]:
    """The samples of a shard in their order: the same ones, however its bytes come in.

    A shard is whole when its tar has an end-of-archive block and its command, if any, ended with 0. Of one that isn't,
    the sample right before the break is left out, since it may lack members.

    Raises BrokenStream after the samples before the break; OSError for a local file that can't be read.
    """
    with _opened(url) as source:
        reason = yield from _samples(source)
        failure = source.failure(whole=reason is None)
    if failure or reason:
        raise BrokenStream(failure or reason)


def _samples(source: _Source) -> Generator[StreamSample, None, str | None]:
    """The samples of an open stream; returns why its tar breaks off, None at its proper end."""
    place, current = "", None
    blocks: list[bytes] = []
    header = _keeping_the_last(blocks)
    try:
        with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK, tarinfo=header) as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                place = f"member {member.name}"
                archive.members = []  # else they pile up
                named = key_and_extension(member)
                if named is None:
                    continue
                key, extension = named
                if current is None or current.key != key or extension in current.members:
                    yield from [current] if current else []
                    current = StreamSample(key, {})
                current.members[extension] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"broken after {place}: {reason}" if place else reason
    # tarfile takes the end of a stream, and a broken header, for the end of the archive.
    if blocks != [bytes(BLOCK)]:
        return f"it is broken or cut off after {place}"
    yield from [current] if current else []
    return None


def _keeping_the_last(blocks: list[bytes]) -> type[tarfile.TarInfo]:
    """A class of headers that leaves the block of the one read last in the list."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
            blocks[:] = [bytes(buf)]
            return super().frombuf(buf, encoding, errors)

    return Header


@contextlib.contextmanager
def _opened(url: str) -> Iterator[_Source]:
    source = _File(open(url, "rb")) if is_local(url) else _remote(url)  # noqa: SIM115  # closed below
    try:
        yield source
    finally:
        source.close()


class _File:
    """A local file as a stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.close = file.close

    def failure(self, *, whole: bool) -> str | None:
        """See `_Output`."""
        return None


class _Output:
    """What a command writes. read: raises BrokenStream when nothing comes for too long.

    owner: what closes the command's output when nobody keeps it.
    """

    def __init__(self, process: subprocess.Popen[bytes], owner: object = None) -> None:
        self._process = process
        self._owner = owner
        assert process.stdout is not None
        self._descriptor = process.stdout.fileno()
        self._poll = select.poll() if hasattr(select, "poll") else None  # Windows has none, and so no limit
        if self._poll is not None:
            self._poll.register(self._descriptor, select.POLLIN | select.POLLHUP)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        if self._poll is not None and not self._poll.poll(STALL_SECONDS * 1000):
            raise BrokenStream(f"nothing came for {STALL_SECONDS:g} s")
        return os.read(self._descriptor, size)

    def failure(self, *, whole: bool) -> str | None:
        """What is wrong with the command, known at its end; None when nothing is, or it isn't at its end.

        whole: read on to the end; a command whose output nobody takes would fail for that.
        """
        try:
            while (more := self.read(CHUNK)) and whole:
                pass
            if more:
                return None
            code = self._process.wait(STALL_SECONDS)
        except (BrokenStream, subprocess.TimeoutExpired):
            return f"its command doesn't end, and nothing came for {STALL_SECONDS:g} s"
        if code == 0:
            return None
        told = self._process.stderr.read().decode(errors="replace").strip() if self._process.stderr else ""
        return f"its command ended with exit code {code}" + (f": {told.splitlines()[-1]}" if told else "")

    def close(self) -> None:
        """End the command, if it hasn't ended, with all that it started."""
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            with contextlib.suppress(OSError):  # no session of its own, or over
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()


_Source = _File | _Output


def _remote(url: str) -> _Source:
    """The source that an address or a command is; BrokenStream where nothing can open it."""
    from webdataset.gopen import gopen, rewrite_url

    url = rewrite_url(url)
    try:
        if url.startswith("pipe:"):
            return _Output(_started(url.removeprefix("pipe:"), shell=True))
        if url.startswith(CURL_SCHEMES):
            return _Output(_started([*CURL, url], stderr=subprocess.PIPE))
        opened = gopen(url)
    except FileNotFoundError as error:
        raise BrokenStream(f"no program or file '{error.filename}'") from error
    except ValueError as error:  # an address of an unknown kind
        raise BrokenStream(str(error)) from error
    process = getattr(opened, "proc", None)
    return _File(opened) if process is None else _Output(process, opened)


def _started(command: str | list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A command that writes a shard to its standard output, in a session of its own, so that all of it can be ended."""
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, bufsize=0, stdin=nothing, stdout=pipe, start_new_session=True, **options)
