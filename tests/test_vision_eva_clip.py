"""EVA-CLIP and CLIP against slow versions, against transformers, and at full size on the meta device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lavis_lite  # noqa: F401  # declares the encoders
from lavis_lite.models.vision.clip import build_clip
from lavis_lite.models.vision.eva import build_eva
from lavis_lite.models.vision.timm_features import TimmFeatures
from lavis_lite.models.vision.tower import build_vision_tower

WIDTH, HEADS, MLP = 32, 4, 48


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One image's heads one after the other, rows one by one."""
    size = q.shape[-1] // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = [[float(a @ b) / math.sqrt(size) for b in k[:, part]] for a in q[:, part]]
        heads.append(torch.tensor(scores).softmax(-1) @ v[:, part])
    return torch.cat(heads, -1)


def patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for top in range(0, image.shape[1], 14):
        for left in range(0, image.shape[2], 14):
            window = image[:, top : top + 14, left : left + 14]
            row = torch.stack([(window * kernel).sum() for kernel in weight])
            rows.append(row if bias is None else row + bias)
    return torch.stack(rows)


def slow_eva(w: Mapping[str, Tensor], image: Tensor, num_blocks: int) -> Tensor:
    """EVA's blocks on LAVIS's names: no key bias, exact GELU, eps 1e-6, no norm at either end."""
    x = patches(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    for n in range(num_blocks):
        b = {
            key.removeprefix(f"blocks.{n}."): value
            for key, value in w.items()
            if key.startswith(f"blocks.{n}.")
        }
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"], 1e-6)
        to_q, to_k, to_v = b["attn.qkv.weight"].chunk(3)
        y = attention(y @ to_q.T + b["attn.q_bias"], y @ to_k.T, y @ to_v.T + b["attn.v_bias"])
        x = x + y @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return x


def slow_clip(w: Mapping[str, Tensor], image: Tensor, num_blocks: int) -> Tensor:
    """CLIP's blocks on OpenAI's names: norm before the blocks, QuickGELU, eps 1e-5, no norm behind."""
    x = torch.cat([w["class_embedding"][None], patches(image, w["conv1.weight"], None)])
    x = layer_norm(x + w["positional_embedding"], w["ln_pre.weight"], w["ln_pre.bias"], 1e-5)
    for n in range(num_blocks):
        prefix = f"transformer.resblocks.{n}."
        b = {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}
        y = layer_norm(x, b["ln_1.weight"], b["ln_1.bias"], 1e-5)
        y = attention(*(y @ b["attn.in_proj_weight"].T + b["attn.in_proj_bias"]).chunk(3, -1))
        x = x + y @ b["attn.out_proj.weight"].T + b["attn.out_proj.bias"]
        y = layer_norm(x, b["ln_2.weight"], b["ln_2.bias"], 1e-5)
        y = y @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    return x


def eva_weights(num_blocks: int, grid: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A random file in the layout of LAVIS's eva_vit_g.pth, tiny."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid * grid, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for n in range(num_blocks):
        block = {
            **{f"{norm}.{kind}": (WIDTH,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
            "attn.q_bias": (WIDTH,),
            "attn.v_bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "mlp.fc1.weight": (MLP, WIDTH),
            "mlp.fc1.bias": (MLP,),
            "mlp.fc2.weight": (WIDTH, MLP),
            "mlp.fc2.bias": (WIDTH,),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return {key: torch.randn(shape, generator=draw) * 0.2 for key, shape in shapes.items()}


def clip_weights(num_blocks: int, grid: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A random file in the layout of LAVIS's clip_vit_L.pth, OpenAI's visual tower, tiny."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (1 + grid * grid, WIDTH),
        "conv1.weight": (WIDTH, 3, 14, 14),
        "proj": (WIDTH, 16),
    }
    shapes |= {f"{norm}.{kind}": (WIDTH,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for n in range(num_blocks):
        block = {
            **{f"{norm}.{kind}": (WIDTH,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": (4 * WIDTH,),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
        }
        shapes |= {f"transformer.resblocks.{n}.{key}": shape for key, shape in block.items()}
    return {key: torch.randn(shape, generator=draw) * 0.2 for key, shape in shapes.items()}


def tiny_eva(image_size: int = 28, depth: int = 4) -> TimmFeatures:
    return build_eva(image_size=image_size, width=WIDTH, depth=depth, num_heads=HEADS, mlp_width=MLP).eval()


def tiny_clip(image_size: int = 28, depth: int = 4) -> TimmFeatures:
    return build_clip(image_size=image_size, width=WIDTH, depth=depth, num_heads=HEADS).eval()


def test_eva_equals_the_slow_version(tmp_path: Path) -> None:
    weights = eva_weights(num_blocks=4)
    torch.save(weights, tmp_path / "eva_vit_g.pth")
    encoder = tiny_eva()
    encoder.load_pretrained(str(tmp_path / "eva_vit_g.pth"))
    images = torch.randn(2, 3, 28, 28)
    expected = torch.stack([slow_eva(weights, image, num_blocks=3) for image in images])
    assert encoder(images).shape == (2, 5, WIDTH)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)


def test_clip_equals_the_slow_version(tmp_path: Path) -> None:
    weights = clip_weights(num_blocks=4)
    torch.save(weights, tmp_path / "clip_vit_L.pth")
    encoder = tiny_clip()
    encoder.load_pretrained(str(tmp_path / "clip_vit_L.pth"))
    images = torch.randn(2, 3, 28, 28)
    expected = torch.stack([slow_clip(weights, image, num_blocks=3) for image in images])
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("encoder", "eps"), [(tiny_eva, 1e-6), (tiny_clip, 1e-5)])
def test_norms(encoder, eps: float) -> None:
    norms = [module for module in encoder().modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("whole", [False, True])
def test_clip_equals_transformers(tmp_path: Path, whole: bool) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "image_size": 28,
        "patch_size": 14,
    }
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = CLIPModel(CLIPConfig(vision_config=shape, text_config={**text, "vocab_size": 50})).eval()
        tower = model.vision_model
    else:
        model = tower = CLIPVisionModel(CLIPVisionConfig(**shape)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "m.safetensors"
    )
    encoder = tiny_clip()
    encoder.load_pretrained(str(tmp_path / "m.safetensors"))
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = tower(images, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "blocks", "width", "parameters"),
    [("eva_clip_g", 39, 1408, 985_894_528), ("clip_L", 23, 1024, 290_581_504)],
)
def test_full_size(name: str, blocks: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        tower = build_vision_tower({"name": name})
        features = tower(torch.empty(1, 3, 224, 224))
    assert features.shape == (1, 257, width)
    assert tower.num_features == width
    assert tower.encoder.num_layers == blocks == len(tower.encoder.model.blocks)
    assert sum(p.numel() for p in tower.parameters()) == parameters
    # The number by hand: patches, class token, positions; patch bias (EVA) or norm (CLIP); the blocks.
    mlp, qkv_bias, start = (6144, 2, 1) if name == "eva_clip_g" else (4096, 3, 2)
    block = width * (4 * width + qkv_bias + 1) + width * (2 * mlp + 1) + mlp + 4 * width
    assert parameters == width * (3 * 14 * 14 + 1 + 257 + start) + blocks * block


@pytest.mark.parametrize("name", ["eva_clip_g", "clip_L"])
@pytest.mark.parametrize(("image_size", "tokens"), [(364, 677), (490, 1226)])
def test_other_image_sizes(name: str, image_size: int, tokens: int) -> None:
    with torch.device("meta"):
        tower = build_vision_tower({"name": name, "image_size": image_size})
        assert tower(torch.empty(2, 3, image_size, image_size)).shape == (2, tokens, tower.num_features)
