"""What every model is: built at random and offline from a mapping, filled by separate, strict loads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lavis_lite.common.binding import bind
from lavis_lite.common.checkpoint import resolve_checkpoint
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.registry import registry
from lavis_lite.models.convert.formats import Checkpoint, open_checkpoint
from lavis_lite.models.frozen import frozen_source, keep
from lavis_lite.models.strict import load_strictly

logger = get_logger(__name__)

# Keys of a model section that choose what to build or load; all others are keywords of the class.
SECTION_KEYS = ("arch", "model_type", "pretrained")
# Keys that name another run's weights to begin with.
SOURCES = ("pretrained", "qformer_text_from")


class BaseModel(nn.Module):
    """A registered model; its keyword arguments are the schema of the config's `model` section.

    presets: its folder of presets below lavis_lite/configs/models/; by default that of its registered name.
    optional_keys: regular expressions of keys that a checkpoint may lack, such as those of frozen backbones.
    frozen_from: the file that gave weights which this model keeps frozen, or keeps them (`keep_frozen`), beyond what
        `load_backbones` loads; its own checkpoints don't hold them but name that file.
    untrained_remedies: by a part's name, what to do when it is the only one without trained weights.
    """

    presets: ClassVar[str]
    optional_keys: ClassVar[tuple[str, ...]] = ()
    frozen_from: Path | None = None
    untrained_remedies: ClassVar[Mapping[str, str]] = {}
    _held: frozenset[str] = frozenset()  # names of tensors that checkpoints gave, or a run keeps
    _never_given: frozenset[str] = frozenset()  # of those that the kind of such a checkpoint never has

    @classmethod
    def validate_config(cls, cfg: Mapping[str, Any], *, where: str = "model") -> None:
        """Check keys and values of a model section; builds and loads nothing. Raises ConfigError."""
        bind(cls, cfg, where=where, skip=SECTION_KEYS)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Self:
        """The model with random weights, built offline, on torch's default device (also "meta")."""
        cls.validate_config(cfg)
        return cls(**bind(cls, cfg, where="model", skip=SECTION_KEYS))

    def load_backbones(self) -> None:
        """Load the pretrained parts that the config asked for; strict."""

    def is_of_backbones(self, name: str) -> bool:
        """Whether `load_backbones` gives a frozen tensor, so that no checkpoint needs to hold it.

        By default all, where a model loads anything there.
        """
        return type(self).load_backbones is not BaseModel.load_backbones

    def load_checkpoint(self, path: str | Path) -> None:
        """Load weights from a run's folder, a checkpoint's folder, a weights file, or another project's checkpoint.

        Which kinds are understood: docs/checkpoints.md.

        Raises CheckpointError naming keys that are missing (and not optional), unexpected or of another
        shape, and for a checkpoint for another language model.
        """
        file = resolve_checkpoint(path)
        self._load_opened(open_checkpoint(file), file)

    def _load_opened(self, checkpoint: Checkpoint, file: Path) -> None:
        own = self.language_model_type
        if own and checkpoint.llm and checkpoint.llm != own:
            raise CheckpointError(
                f"'{file}' is for a language model of the family {checkpoint.llm}, this model's is {own}"
            )
        source = frozen_source(file)
        frozen = {} if source is None else self._frozen_of(source)
        tensors, optional = self.select_weights({**frozen, **checkpoint.tensors})
        load_strictly(self, tensors, source=f"'{file}'", optional=(*optional, *checkpoint.absent))
        never = [re.compile(pattern) for pattern in checkpoint.absent]
        left_out = {name for name in self.state_dict() if any(pattern.search(name) for pattern in never)}
        self._held = self._held | tensors.keys()
        self._never_given = self._never_given | left_out
        if tensors.keys() & self._frozen():
            self.frozen_from = source or file.resolve()

    def _frozen_of(self, source: Path) -> dict[str, Tensor]:
        """What a checkpoint of another run has of the parts that this model doesn't train."""
        tensors = open_checkpoint(source).tensors
        return {name: tensors[name] for name in self._frozen() & tensors.keys()}

    def select_weights(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """What this model takes of a checkpoint's tensors, and patterns of names that these may lack.

        The default takes all of them; a model that is built on another one's weights declares what it leaves.
        """
        return dict(tensors), self.optional_keys

    def check_rows(self, dataset: Any) -> None:
        """Raise ConfigError, with the dataset's name, where `forward` couldn't do with batches of its rows.

        dataset: what it declares of its rows, see `datasets.base.Rows`; of one that declares nothing nothing is known.
        """

    def keep_frozen(self, run_dir: Path, *, write: bool = True) -> list[str]:
        """Where frozen parts have weights that no file gave, write these; its checkpoints then name that file.

        Random weights, or those that an encoder's own code loads, would be others when the model is built again.
        Returns the names of the parts, none where nothing is to be kept. write: false where another process does.
        """
        ungiven = self._ungiven()
        parts = {name.split(".")[0] for name, _ in self.named_parameters() if name in ungiven}
        if parts:
            own = self.state_dict()
            elsewhere = self._frozen_of(self.frozen_from) if self.frozen_from else {}
            kept = {name: own[name] for name in sorted(ungiven | elsewhere.keys())}
            self.frozen_from = keep(run_dir, kept, write=write)
            self._held = self._held | kept.keys()
        return sorted(parts)

    def _ungiven(self) -> set[str]:
        """Names of frozen tensors that neither `load_backbones` nor a file gave."""
        return {name for name in self._frozen() if name not in self._held and not self.is_of_backbones(name)}

    def _frozen(self) -> set[str]:
        """Names of what its checkpoints don't hold."""
        return self.state_dict().keys() - self.trainable_state_dict().keys()

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: trained parameters and the buffers of the modules that own them."""
        kept = {
            name
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        for prefix, module in self.named_modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                kept |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        return {name: tensor for name, tensor in self.state_dict().items() if name in kept}

    def needs_no_checkpoint(self) -> tuple[str, ...]:
        """Patterns of trained parameters that are of use without one: `load_backbones` gives them, or they begin at
        what changes nothing."""
        return ()

    def untrained(self) -> list[str]:
        """Names of the parameters to be trained that are still at random, for no checkpoint gave them.

        What a checkpoint of that kind never has, such as a head that its project doesn't publish, doesn't count.
        """
        named = dict(self.named_parameters(remove_duplicate=False))
        given = {id(named[name]) for name in (self._held | self._never_given) & named.keys()}
        useful = [re.compile(pattern) for pattern in self.needs_no_checkpoint()]
        return [
            name
            for name, parameter in named.items()
            if parameter.requires_grad
            and id(parameter) not in given
            and not any(p.search(name) for p in useful)
        ]

    def lr_scale(self, name: str, decay: float) -> float:
        """The factor on the learning rate of parameter `name` under layer-wise decay `decay`."""
        return 1.0

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay, beyond biases and one-dimensional ones."""
        return set()

    @property
    def language_model_type(self) -> str | None:
        """The family of the frozen language model by transformers' name, such as opt or t5; None without one."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


def build_model(cfg: Mapping[str, Any]) -> BaseModel:
    """The model of a config's `model` section with its backbones and, when `pretrained` names one, a
    checkpoint.

    Raises UnknownNameError, ConfigError, CheckpointError.
    """
    if "arch" not in cfg:
        raise ConfigError("missing model.arch: one of " + ", ".join(registry.names("model")))
    model_class = registry.get_model_class(cfg["arch"])
    source = cfg.get("pretrained")
    if not source:
        model: BaseModel = model_class.from_config(cfg)
        model.load_backbones()
        return model
    file = resolve_checkpoint(source)
    checkpoint = open_checkpoint(file)
    model = model_class.from_config(_without_what_it_holds(cfg, checkpoint.tensors))
    model.load_backbones()
    model._load_opened(checkpoint, file)
    logger.info("weights of %s", file)
    return model


def without_sources(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A model section for a run that goes on from a checkpoint of its own, which holds what other runs once gave."""
    return {**cfg, **{key: None for key in SOURCES if key in cfg}}


def _without_what_it_holds(cfg: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A model section that leaves out loading what a checkpoint brings: its Q-Former's BERT, the Q-Former's text side
    and frozen parts if it has them (Hugging Face's files do)."""
    parts = {name.split(".")[0] for name in names if ".lora_" not in name}
    sections = {"qformer": "Qformer", "vision_encoder": "visual_encoder", "language_model": "language_model"}
    kept = dict(cfg)
    for section, part in sections.items():
        own = cfg.get(section)
        if part in parts and isinstance(own, Mapping) and own.get("pretrained"):
            kept[section] = {**own, "pretrained": None if section == "qformer" else False}
    if cfg.get("qformer_text_from") and "Qformer.bert.embeddings.word_embeddings.weight" in names:
        logger.info("model.qformer_text_from is not read: the checkpoint has a text side of its own")
        kept["qformer_text_from"] = None
    return kept
