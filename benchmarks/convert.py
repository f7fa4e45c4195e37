"""Memory and time of `lavis-lite convert` at full size: ViT-g with OPT-2.7B in fp16, 7.5 GB without meaning.

`python benchmarks/convert.py FOLDER` (Linux; needs three times 7.5 GB there for a while) writes a Hugging Face folder,
converts it to ours, back, and to LAVIS's .pth, each in a process of its own, and prints how far the process's memory
rose above what it was after its imports.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lavis_lite.common.tensor_reader import open_tensors
from lavis_lite.common.tensor_writer import write_tensors
from lavis_lite.models.convert.command import convert
from lavis_lite.models.convert.formats import InMemory
from lavis_lite.models.convert.hf_config import LANGUAGE_MODELS

OPT = {**LANGUAGE_MODELS["opt", 2560], "vocab_size": 50272}


class Constant(InMemory):
    """Tensors that come into being when they are asked for."""

    def __getitem__(self, name: str) -> Tensor:
        # The key's bias is zero, as in published models.
        return torch.full(self._tensors[name].shape, 0.0 if "qkv.bias" in name else 0.5, dtype=torch.float16)


def write_source(folder: Path) -> int:
    """A Hugging Face folder with every tensor of the class; its size in bytes."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config(text_config=OPT)).half()
    state = {name: x for name, x in model.state_dict().items() if name != "language_model.lm_head.weight"}
    return write_tensors(folder / "model.safetensors", Constant(state), metadata={})


def peak() -> float:
    """The most memory this process has had, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def measure(source: str, target: str, to: str) -> None:
    """One conversion, in this process."""
    import transformers  # noqa: F401  # imported by the check of a config.json: not counted

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = peak(), time.perf_counter()
    done = convert(source, target, to=to, llm="opt")
    seconds = time.perf_counter() - start
    print(f"{done.source} -> {done.target}: {peak() - before:.0f} MiB, {seconds:.0f} s", flush=True)


def main(folder: Path) -> None:
    """All four conversions."""
    size = write_source(folder / "hf")
    store = open_tensors(folder / "hf" / "model.safetensors")
    largest = max(store.spec(name).nbytes for name in store)
    print(f"{size / 1e9:.1f} GB in {len(store)} tensors, the largest {largest / 2**20:.0f} MiB", flush=True)
    steps = (
        ("hf", "ours", "lavis_lite"),
        ("ours", "back", "hf"),
        ("ours", "theirs.pth", "lavis"),
        ("theirs.pth", "again", "lavis_lite"),
    )
    for source, target, to in steps:
        paths = (str(folder / source), str(folder / target))
        subprocess.run([sys.executable, __file__, *paths, to], check=True)
        if target == "back":
            shutil.rmtree(folder / "back")
            shutil.rmtree(folder / "hf")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(*sys.argv[1:])
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        sys.exit("usage: python benchmarks/convert.py FOLDER")
