"""Reading pretrained weights: layouts, strictness, other image sizes, the hub."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_vision_eva_clip import clip_weights, eva_weights, tiny_clip, tiny_eva
from torch import Tensor
from torch.nn.functional import interpolate

from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.vision import clip, eva
from lavis_lite.models.vision.weights import interpolate_positions

IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def whole_openai(num_blocks: int) -> dict[str, Tensor]:
    visual = {f"visual.{key}": tensor for key, tensor in clip_weights(num_blocks).items()}
    text = [
        "transformer.resblocks.0.ln_1.weight",
        "token_embedding.weight",
        "positional_embedding",
        "logit_scale",
    ]
    return visual | {key: torch.zeros(4) for key in [*text, "ln_final.weight", "text_projection"]}


def test_whole_openai_model_gives_its_visual_tower(tmp_path: Path) -> None:
    save_file(whole_openai(4), tmp_path / "whole.safetensors")
    save_file(clip_weights(4), tmp_path / "visual.safetensors")
    features = []
    for name in ("whole", "visual"):
        encoder = tiny_clip()
        encoder.load_pretrained(str(tmp_path / f"{name}.safetensors"))
        features.append(encoder(IMAGES))
    assert torch.equal(*features)


@pytest.mark.parametrize("blocks", [3, 4])
@pytest.mark.parametrize("behind", [(), ("norm", "head"), ("fc_norm",)])
def test_what_lies_behind_the_features_may_be_there_or_not(
    tmp_path: Path, blocks: int, behind: tuple
) -> None:
    file = eva_weights(4)
    file = {
        key: tensor.half() for key, tensor in file.items() if blocks == 4 or not key.startswith("blocks.3.")
    }
    file |= {f"{part}.{kind}": torch.zeros(3) for part in behind for kind in ("weight", "bias")}
    torch.save({"model": file}, tmp_path / "eva.pth")
    encoder = tiny_eva()
    encoder.load_pretrained(str(tmp_path / "eva.pth"))
    loaded = encoder.model.blocks[2].mlp.fc2.weight
    assert loaded.dtype is torch.float32
    assert torch.equal(loaded, file["blocks.2.mlp.fc2.weight"].float())


def without(key: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != key}


@pytest.mark.parametrize(
    ("build", "file", "named"),
    [
        (tiny_eva, without("blocks.1.attn.v_bias", eva_weights(4)), "1 missing: blocks.1.attn.v_bias"),
        (tiny_eva, eva_weights(5), "unexpected: blocks.4."),
        (tiny_eva, eva_weights(2), "missing: blocks.2."),
        (
            tiny_eva,
            eva_weights(4) | {"blocks.0.attn.k_bias": torch.zeros(32)},
            "unknown keys: blocks.0.attn.k_bias",
        ),
        (
            tiny_eva,
            eva_weights(4) | {"cls_token": torch.zeros(1, 1, 8)},
            r"cls_token \(1, 1, 8\) here \(1, 1, 32\)",
        ),
        (tiny_eva, clip_weights(4), "no known layout .*class_embedding"),
        (tiny_clip, eva_weights(4), "no known layout .*blocks.0.attn.q_bias"),
        (tiny_clip, without("ln_pre.bias", clip_weights(4)), "1 missing: norm_pre.bias"),
        (tiny_clip, clip_weights(4) | {"ln_mid.bias": torch.zeros(2)}, "unknown keys: ln_mid.bias"),
        (
            tiny_clip,
            clip_weights(4) | {"positional_embedding": torch.zeros(4, 32)},
            r"pos_embed \(1, 4, 32\)",
        ),
        (tiny_clip, clip_weights(6), "unexpected: blocks.4."),
    ],
)
def test_a_file_that_does_not_fit_names_its_keys(tmp_path: Path, build, file: dict, named: str) -> None:
    save_file(file, tmp_path / "weights.safetensors")
    encoder = build()
    before = encoder.model.blocks[0].mlp.fc1.weight.clone()
    with pytest.raises(CheckpointError, match=named) as caught:
        encoder.load_pretrained(str(tmp_path / "weights.safetensors"))
    assert "weights.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(before, encoder.model.blocks[0].mlp.fc1.weight)


def test_half_of_a_fused_matrix(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    state = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).state_dict()
    [key] = [key for key in state if key.endswith("layers.1.self_attn.k_proj.bias")]
    save_file(without(key, state), tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match=r"only some of .* blocks\.1\.attn\.qkv\.bias"):
        tiny_clip().load_pretrained(str(tmp_path / "clip.safetensors"))


def test_absent_and_harmful_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        tiny_eva().load_pretrained(str(tmp_path / "nowhere.pth"))

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "harmful.pth").write_bytes(pickle.dumps({"cls_token": Harm()}))
    with pytest.raises(CheckpointError, match=r"harmful\.pth"):
        tiny_eva().load_pretrained(str(tmp_path / "harmful.pth"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("build", "weights", "key", "align_corners"),
    [(tiny_eva, eva_weights, "pos_embed", False), (tiny_clip, clip_weights, "positional_embedding", True)],
)
def test_position_embeddings_of_another_size(
    tmp_path: Path, build, weights, key: str, align_corners: bool
) -> None:
    file = weights(4, grid=4)
    save_file(file, tmp_path / "weights.safetensors")
    encoder = build(image_size=98)
    encoder.load_pretrained(str(tmp_path / "weights.safetensors"))
    positions = file[key].reshape(17, 32)
    grid = positions[1:].T.reshape(1, 32, 4, 4)
    expected = interpolate(grid, size=(7, 7), mode="bicubic", align_corners=align_corners)
    loaded = encoder.model.pos_embed[0]
    assert torch.equal(loaded[0], positions[0])
    torch.testing.assert_close(loaded[1:], expected[0].flatten(1).T, atol=1e-6, rtol=0)
    assert encoder(torch.randn(1, 3, 98, 98)).shape == (1, 50, 32)


def test_interpolating_to_the_same_grid_changes_nothing() -> None:
    positions = torch.randn(1, 17, 8)
    assert interpolate_positions(positions, (4, 4), num_prefix=1, align_corners=False) is positions


def test_hub_weights_come_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        def state_dict(self) -> dict[str, Tensor]:
            return eva_weights(4) | {"norm.weight": torch.ones(32), "head.bias": torch.ones(5)}

    encoder = tiny_eva()
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or Hub())
    encoder.load_pretrained(True)
    assert asked == [(eva.HUB_NAME, {"pretrained": True})]
    assert torch.equal(encoder.model.cls_token, eva_weights(4)["cls_token"])


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_clip()

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CheckpointError, match=r"clip_L: .*Name or service not known.*local file") as caught:
        encoder.load_pretrained(True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [eva.HUB_NAME, clip.HUB_NAME])
def test_timm_has_the_named_weights(name: str) -> None:
    assert name in timm.list_pretrained()
