"""CapFilt without models: captions that only their numbers decide, scores that only the texts do; and real processes.

    python capfilt_helpers.py kills <seed> <kills> <arguments of lavis-lite capfilt>
    python capfilt_helpers.py limited <bytes> <arguments of lavis-lite capfilt>

The first has three processes work, kills one at a random moment and starts another, again and again, and prints what
became of them as JSON. In the second no file may grow beyond so many bytes.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image
from torch import Tensor

from lavis_lite import cli
from lavis_lite.capfilt import run, worker
from lavis_lite.commands.capfilt import capfilt_main

WORDS = ("red", "blue", "dog", "cat", "house", "tree", "sky", "boat")
MODELS = ("--captioner", "fake/words", "--ranker", "fake/crc")


class FakeCaptioner:
    """The first draws of each text as words, after the picture's colour."""

    def __init__(self, num_captions: int, seconds: float = 0.0) -> None:
        self.num_captions = num_captions
        self.seconds = seconds
        self.batches: list[int] = []

    def captions(self, images: Sequence[Image.Image], draws: Tensor) -> list[list[str]]:
        time.sleep(self.seconds)
        self.batches.append(len(images))
        texts = [" ".join(WORDS[int(d * len(WORDS))] for d in row[:4]) for row in draws.tolist()]
        k = self.num_captions
        return [
            [f"{image.size[0]} {text}" for text in texts[i * k : (i + 1) * k]]
            for i, image in enumerate(images)
        ]


class FakeRanker:
    """A checksum of the text as its score."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[score_of(text) for text in own] for own in texts]


def score_of(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32


@contextmanager
def fake_models(seconds: float = 0.0) -> Iterator[list[FakeCaptioner]]:
    """`run_capfilt` with these instead of models, and without rest for failed shards; the captioners built."""
    built: list[FakeCaptioner] = []

    def captioner(settings: Any, *_: Any) -> FakeCaptioner:
        built.append(FakeCaptioner(settings.num_captions, seconds))
        return built[-1]

    with (
        mock.patch.object(run, "build_captioner", captioner),
        mock.patch.object(run, "build_ranker", lambda *_: FakeRanker()),
        mock.patch.object(worker, "RETRY_SECONDS", 0.0),
    ):
        yield built


def capfilt(*arguments: str, seconds: float = 0.0) -> list[int]:
    """Run the command with fake models; the sizes of the batches that were captioned."""
    with fake_models(seconds) as built:
        cli.main(["capfilt", *arguments])
    return built[0].batches if built else []


def jpeg_bytes(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture whose colour and width tell its number."""
    buffer = io.BytesIO()
    colour = ((number * 37) % 256, (number * 11) % 256, 90)
    Image.new("RGB", (size[0] + number % 7, size[1]), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar in webdataset's layout: (key, {extension: content})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def web_shards(folder: Path, shards: int, pictures: int) -> str:
    """Shards with a caption each, one picture of the first broken; their pattern."""
    for shard in range(shards):
        samples = []
        for number in range(pictures):
            picture = b"broken" if (shard, number) == (0, 1) else jpeg_bytes(shard * pictures + number)
            about = json.dumps({"caption": f"web text {shard} {number}", "url": "http://x"}).encode()
            samples.append((f"{shard:03d}{number:04d}", {"jpg": picture, "json": about}))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def read_shard(path: Path) -> dict[str, dict[str, Any]]:
    """{key: {"jpg": bytes, **the json member}} of an output shard."""
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            found.setdefault(key, {}).update(json.loads(content) if extension == "json" else {"jpg": content})
    return found


def _child(argv: Sequence[str], seconds: float) -> int:
    """A process that runs the command; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with fake_models(seconds):
            capfilt_main(argv)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill_workers(seed: int, kills: int, argv: Sequence[str]) -> dict[str, Any]:
    """Three processes, of which `kills` are killed at random moments and replaced; then all may end."""
    rng = random.Random(seed)
    workers = [_child(argv, 0.02) for _ in range(3)]
    killed = 0
    while killed < kills:
        time.sleep(rng.uniform(0.01, 0.2))
        victim = rng.choice(workers)
        workers.remove(victim)
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        killed += 1
        early = os.WIFEXITED(status)
        if early:  # it was done before it was killed: so is everything
            break
        workers.append(_child(argv, 0.02))
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    return {"killed": killed, "codes": codes}


def main() -> None:
    mode, first, *rest = sys.argv[1:]
    if mode == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(first), int(first)))
        with fake_models():
            capfilt_main(rest)
        return
    sys.stdout = sys.stderr
    result = kill_workers(int(first), int(rest[0]), rest[1:])
    print(json.dumps(result), file=sys.__stdout__)


if __name__ == "__main__":
    main()
