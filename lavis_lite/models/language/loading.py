"""Language models and tokenizers from the hub, a local folder, or, at random, from a few numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lavis_lite.common.errors import CheckpointError, ConfigError, MissingDependencyError
from lavis_lite.models.language.lora import LoraConfig
from lavis_lite.models.tokenizer import has_words

EMBEDDED = {
    name: Path(__file__).resolve().parents[2]
    / "worlds"
    / "shapes"
    / "language"
    / name.removeprefix("shapes_")
    for name in ("shapes_opt", "shapes_t5")
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LanguageModelConfig:
    """The keys of a `language_model` section.

    name: a registered adapter. model_name: on the hub, a local folder, or shapes_opt / shapes_t5 (embedded).
    config: the architecture (`model_type` and sizes as transformers names them), to build it at random without any
        file; by default that of model_name.
    pretrained: load the weights of model_name; false leaves them random.
    precision: of the weights; auto: float32, and the arithmetic of what surrounds them (run.precision).
    quantize: load the weights in 8 or 4 bits (extra `quantize`, CUDA).
    end_of_text: the text that ends a text, where it isn't the tokenizer's end token ("\\n" for OPT, as in BLIP-2).
    chat_template: prompts are put into the model's own chat format.
    grad_checkpointing: recompute activations in the backward pass. lora: train low-rank additions (extra `lora`).
    """

    name: str
    model_name: str
    config: dict[str, Any] | None = None
    pretrained: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    end_of_text: str | None = None
    chat_template: bool = False
    grad_checkpointing: bool = False
    lora: LoraConfig | None = field(default=None)


def source_of(model_name: str) -> str:
    """Where transformers finds a model: the package's folder for an embedded one, a folder, or a hub name.

    Raises ConfigError for an embedded one that this checkout doesn't have.
    """
    if model_name in EMBEDDED:
        if not EMBEDDED[model_name].is_dir():
            recipe = f"pretrain_{model_name.removeprefix('shapes_')}"
            raise ConfigError(
                f"model.language_model: '{model_name}' is not shipped with this version yet; make it with "
                f"`python train.py --cfg-path projects/shapes/{recipe}.yaml`, then "
                f"`python -m lavis_lite.worlds.shapes.export output/{recipe}`"
            )
        return str(EMBEDDED[model_name])
    folder = Path(model_name).expanduser()
    return str(folder) if folder.is_dir() else model_name


def build_llm(auto_class: str, config: LanguageModelConfig) -> Any:
    """The architecture with random weights; on the meta device, as a mere shape, when weights are to follow.

    Raises ConfigError when the architecture isn't known offline and can't be fetched.
    """
    import transformers

    build = getattr(transformers, auto_class).from_config
    architecture = _architecture(config)
    if config.pretrained:
        with torch.device("meta"):
            return build(architecture)
    return build(architecture).to(DTYPES.get(config.precision, torch.float32))


def load_llm(auto_class: str, config: LanguageModelConfig) -> Any:
    """The model of `model_name` with its weights, every one of them.

    Raises CheckpointError when they can't be read, or the files lack some; MissingDependencyError for quantization
    without its package.
    """
    import transformers

    load = getattr(transformers, auto_class).from_pretrained
    extra = {"quantization_config": _quantization(config)} if config.quantize != "none" else {}
    with quiet():
        try:
            model, report = load(
                source_of(config.model_name),
                dtype=DTYPES.get(config.precision, torch.float32),
                output_loading_info=True,
                **extra,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"model.language_model: no weights for '{config.model_name}': {_reason(error)}; give a local folder as "
                "model_name, or let the machine reach the hub once"
            ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"model.language_model: '{config.model_name}' lacks {', '.join(missing[:5])}")
    return model


def load_tokenizer(config: LanguageModelConfig) -> Any:
    """The fast tokenizer of `model_name`, with a pad token; raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source_of(config.model_name))
        if not has_words(tokenizer):
            raise ValueError("its files hold no vocabulary")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.language_model: no tokenizer for '{config.model_name}': {_reason(error)}; give a local folder as "
            "model_name, or let the machine reach the hub once"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere: any token will do
    return tokenizer


def _architecture(config: LanguageModelConfig) -> Any:
    from transformers import AutoConfig

    if config.config is not None:
        sizes = dict(config.config)
        model_type = sizes.pop("model_type", None)
        if model_type is None:
            raise ConfigError("model.language_model.config.model_type is missing: e.g. opt, t5, llama")
        try:
            return AutoConfig.for_model(model_type, **sizes)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.language_model.config: {_reason(error)}") from error
    try:
        return AutoConfig.from_pretrained(source_of(config.model_name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.language_model: unknown model '{config.model_name}': {_reason(error)}; give a local folder as "
            "model_name, or its sizes as `config`"
        ) from error


def _quantization(config: LanguageModelConfig) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingDependencyError(
            f"model.language_model.quantize: {config.quantize} needs bitsandbytes: pip install 'lavis-lite[quantize]'"
        )
    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar over the weights, of which a small model's run would show one every time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
