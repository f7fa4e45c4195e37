"""Weight files read and written tensor by tensor: the same content as the libraries', in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import DTYPES, open_tensors
from lavis_lite.common.tensor_writer import write_tensors


def tensors_of_all_kinds() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"of_{name}": torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for name, dtype in DTYPES.items()
    }
    strange = {
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    return tensors | strange | {"transposed": torch.randn(4, 6, generator=draw).t()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape
        and torch.equal(left[k].float(), right[k].float()) for k in left
    )  # fmt: skip


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    torch.save(tensors, tmp_path / "source.pth")
    written = write_tensors(
        tmp_path / "x.safetensors", open_tensors(tmp_path / "source.pth"), metadata={"who": "me"}
    )
    assert (tmp_path / "x.safetensors").stat().st_size == written
    assert equal(load_file(tmp_path / "x.safetensors"), tensors)
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth"])
def test_specs_and_values(tmp_path: Path, kind: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of_all_kinds().items()}
    path = tmp_path / f"x.{kind}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:  # before torch 1.6 files were one pickle after another, which can't be mapped
        tensors = {k: x for k, x in tensors.items() if "F8" not in k}
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=kind == "pth")
    store = open_tensors(path)
    assert equal(dict(store), tensors)
    for name, tensor in tensors.items():
        spec = store.spec(name)
        assert (spec.is_meta, spec.shape, spec.dtype) == (True, tensor.shape, tensor.dtype)


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    words = torch.randn(50, 20)
    torch.save({"words": words, "head": words, "copy": words.clone()}, tmp_path / "tied.pth")
    store = open_tensors(tmp_path / "tied.pth")
    once = write_tensors(tmp_path / "once.safetensors", store, metadata={})
    twice = write_tensors(tmp_path / "twice.safetensors", store, metadata={}, tie=False)
    assert twice - once > 3900
    assert set(load_file(tmp_path / "twice.safetensors")) == {"words", "head", "copy"}
    again = open_tensors(tmp_path / "once.safetensors")
    assert equal(dict(again), dict(store))
    assert again.owner("head") == again.owner("words") != again.owner("copy")
    assert equal(ckpt.load_tensors(tmp_path / "once.safetensors"), dict(store))


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    return index


def test_a_model_in_several_files(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert ckpt.resolve_checkpoint(tmp_path) == index
    assert equal(dict(open_tensors(index)), {"a": torch.ones(2), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is not the index of a model"),
        ('{"weights": {}}', "is not the index of a model"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": "../1.safetensors"}}', "in other folders"),
        ('{"weight_map": {"a": "3.safetensors"}}', "no weights file at .*3.safetensors"),
        ('{"weight_map": {"a": "2.safetensors"}}', "'2.safetensors' holds a, which it doesn't"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    index = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(index)


def test_an_unfinished_file_is_not_there(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "complex.pth")
    with pytest.raises(
        CheckpointError, match=r"b: safetensors has no name for elements of type torch\.complex64"
    ):
        write_tensors(tmp_path / "x.safetensors", open_tensors(tmp_path / "complex.pth"), metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["complex.pth"]


CONVERT = """
import sys
from lavis_lite.models.convert.command import convert

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

small, large, target, to = sys.argv[1:]
convert(small, target + "_small", to=to, llm="opt")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
convert(large, target, to=to, llm="opt")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_converting_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    from convert_helpers import lavis_state

    from lavis_lite.models.convert.command import convert

    # 600 MB in tensors of 20 MB.
    llm = {f"model.decoder.layers.{n}.fc1.weight": (5000, 1000) for n in range(30)}
    torch.save({"model": lavis_state("opt")}, tmp_path / "small.pth")
    torch.save({"model": lavis_state("opt", llm=llm)}, tmp_path / "large.pth")
    for name in ("small", "large"):
        convert(tmp_path / f"{name}.pth", tmp_path / f"{name}_hf", to="hf")
    for small, large, to in (
        ("small.pth", "large.pth", "lavis_lite"),
        ("small.pth", "large.pth", "hf"),
        ("small_hf", "large_hf", "lavis_lite"),
    ):
        arguments = [str(tmp_path / small), str(tmp_path / large), str(tmp_path / f"{large}_as_{to}"), to]
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        grown = float(done.stdout)
        print(f"{large} -> {to}: {grown:.0f} MB")
        assert grown < 150, f"{large} -> {to}"
