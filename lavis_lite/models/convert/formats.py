"""Which layout a checkpoint is in, and its tensors under our names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lavis_lite.common.config import read_yaml
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import TensorStore, first_of, open_tensors
from lavis_lite.models.convert import hf, lavis
from lavis_lite.models.convert.parts import LANGUAGE_MODEL
from lavis_lite.models.convert.rules import Layout, Renamed

OURS = "lavis_lite"
# The first whose marker is among the names; a file with none of the markers is ours.
LAYOUTS: tuple[Layout, ...] = (
    lavis.STAGE2_OPT,
    lavis.STAGE2_T5,
    hf.INSTRUCTED,
    hf.RETRIEVAL,
    hf.GENERATION,
    lavis.STAGE1,
)
FAMILIES = (OURS, *dict.fromkeys(layout.family for layout in LAYOUTS))
CONFIG = "config.json"  # of a Hugging Face folder
# In the metadata of a converted file, what its names alone don't tell: the language model's family, and the layout it
# comes from, which says what it never had.
LLM, ORIGIN = "language_model", "converted_from"
_LLM_NAMES = {
    "opt": LANGUAGE_MODEL + "model.decoder.embed_positions.weight",
    "t5": LANGUAGE_MODEL + "shared.weight",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint under our names, not yet read.

    layout: how its file names them; None for our own.
    absent: regular expressions of names that such a checkpoint never has.
    llm: the family of its language model, such as opt or t5; None where it has none or nothing tells.
    """

    tensors: TensorStore
    layout: Layout | None
    llm: str | None
    absent: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What goes into the metadata of a file of ours."""
        notes = {
            LLM: self.llm,
            ORIGIN: self.layout.name if self.layout else self.tensors.metadata.get(ORIGIN),
        }
        return {key: value for key, value in notes.items() if value}


class InMemory(TensorStore):
    """Tensors that are at hand already."""

    metadata: Mapping[str, str] = {}

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, name: str) -> Tensor:
        """Shape and element type."""
        return torch.empty_like(self._tensors[name], device="meta")


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout that names are in; None for our own."""
    names = list(names)
    return next((x for x in LAYOUTS if any(re.fullmatch(x.marker, name) for name in names)), None)


def open_checkpoint(file: str | Path) -> Checkpoint:
    """A weights file or index.json of any known kind under our names.

    Raises CheckpointError when it can't be read, or has keys that its layout doesn't know or lacks others.
    """
    file = Path(file)
    stored = open_tensors(file)
    layout = layout_of(stored)
    tensors = stored if layout is None else Renamed(stored, layout, "read", where=f"'{file}'")
    llm = (layout and layout.llm) or stored.metadata.get(LLM) or _llm_named_in(tensors)
    if llm is None:
        llm = _llm_of_run(file) if layout is None else _llm_of_config(file.with_name(CONFIG))
    origin = layout or next((x for x in LAYOUTS if x.name == stored.metadata.get(ORIGIN)), None)
    return Checkpoint(
        tensors,
        layout,
        llm if "llm_proj.weight" in tensors else None,
        origin.absent if origin else (),
    )


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any known layout under our names. Raises CheckpointError as `open_checkpoint`."""
    layout = layout_of(state)
    return dict(state if layout is None else Renamed(InMemory(state), layout, "read", where="a state dict"))


def target_layout(checkpoint: Checkpoint, family: str, *, where: str) -> Layout:
    """The layout of a family that holds such a checkpoint; CheckpointError when it has none."""
    names = checkpoint.tensors
    if "llm_proj.weight" not in names:
        if "vision_proj.weight" not in names:
            raise CheckpointError(
                f"{where} is no BLIP-2 model: neither llm_proj.weight nor vision_proj.weight is among its keys, "
                f"which begin with: {first_of(list(names))}"
            )
        return lavis.STAGE1 if family == "lavis" else hf.RETRIEVAL
    if family == "lavis":
        return _lavis_stage2(checkpoint.llm, where)
    # What a plain stage-2 file of LAVIS has of the text side comes with a prediction head; nothing reads it.
    reads_text = any(name.startswith("Qformer.bert.embeddings.word_embeddings.") for name in names)
    leftovers = any(name.startswith("Qformer.cls.") for name in names)
    return hf.INSTRUCTED if reads_text and not leftovers else hf.GENERATION


def _lavis_stage2(llm: str | None, where: str) -> Layout:
    layouts = {"opt": lavis.STAGE2_OPT, "t5": lavis.STAGE2_T5}
    if llm is None:
        raise CheckpointError(
            f"{where} doesn't tell its language model's family, which LAVIS's names contain; add --llm opt or t5"
        )
    if llm not in layouts:
        raise CheckpointError(f"{where}: LAVIS's BLIP-2 has no language model of the family {llm}")
    return layouts[llm]


def _llm_named_in(names: Iterable[str]) -> str | None:
    found = set(names)
    return next((llm for llm, name in _LLM_NAMES.items() if name in found), None)


def _llm_of_run(file: Path) -> str | None:
    """What the configuration of the run says that <run>/checkpoints/<step>/model.safetensors belongs to."""
    if len(file.parents) < 3 or not (config := file.parents[2] / "config.yaml").is_file():
        return None
    section = read_yaml(config).get("model")
    llm = section.get("language_model") if isinstance(section, Mapping) else None
    name = llm.get("name") if isinstance(llm, Mapping) else None
    return name if name in _LLM_NAMES else None


def _llm_of_config(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["text_config"]["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
