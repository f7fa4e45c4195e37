"""LAVIS's and Hugging Face's checkpoints: loaded strictly, the same function, there and back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import (
    FULL,
    FULL_CLIP,
    OPT,
    T5,
    TINY,
    Sizes,
    hf_model,
    lavis_state,
    stage1_config,
    stage2_config,
    without_key_bias,
)
from safetensors.torch import load_file, save_file
from stage1_helpers import SPECIAL, enlarge_weights, tiny_config, write_tokenizer
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.convert import hf
from lavis_lite.models.convert.command import convert
from lavis_lite.models.convert.formats import InMemory, our_names
from lavis_lite.models.convert.hf_config import config_for
from lavis_lite.models.convert.rules import Renamed
from lavis_lite.models.qformer import QFormer, QFormerConfig

transformers = pytest.importorskip("transformers")
OPT_SHAPES = {"model.decoder.embed_positions.weight": (18, 16), "lm_head.weight": (30, 16)}
T5_SHAPES = {"shared.weight": (30, 16), "lm_head.weight": (30, 16)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def save_hf(folder: Path, architecture: str, llm: dict[str, Any] = OPT, **options: Any) -> Any:
    model = hf_model(architecture, llm)
    enlarge_weights(model)
    without_key_bias(model)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize(
    ("kind", "vision", "llm"),
    [
        ("stage1", "eva", None),
        ("stage1", "clip", None),
        ("stage1", "none", None),
        ("opt", "eva", OPT_SHAPES),
        ("opt", "none", None),
        ("t5", "clip", T5_SHAPES),
        ("t5", "none", None),
    ],
)
def test_lavis_there_and_back(tmp_path: Path, kind: Any, vision: Any, llm: dict | None) -> None:
    state = lavis_state(kind, vision=vision, llm=llm)
    torch.save({"model": state, "epoch": 3}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", to="lavis_lite")
    convert(tmp_path / "ours", tmp_path / "back.pth", to="lavis")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert same(back, state)
    if kind == "stage1":
        decoder, words = (
            "Qformer.cls.predictions.decoder.weight",
            "Qformer.bert.embeddings.word_embeddings.weight",
        )
        assert back[decoder].data_ptr() == back[words].data_ptr(), "written once"


@pytest.mark.parametrize(
    ("architecture", "llm"),
    [
        ("Blip2ForImageTextRetrieval", OPT),
        ("Blip2ForConditionalGeneration", OPT),
        ("Blip2ForConditionalGeneration", T5),
        ("Blip2Model", OPT),
        ("InstructBlipForConditionalGeneration", T5),
    ],
)
def test_hugging_face_there_and_back(tmp_path: Path, architecture: str, llm: dict) -> None:
    model = save_hf(tmp_path / "theirs", architecture, llm, max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    convert(tmp_path / "theirs", tmp_path / "ours", to="lavis_lite")
    done = convert(tmp_path / "ours", tmp_path / "back", to="hf")
    state = dict(model.state_dict())
    tied = [name for name in model.all_tied_weights_keys if name in state]  # saved once, under another name
    assert same(
        load_file(tmp_path / "back" / "model.safetensors"), {k: v for k, v in state.items() if k not in tied}
    )
    assert not done.notes
    again, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert same(dict(again.state_dict()), state)


@torch.no_grad()
def test_hugging_face_retrieval_is_our_stage_1(tmp_path: Path) -> None:
    theirs = save_hf(tmp_path / "theirs", "Blip2ForImageTextRetrieval")
    # They compute ln_vision with the encoder's eps; LAVIS, and we, with 1e-5.
    theirs.vision_model.post_layernorm.eps = 1e-5
    convert(tmp_path / "theirs", tmp_path / "ours", to="lavis_lite")
    model = Blip2QFormer.from_config(stage1_config(tmp_path)).eval()
    pixels = torch.randn(3, 3, 28, 28)
    tokens = model.tokenize(["a red dog", "the big blue cat sits on a mat", "dogs"])
    call = {
        "pixel_values": pixels,
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask.long(),
    }
    itc = theirs(**call, use_image_text_matching_head=False)
    itm = theirs(**call, use_image_text_matching_head=True).logits_per_image
    for name in ("theirs", "ours"):
        enlarge_weights(model, seed=1)
        # What their class never has stays as it is.
        kept = {k: x.clone() for k, x in model.state_dict().items() if k.startswith(("temp", "Qformer.cls."))}
        model.load_checkpoint(tmp_path / name)
        assert len(kept) == 6 and all(torch.equal(model.state_dict()[k], x) for k, x in kept.items())

        embeds = model.encode_image(pixels)
        torch.testing.assert_close(embeds, theirs.vision_model(pixels).last_hidden_state, rtol=0, atol=1e-5)
        image_kv = model.project_image(embeds)
        torch.testing.assert_close(model.query_features(image_kv), itc.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.text_features(tokens), itc.text_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.match_logits(image_kv, tokens), itm, rtol=0, atol=1e-5)


@torch.no_grad()
def test_lavis_stage_1_is_a_model(tmp_path: Path) -> None:
    state = lavis_state("stage1", vision="clip")
    torch.save({"model": state}, tmp_path / "theirs.pth")
    model = Blip2QFormer.from_config(stage1_config(tmp_path, "small_clip"))
    model.load_checkpoint(tmp_path / "theirs.pth")
    own = model.state_dict()
    assert torch.equal(
        own["visual_encoder.encoder.model.cls_token"][0, 0], state["visual_encoder.class_embedding"]
    )
    assert torch.equal(own["temp"], state["temp"])
    assert torch.equal(own["Qformer.cls.predictions.bias"], state["Qformer.cls.predictions.bias"])
    # The same from a file without the frozen encoder, which stays as it is.
    torch.save({"model": lavis_state("stage1", vision="none")}, tmp_path / "released.pth")
    model.load_checkpoint(tmp_path / "released.pth")
    assert torch.equal(
        model.state_dict()["visual_encoder.encoder.model.cls_token"],
        own["visual_encoder.encoder.model.cls_token"],
    )


def test_of_two_biases_the_decoders_is_taken() -> None:
    # As after adding a word to BERT's vocabulary, which leaves the other as long as it was.
    state = lavis_state("stage1")
    bias = state["Qformer.cls.predictions.decoder.bias"]
    state["Qformer.cls.predictions.bias"] = torch.zeros(len(bias) - 1)
    assert torch.equal(our_names(state)["Qformer.cls.predictions.bias"], bias)


@torch.no_grad()
@pytest.mark.parametrize("llm", [OPT, T5])
def test_hugging_face_generation_is_our_stage_2(tmp_path: Path, llm: dict) -> None:
    theirs = save_hf(tmp_path / "theirs", "Blip2ForConditionalGeneration", llm)
    theirs.vision_model.post_layernorm.eps = 1e-5
    model = Blip2Generative.from_config(stage2_config(llm)).eval()
    model.load_checkpoint(tmp_path / "theirs")
    pixels = torch.randn(2, 3, 28, 28)
    image = theirs.vision_model(pixels).last_hidden_state
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=image)
    expected = theirs.language_projection(queries.last_hidden_state)
    torch.testing.assert_close(model.visual_prompt(pixels), expected, rtol=0, atol=1e-5)
    assert same(model.language_model.model.state_dict(), dict(theirs.language_model.state_dict()))


def test_an_output_layer_of_its_own_is_untied(tmp_path: Path) -> None:
    # FlanT5's differs from its embedding; transformers 5 builds every T5 with one for both.
    state = lavis_state(
        "t5",
        llm={k: tuple(v.shape) for k, v in hf_model("Blip2Model", T5).language_model.state_dict().items()},
    )
    for name in ("encoder", "decoder"):
        state[f"t5_model.{name}.embed_tokens.weight"] = state["t5_model.shared.weight"]
    torch.save({"model": state}, tmp_path / "theirs.pth")
    model = Blip2Generative.from_config(stage2_config(T5))
    t5 = model.language_model.model
    assert t5.lm_head.weight is t5.shared.weight
    model.load_checkpoint(tmp_path / "theirs.pth")
    assert torch.equal(t5.lm_head.weight, state["t5_model.lm_head.weight"])
    assert torch.equal(t5.shared.weight, state["t5_model.shared.weight"])
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    assert not t5.lm_head.weight.requires_grad


def test_stage_2_starts_from_any_stage_1(tmp_path: Path) -> None:
    torch.save({"model": lavis_state("stage1")}, tmp_path / "lavis.pth")
    save_hf(tmp_path / "hf", "Blip2ForImageTextRetrieval")
    for source in ("lavis.pth", "hf"):
        model = Blip2Generative.from_config(stage2_config(OPT))
        before = model.llm_proj.weight.clone()
        model.load_checkpoint(tmp_path / source)
        assert torch.equal(model.llm_proj.weight, before)
    leftovers = {k: v for k, v in lavis_state("stage1").items() if k.startswith(("Qformer", "query"))}
    torch.save({"model": {**lavis_state("opt"), **leftovers}}, tmp_path / "leftovers.pth")
    model.load_checkpoint(tmp_path / "leftovers.pth")
    assert torch.equal(model.llm_proj.weight, lavis_state("opt")["opt_proj.weight"])


def test_positions_of_another_image_size(tmp_path: Path) -> None:
    torch.save({"model": lavis_state("stage1")}, tmp_path / "at28.pth")
    model = Blip2QFormer.from_config(stage1_config(tmp_path, image_size=56))
    model.load_checkpoint(tmp_path / "at28.pth")
    assert model.visual_encoder.encoder.model.pos_embed.shape == (1, 17, 24)


def test_lavis_hugging_face_and_back(tmp_path: Path) -> None:
    state = lavis_state("opt")
    torch.save({"model": state}, tmp_path / "theirs.pth")
    done = convert(tmp_path / "theirs.pth", tmp_path / "hf", to="hf")
    assert "no config.json" in done.notes[0]
    with pytest.raises(CheckpointError, match="add --llm opt or t5"):
        convert(tmp_path / "hf", tmp_path / "back.pth", to="lavis")
    convert(tmp_path / "hf", tmp_path / "back.pth", to="lavis", llm="opt")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def full_tokenizer(folder: Path) -> str:
    """As many words as BERT has."""
    return write_tokenizer(folder, [f"w{n}" for n in range(30522 - len(SPECIAL))])


def on_meta(config: dict[str, Any], model: type) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in model.from_config(config).state_dict().items()}


OPT_27B = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
           "ffn_dim": 10240, "word_embed_proj_dim": 2560}  # fmt: skip
FLAN_T5_XL = {"model_type": "t5", "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "d_kv": 64,
              "feed_forward_proj": "gated-gelu", "vocab_size": 32128}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "vision", "sizes", "count"),
    [("stage1", "eva", FULL, 857), ("stage1", "clip", FULL_CLIP, 627), ("opt", "eva", FULL, 771)],
)
def test_lavis_key_sets_at_full_size(
    tmp_path: Path, kind: Any, vision: Any, sizes: Sizes, count: int
) -> None:
    state = lavis_state(kind, sizes, vision=vision, device="meta")
    assert len(state) == count
    encoder = {"name": "eva_clip_g" if vision == "eva" else "clip_L"}
    if kind == "stage1":
        config = {"vision_encoder": encoder, "tokenizer": full_tokenizer(tmp_path)}
        own = on_meta(config, Blip2QFormer)
    else:
        llm = {"name": "opt", "model_name": "tiny", "config": OPT_27B}
        own = on_meta({"vision_encoder": encoder, "language_model": llm}, Blip2Generative)
        own = {name: shape for name, shape in own.items() if not name.startswith("language_model.")}
    assert {name: tuple(x.shape) for name, x in our_names(state).items()} == own


@pytest.mark.parametrize(
    ("architecture", "llm"),
    [
        ("Blip2ForImageTextRetrieval", OPT_27B),
        ("Blip2ForConditionalGeneration", OPT_27B),
        ("Blip2ForConditionalGeneration", FLAN_T5_XL),
    ],
)
def test_hugging_face_key_sets_at_full_size(tmp_path: Path, architecture: str, llm: dict) -> None:
    with torch.device("meta"):
        theirs = hf_model(architecture, llm, FULL, vision=16, qformer=12).state_dict()
    encoder = {"name": "eva_clip_g"}
    if architecture == "Blip2ForImageTextRetrieval":
        config = {"vision_encoder": encoder, "tokenizer": full_tokenizer(tmp_path)}
        own = on_meta(config, Blip2QFormer)
        never = [name for name in own if name.startswith("Qformer.cls.") or name == "temp"]
        own = {name: shape for name, shape in own.items() if name not in never}
        assert len(never) == 6
    else:
        section = {"name": llm["model_type"], "model_name": "tiny", "config": llm}
        own = on_meta({"vision_encoder": encoder, "language_model": section}, Blip2Generative)
    assert {name: tuple(x.shape) for name, x in our_names(theirs).items()} == own


def drop(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lavis_state("stage1") | {"Qformer.novel.weight": torch.zeros(2)},
            "1 unknown keys: Qformer.novel.weight",
        ),
        (
            drop(lavis_state("stage1"), "visual_encoder.blocks.1.attn.v_bias", "text_proj.bias"),
            r"1 missing keys of the image encoder \(EVA\): visual_encoder.blocks.1.attn.v_bias; "
            r"1 missing keys of the text projection: text_proj.bias",
        ),
        (
            {k: v for k, v in lavis_state("stage1").items() if "layer.1." not in k},
            r"16 missing keys of the Q-Former's blocks: .*layer\.1\.",
        ),
        (
            drop(lavis_state("stage1"), "Qformer.bert.encoder.layer.2.crossattention.self.key.bias"),
            "1 missing keys of the Q-Former's cross-attention",
        ),
        (lavis_state("opt"), r"unexpected: llm_proj\.weight, llm_proj\.bias"),
        (
            lavis_state("stage1", Sizes(queries=7)),
            r"1 of another shape: query_tokens \(1, 7, 32\) here \(1, 5, 32\)",
        ),
        (lavis_state("stage1", Sizes(blocks=2)), r"missing: visual_encoder\.encoder\.model\.blocks\.2\."),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_its_keys(tmp_path: Path, state: dict, message: str) -> None:
    torch.save({"model": state}, tmp_path / "theirs.pth")
    model = Blip2QFormer.from_config(stage1_config(tmp_path))
    before = model.query_tokens.clone()
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_checkpoint(tmp_path / "theirs.pth")
    assert "theirs.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(model.query_tokens, before)


def test_a_checkpoint_for_another_language_model(tmp_path: Path) -> None:
    torch.save({"model": lavis_state("opt")}, tmp_path / "opt.pth")
    save_hf(tmp_path / "hf", "Blip2ForConditionalGeneration", OPT)
    model = Blip2Generative.from_config(stage2_config(T5))
    convert(tmp_path / "opt.pth", tmp_path / "ours.safetensors", to="lavis_lite")
    for source in ("opt.pth", "hf", "ours.safetensors"):
        with pytest.raises(
            CheckpointError, match="is for a language model of the family opt, this model's is t5"
        ):
            model.load_checkpoint(tmp_path / source)
    wide = Blip2Generative.from_config(stage2_config({**OPT, "hidden_size": 32, "word_embed_proj_dim": 32}))
    with pytest.raises(
        CheckpointError, match=r"of another shape: llm_proj\.weight \(16, 32\) here \(32, 32\)"
    ):
        wide.load_checkpoint(tmp_path / "opt.pth")


def test_half_a_frozen_language_model_is_an_error(tmp_path: Path) -> None:
    save_hf(tmp_path / "theirs", "Blip2ForConditionalGeneration")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file(drop(state, "language_model.model.decoder.layers.1.fc1.bias"), tmp_path / "half.safetensors")
    model = Blip2Generative.from_config(stage2_config(OPT))
    with pytest.raises(CheckpointError, match=r"1 missing: language_model\.model\..*layers\.1\.fc1\.bias"):
        model.load_checkpoint(tmp_path / "half.safetensors")
    none = {name: tensor for name, tensor in state.items() if not name.startswith("language_model.")}
    save_file(none, tmp_path / "none.safetensors")
    model.load_checkpoint(tmp_path / "none.safetensors")


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    torch.save({"model": lavis_state("stage1", vision="clip")}, tmp_path / "clip.pth")
    with pytest.raises(
        CheckpointError, match=r"can't be written as Hugging Face's .*keys without a place there"
    ):
        convert(tmp_path / "clip.pth", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(CheckpointError, match="exists; name a new one"):
        convert(tmp_path / "clip.pth", tmp_path / "clip.pth", to="lavis_lite")
    with pytest.raises(CheckpointError, match=r"are \.pth files"):
        convert(tmp_path / "clip.pth", tmp_path / "folder", to="lavis")
    save_hf(tmp_path / "theirs", "Blip2ForConditionalGeneration")
    hf_model("Blip2ForConditionalGeneration", {**OPT, "ffn_dim": 24}).config.save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(CheckpointError, match=r"config\.json' is for another model: language_model\..*fc1"):
        convert(tmp_path / "theirs", tmp_path / "copy", to="hf", config=tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "width", "published"),
    [("stage1", 0, None), ("opt", 2560, 32), ("opt", 4096, 32), ("t5", 2048, 32), ("t5", 4096, 64)],
)
def test_config_of_a_published_model_is_told_by_shapes(kind: Any, width: int, published: int | None) -> None:
    state = our_names(lavis_state(kind, replace(FULL, llm=width), device="meta"))
    layout = hf.GENERATION if published else hf.RETRIEVAL
    tensors = Renamed(InMemory(state), layout, "write", where="this")
    text, notes = config_for(tensors, None if kind == "stage1" else kind, given=None)
    assert text is not None
    config = transformers.Blip2Config.from_dict(json.loads(text))
    assert [note.split(" (")[0] for note in notes] == (["without the language model"] if published else [])
    assert config.model_type == json.loads(text)["model_type"]
    if published:
        assert (config.text_config.model_type, config.text_config.hidden_size) == (kind, width)
        assert config.text_config.num_attention_heads == published


def test_question_conditioned_q_former_of_instruct_blip() -> None:
    with torch.device("meta"):
        theirs = our_names(hf_model("InstructBlipForConditionalGeneration", T5).state_dict())
        shape = QFormerConfig(**{**tiny_config("")["qformer"], "max_position_embeddings": TINY.positions})
        own = QFormer(shape, vocab_size=TINY.words, image_width=TINY.image, language_head=False).state_dict()
    theirs = {
        k.removeprefix("Qformer."): tuple(x.shape) for k, x in theirs.items() if k.startswith("Qformer.")
    }
    assert theirs == {name: tuple(tensor.shape) for name, tensor in own.items()}


def test_a_plain_model_refuses_a_q_former_that_reads_questions(tmp_path: Path) -> None:
    save_hf(tmp_path / "theirs", "InstructBlipForConditionalGeneration", T5)
    with pytest.raises(CheckpointError, match=r"unexpected: Qformer\.bert\.embeddings\.word_embeddings"):
        Blip2Generative.from_config(stage2_config(T5)).load_checkpoint(tmp_path / "theirs")
