"""The tower: frozen and trained, precision, checkpointing, layer-wise decay, and its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_vision_eva_clip import tiny_eva
from torch import Tensor, nn

import lavis_lite
from lavis_lite.common.errors import ConfigError, UnknownNameError
from lavis_lite.models.vision.tower import VisionTower, build_vision_tower, validate_vision_config

IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


class Patches(nn.Module):
    """A user's encoder: all kinds of layers, dropout, a weight of its own, no optional methods."""

    def __init__(self, *, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.num_features = width
        self.patches = nn.Conv2d(3, width, 7, 7)
        self.norm = nn.BatchNorm2d(width)
        self.layer = nn.TransformerEncoderLayer(width, heads, 32, dropout=0.5, batch_first=True)
        self.own = nn.Parameter(torch.randn(width, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.norm(self.patches(images)).flatten(2).transpose(1, 2)) @ self.own


lavis_lite.registry.register_vision_encoder("test_patches")(Patches)


class Saved:
    """Bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.bytes += tensor.nbytes
        return tensor

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_frozen_builds_no_graph_and_keeps_nothing(precision: str) -> None:
    tower = VisionTower(tiny_eva(), precision=precision).train()
    with Saved() as saved:
        features = tower(IMAGES)
    assert saved.bytes == 0
    assert not features.requires_grad and features.grad_fn is None
    assert features.dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    # What follows is trained: the features can be its input.
    norm = nn.LayerNorm(tower.num_features)
    norm(features).sum().backward()
    assert norm.bias.grad is not None


def test_frozen_stays_in_eval_mode() -> None:
    tower = VisionTower(Patches())
    whole = nn.Sequential(tower, nn.Dropout()).train()
    assert whole[1].training
    assert not any(module.training for module in tower.modules())
    statistics = tower.encoder.norm.running_mean.clone()
    assert torch.equal(tower(IMAGES), tower(IMAGES))
    assert torch.equal(statistics, tower.encoder.norm.running_mean)


def test_trained_switches_modes() -> None:
    tower = VisionTower(Patches(), freeze=False).train()
    assert not torch.equal(tower(IMAGES), tower(IMAGES))
    tower.eval()
    assert torch.equal(tower(IMAGES), tower(IMAGES))


@pytest.mark.parametrize("build", [tiny_eva, Patches])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_low_precision(build, precision: str, tolerance: float) -> None:
    torch.manual_seed(0)
    encoder = build().eval()
    with torch.no_grad():
        expected = encoder(IMAGES)
    tower = VisionTower(encoder, precision=precision)
    features = tower(IMAGES)
    error = (features - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    matrices = [module.weight for module in tower.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert {weight.dtype for weight in matrices} == {tower.dtype} != {torch.float32}


def test_surrounding_autocast_does_not_reach_a_frozen_tower() -> None:
    tower = VisionTower(tiny_eva())
    expected = tower(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower(IMAGES), expected)


def test_surrounding_autocast_decides_for_a_trained_tower() -> None:
    tower = VisionTower(tiny_eva(), freeze=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = tower(IMAGES)
    assert features.dtype is torch.float32
    assert not torch.equal(features, tower(IMAGES))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


def test_half_precision_images_are_taken() -> None:
    assert VisionTower(tiny_eva())(IMAGES.half()).dtype is torch.float32


def test_checkpointing_saves_memory_and_gives_the_same_gradients() -> None:
    encoder = tiny_eva()
    gradients, kept = [], []
    for grad_checkpointing in (False, True):
        tower = VisionTower(encoder, freeze=False, grad_checkpointing=grad_checkpointing)
        tower.zero_grad()
        with Saved() as saved:
            features = tower(IMAGES)
        features.square().sum().backward()
        kept.append(saved.bytes)
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert kept[1] < kept[0] / 2


def test_layer_wise_decay() -> None:
    tower = VisionTower(tiny_eva(), freeze=False)
    scales = {name: tower.lr_scale(name, 0.5) for name, _ in tower.named_parameters()}
    assert scales["encoder.model.blocks.2.mlp.fc2.bias"] == 0.5
    assert scales["encoder.model.blocks.1.attn.q_bias"] == 0.5**2
    assert scales["encoder.model.blocks.0.norm1.weight"] == 0.5**3
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {scales[f"encoder.model.{name}"] for name in stem} == {0.5**4}
    assert tower.lr_scale("encoder.model.cls_token", 1.0) == 1.0


def test_an_encoder_without_layers_decays_as_a_whole() -> None:
    tower = VisionTower(Patches(), freeze=False)
    assert {tower.lr_scale(name, 0.5) for name, _ in tower.named_parameters()} == {0.5}


def test_config_to_tower() -> None:
    cfg = {
        "name": "test_patches",
        "width": 8,
        "freeze": False,
        "pretrained": False,
        "grad_checkpointing": False,
    }
    tower = build_vision_tower(cfg)
    assert tower.num_features == 8 and not tower.freeze
    assert tower(IMAGES).shape == (2, 16, 8)
    tower.load_pretrained()


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ({"name": "eva_clip_h"}, UnknownNameError, r"ve\.name: unknown .*did you mean 'eva_clip_g'"),
        ({}, ConfigError, r"ve\.name: give an encoder's name: .*clip_L"),
        (None, ConfigError, "ve: expected keys and values"),
        ({"name": "test_patches", "widht": 8}, ConfigError, r"'ve\.widht'; did you mean 'width'"),
        ({"name": "test_patches", "freez": True}, ConfigError, r"'ve\.freez'; did you mean 'freeze'"),
        ({"name": "test_patches", "width": "8"}, ConfigError, r"ve\.width: expected int"),
        ({"name": "test_patches", "freeze": "yes"}, ConfigError, r"ve\.freeze: expected bool"),
        ({"name": "test_patches", "precision": "half"}, ConfigError, r"ve\.precision: .*fp32, bf16, fp16"),
        ({"name": "test_patches", "precision": "fp16", "freeze": False}, ConfigError, "keeps fp32 weights"),
        ({"name": "eva_clip_g", "depth": 3}, ConfigError, r"unknown key 've\.depth'"),
    ],
)
def test_mistakes_in_the_config(cfg: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        validate_vision_config(cfg, "ve")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pretrained": True}, "'test_patches' has no load_pretrained"),
        ({"pretrained": "weights.pth"}, "'test_patches' has no load_pretrained"),
        ({"grad_checkpointing": True}, "'test_patches' has no set_grad_checkpointing"),
    ],
)
def test_optional_methods_that_are_asked_for(extra: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_vision_tower({"name": "test_patches", **extra})


@pytest.mark.parametrize("image_size", [0, 13, 230])
def test_image_sizes_that_do_not_fit(image_size: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size {image_size} is not a multiple of the patch size 14"):
        build_vision_tower({"name": "eva_clip_g", "image_size": image_size})


class Widthless(nn.Conv2d):
    pass


class Grid(nn.Conv2d):
    num_features = 4


class WrongWidth(Grid):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2)


class Several(Grid):
    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (super().forward(images),)


class FloatWidth(nn.Conv2d):
    num_features = 4.0


def test_a_reserved_keyword() -> None:
    @lavis_lite.registry.register_vision_encoder("test_reserved")
    def reserved(pretrained: bool = False) -> nn.Module:
        return Patches()

    with pytest.raises(ConfigError, match="takes a keyword 'pretrained', which is the tower's"):
        validate_vision_config({"name": "test_reserved"}, "ve")


@pytest.mark.parametrize("kind", [Widthless, FloatWidth, Grid, WrongWidth, Several, None])
def test_an_encoder_that_breaks_the_contract(kind: type[nn.Conv2d] | None) -> None:
    with pytest.raises(ConfigError, match=r"encoder 'mine' .*\[B, P, D\]"):
        VisionTower(kind(3, 4, 7, 7) if kind else "no module", name="mine")(IMAGES)


def test_importing_the_package_imports_no_timm() -> None:
    code = "import sys, lavis_lite; lavis_lite.registry.names('vision_encoder'); print('timm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
