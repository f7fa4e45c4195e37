"""Streams of shards that break: always at the same sample, and never taken for whole."""

from __future__ import annotations

import http.server
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shard_helpers import write_shards

from lavis_lite.datasets import tar_streams
from lavis_lite.datasets.shard_check import check_streams
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.tar_members import samples_of
from lavis_lite.datasets.tar_streams import BrokenStream, stream_samples

SAMPLES, KEPT = 60, 50
REPEATS = 5


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shards(tmp_path, 1, SAMPLES)
    return tmp_path / "00000.tar"


def cut_places(shard: Path) -> dict[str, int]:
    """Bytes of a shard up to a place after sample 49: in a picture, at and within a header, at the tar's very end."""
    samples = list(samples_of(shard))
    picture = samples[KEPT].members["jpg"].offset
    last = samples[-1].members["json"]
    end = last.offset + -(-last.size // 512) * 512
    return {"content": picture + 100, "header": picture - 512, "in_header": picture - 300, "end": end}


# Where a cut shows that the sample before it lacks nothing, that one is there too.
COUNTS = {"content": KEPT, "header": KEPT - 1, "in_header": KEPT - 1, "end": SAMPLES - 1}


class _Server(http.server.ThreadingHTTPServer):
    """Gives `content` up to `cut` and ends the connection; told: whether the length it gives is the whole one."""

    content = b""
    cut = 0
    told = True


class _Cutting(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send_response(200)
        if self.server.told:
            self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(shard: Path) -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Cutting) as server:
        server.content = shard.read_bytes()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(url: str) -> tuple[int, str]:
    """How many samples come, and why no more; "" for a whole shard."""
    found = 0
    try:
        for found, _ in enumerate(stream_samples(url), 1):  # noqa: B007
            pass
    except BrokenStream as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("place", list(COUNTS))
def test_a_connection_that_breaks_gives_all_before_the_break(
    shard: Path, server: _Server, place: str
) -> None:
    server.cut = cut_places(shard)[place]
    url = f"http://127.0.0.1:{server.server_port}/"
    told = {read(url) for _ in range(REPEATS)}
    assert {count for count, _ in told} == {COUNTS[place]}
    assert all("exit code 18: curl: (18)" in reason for _, reason in told)
    # Without a length curl takes the break for the end, so that the tar alone tells.
    server.told = False
    ((count, reason),) = {read(url) for _ in range(REPEATS)}
    assert count == COUNTS[place] and ("broken after member" in reason or "cut off after member" in reason)


def test_an_address_may_have_brackets_and_braces(server: _Server) -> None:
    server.cut = len(server.content)
    assert read(f"http://127.0.0.1:{server.server_port}/web[a]/{{b}}/00000.tar?part=[1]") == (SAMPLES, "")


@pytest.mark.parametrize("place", list(COUNTS))
def test_a_command_that_is_cut_is_never_whole(shard: Path, place: str) -> None:
    url = f"pipe:head -c {cut_places(shard)[place]} {shard}"
    assert {read(url)[0] for _ in range(REPEATS)} == {COUNTS[place]}
    (report,) = check_streams([url], SampleForm())
    assert report.samples == COUNTS[place] and report.broken and not report.bad


def test_what_a_command_has_written_counts_whatever_its_exit_code(shard: Path) -> None:
    told = {read(f"pipe:cat {shard}; exit 3") for _ in range(REPEATS)}
    assert told == {(SAMPLES, "its command ended with exit code 3")}
    assert read(f"pipe:cat {shard}") == (SAMPLES, "")


def test_a_stream_that_stalls_or_is_left_ends_its_command(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_streams, "STALL_SECONDS", 0.5)
    mark = tmp_path / "pid"
    url = f"pipe:echo $$ > {mark}; head -c {cut_places(shard)['content']} {shard}; sleep 60; true"
    assert read(url) == (KEPT, "nothing came for 0.5 s")
    assert _over(int(mark.read_text()))
    mark.unlink()
    stream = stream_samples(url)
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()  # type: ignore[attr-defined]
    assert _over(int(mark.read_text()))


def _over(process: int) -> bool:
    for _ in range(50):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_an_address_that_nothing_opens_says_so() -> None:
    assert read("nope://host/a.tar")[1] == "nope://host/a.tar: no gopen handler defined"
