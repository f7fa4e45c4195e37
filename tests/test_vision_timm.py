"""The `timm` encoder: any model by name, the second-last layer, class token kept, no final norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import lavis_lite  # noqa: F401  # declares the encoders
from lavis_lite.common.errors import CheckpointError, ConfigError, UnknownNameError
from lavis_lite.models.vision.timm_encoder import TimmEncoder
from lavis_lite.models.vision.tower import build_vision_tower, validate_vision_config


@pytest.mark.parametrize(
    ("model_name", "image_size", "tokens", "width"),
    [
        ("vit_base_patch16_siglip_224", None, 196, 768),
        ("vit_base_patch16_siglip_224.webli", 384, 576, 768),
        ("vit_small_patch14_dinov2.lvd142m", 224, 257, 384),
        ("vit_small_patch14_reg4_dinov2", 224, 261, 384),
        ("beit_base_patch16_224", None, 197, 768),
        ("convnext_atto", 256, 256, 160),
        ("resnet18", None, 196, 256),
        ("swin_tiny_patch4_window7_224", None, 196, 384),
        ("efficientnet_b0", None, 196, 112),
    ],
)
def test_shapes(model_name: str, image_size: int | None, tokens: int, width: int) -> None:
    size = image_size or 224
    with torch.device("meta"):
        tower = build_vision_tower({"name": "timm", "model_name": model_name, "image_size": image_size})
        assert tower(torch.empty(2, 3, size, size)).shape == (2, tokens, width)
    assert tower.num_features == width


@pytest.mark.parametrize("layer", [-2, 0, -1])
def test_features_are_a_block_s_output(tmp_path: Path, layer: int) -> None:
    whole = timm.create_model("test_vit").eval()
    outputs = []
    whole.blocks[layer].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    encoder = TimmEncoder(model_name="test_vit", layer=layer).eval()
    encoder.load_pretrained(str(tmp_path / "vit.safetensors"))
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        whole(images)
        torch.testing.assert_close(encoder(images), outputs[0], atol=1e-6, rtol=1e-6)
    assert encoder.num_layers == len(encoder.model.blocks) == range(len(whole.blocks))[layer] + 1


def test_a_convnet_gives_its_grid_row_by_row(tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet").eval()
    stages = []
    whole.layer3.register_forward_hook(lambda module, inputs, output: stages.append(output))
    save_file(whole.state_dict(), tmp_path / "resnet.safetensors")
    encoder = TimmEncoder(model_name="test_resnet").eval()
    encoder.load_pretrained(str(tmp_path / "resnet.safetensors"))
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        whole(images)
        features = encoder(images)
    _, width, rows, columns = stages[0].shape
    assert features.shape == (1, rows * columns, width)
    torch.testing.assert_close(features[0, columns + 1], stages[0][0, :, 1, 1])


def test_a_file_of_another_size_is_interpolated(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit")
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    encoder = TimmEncoder(model_name="test_vit", image_size=224)
    encoder.load_pretrained(str(tmp_path / "vit.safetensors"))
    grid = whole.pos_embed[:, 1:].reshape(1, 10, 10, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    torch.testing.assert_close(encoder.model.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    save_file(
        timm.create_model("test_vit").state_dict() | {"stray": torch.ones(1)}, tmp_path / "vit.safetensors"
    )
    with pytest.raises(CheckpointError, match="1 unexpected: stray"):
        TimmEncoder(model_name="test_vit").load_pretrained(str(tmp_path / "vit.safetensors"))


def test_hub_weights_come_with_the_size_set(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(model_name="test_vit.r160_in1k", image_size=64)
    create, hub = timm.create_model, []

    def pretend(name: str, *, pretrained: bool, **options: object) -> torch.nn.Module:
        assert pretrained
        hub.append(create(name, **options))
        return hub[0]

    monkeypatch.setattr(timm, "create_model", pretend)
    encoder.load_pretrained(True)
    assert torch.equal(encoder.model.blocks[0].mlp.fc1.weight, hub[0].blocks[0].mlp.fc1.weight)
    assert torch.equal(encoder.model.pos_embed, hub[0].pos_embed)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (
            {"model_name": "vit_base_patch16_siglip_22"},
            UnknownNameError,
            "did you mean 'vit_base_patch16_siglip_224'",
        ),
        ({"model_name": "test_vit.webli"}, UnknownNameError, "there are: test_vit.r160_in1k"),
        ({}, ConfigError, "missing ve.model_name"),
        ({"model_name": "test_vit", "image_sise": 64}, ConfigError, "did you mean 'image_size'"),
        ({"model_name": "test_vit", "layer": "last"}, ConfigError, "ve.layer: expected int"),
    ],
)
def test_validation(cfg: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate_vision_config({"name": "timm", **cfg}, "ve")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"layer": 6}, r"has 6 \(-6 to 5\)"),
        ({"image_size": 100}, "not a multiple of the patch size 16; nearest: 96 or 112"),
    ],
)
def test_building_errors(cfg: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmEncoder(model_name="test_vit", **cfg)


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ConfigError, match="images are 128x160, the encoder wants 160x160"):
        TimmEncoder(model_name="deit_tiny_patch16_224", image_size=160)(torch.randn(1, 3, 128, 160))
