"""The embedded world's image encoder, its pre-training, its data and its processors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavis_lite.common.config import load_config
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.worlds.shapes.encoder import WEIGHTS, ShapesViT
from lavis_lite.worlds.shapes.export import export_vit
from lavis_lite.worlds.shapes.probe import collect, object_features, probe
from lavis_lite.worlds.shapes.processors import ShapesImageEval, ShapesImageTrain
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import COLOURS, SHAPES, sample_scene
from lavis_lite.worlds.shapes.targets import ATTRIBUTES, scene_targets
from lavis_lite.worlds.shapes.vit_data import RenderedScenesBuilder
from lavis_lite.worlds.shapes.vit_pretrain import ShapesViTPretrain
from lavis_lite.worlds.shapes.vit_task import GATES

ROOT = Path(__file__).resolve().parent.parent
TINY = {"width": 32, "depth": 2, "num_heads": 2}


def batch(size: int = 4, split: str = "train") -> dict[str, Tensor]:
    dataset = RenderedScenesBuilder(name="scenes", train_rows=size, val_rows=size).build_datasets()[split]
    return dataset.collate([dataset.load(index, seed=index) for index in range(size)])


def test_encoder_fulfils_the_protocol() -> None:
    encoder = registry.get_vision_encoder_class("shapes_vit")(image_size=48, **TINY)
    assert encoder(torch.randn(2, 3, 48, 48)).shape == (2, 36, encoder.num_features)
    assert encoder.num_features == 32 and encoder.num_layers == 2
    ids = {name: encoder.layer_id(name) for name, _ in encoder.named_parameters()}
    assert ids["vit.pos_embed"] == 0 and ids["vit.patch_embed.proj.weight"] == 0
    assert {i for name, i in ids.items() if ".blocks." in name} == {1, 2}
    with pytest.raises(ConfigError, match="not a multiple"):
        ShapesViT(image_size=60)


def test_images_of_another_size_are_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"shapes_vit: images are 32x64, the encoder wants 64x64; set vision"
    ):
        ShapesViT()(torch.zeros(1, 3, 32, 64))


def test_encoder_has_the_size_it_claims() -> None:
    assert sum(p.numel() for p in ShapesViT().parameters()) == 1_222_528


def test_grad_checkpointing_runs_blocks_twice_and_changes_no_number() -> None:
    encoder = ShapesViT(**TINY).train()
    calls = []
    for block in encoder.vit.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    image = torch.randn(2, 3, 64, 64)
    found = []
    for recompute, passes in ((False, 1), (True, 2)):
        encoder.set_grad_checkpointing(recompute)
        encoder.zero_grad()
        calls.clear()
        features = encoder(image)
        features.square().sum().backward()
        assert len(calls) == passes * TINY["depth"]
        found.append([features.detach(), *(p.grad.clone() for p in encoder.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_shipped_weights_load_and_are_small() -> None:
    encoder = ShapesViT()
    before = encoder.vit.blocks[0].attn.qkv.weight.clone()
    encoder.load_pretrained(True)
    assert not torch.equal(before, encoder.vit.blocks[0].attn.qkv.weight)
    assert WEIGHTS.stat().st_size < 3_000_000
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights file"):
        ShapesViT().load_pretrained(str(tmp_path / "absent.safetensors"))
    with pytest.raises(CheckpointError, match="does not fit"):
        ShapesViT(**TINY).load_pretrained(True)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        ShapesViT().load_pretrained(str(tmp_path / "other.safetensors"))


@pytest.mark.slow
def test_shipped_weights_pass_the_gates() -> None:
    datasets = RenderedScenesBuilder(name="scenes", val_rows=1500, test_rows=600).build_datasets()
    encoder = ShapesViT()
    encoder.load_pretrained(True)
    encoder.eval()
    found = probe(
        *(collect(encoder, eval_loader(datasets[split], batch_size=100)) for split in ("val", "test"))
    )
    for name, gate in GATES.items():
        assert found[name] >= gate, found


def test_targets_name_the_object_of_every_patch() -> None:
    for index in range(20):
        scene = sample_scene(seed=0, split="train", index=index)
        labels = scene_targets(scene)
        assert labels["objects"].shape == (4, len(ATTRIBUTES))
        assert set(labels["cover"].tolist()) == set(range(len(scene.objects) + 1))
        for number, item in enumerate(scene.objects):
            shape, colour, size, cell = labels["objects"][number].tolist()
            assert (SHAPES[shape], COLOURS[colour], cell) == (item.shape, item.colour, item.cell)
            assert size == (item.size == "large")
            patches = (labels["cover"] == number + 1).nonzero()[:, 0]
            centre = torch.stack([patches % 8, patches // 8], 1).float().add(0.5).mean(0) / 8
            assert (centre - labels["centres"][number]).abs().max() < 0.08
        assert (labels["objects"][len(scene.objects) :] == -1).all()


def test_training_rows_are_new_scenes_in_every_epoch_and_reproducible() -> None:
    datasets = RenderedScenesBuilder(name="scenes").build_datasets()
    first, again, later = (datasets["train"].load(3, seed=seed)["image"] for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, later)
    fixed = [datasets["val"].load(3, seed=seed)["image"] for seed in (7, 8)]
    assert torch.equal(*fixed)
    state = torch.get_rng_state()
    datasets["train"].load(3, seed=7)
    assert torch.equal(state, torch.get_rng_state())


def test_pretraining_starts_at_chance_and_reaches_every_parameter() -> None:
    model = ShapesViTPretrain(full_fraction=1.0)
    losses = model(batch(8))
    for name, classes in (*ATTRIBUTES.items(), ("background", 5), ("cover", 2)):
        assert abs(losses[f"loss_{name}"].item() - math.log(classes)) < 0.6, name
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dropped_patches_are_empty_ones() -> None:
    model = ShapesViTPretrain(**TINY, keep_patches=40, full_fraction=0.0).train()
    cover = batch(8)["cover"]
    kept = model._choose_patches(cover)
    assert kept.shape == (8, 40)
    for row, chosen in zip(cover, kept, strict=True):
        assert len(set(chosen.tolist())) == 40
        assert (row[chosen] > 0).sum() == (row > 0).sum()
    assert model.eval()._choose_patches(cover).shape == (8, 64)


def test_object_features_are_means_over_an_objects_patches() -> None:
    samples = batch(3)
    features = torch.randn(3, 64, 5)
    pooled, labels = object_features(features, samples)
    row = 0
    for image in range(3):
        for number in range(4):
            if samples["objects"][image, number, 0] >= 0:
                expected = features[image, samples["cover"][image] == number + 1].mean(0)
                assert torch.allclose(pooled[row], expected, atol=1e-6)
                assert torch.equal(labels[row], samples["objects"][image, number])
                row += 1
    assert row == len(pooled)


def test_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(n, (400,), generator=generator) for n in ATTRIBUTES.values()], 1)
    features = torch.randn(400, 16, generator=generator)
    features[:, :6] += 6 * torch.nn.functional.one_hot(labels[:, 0], 6)
    found = probe((features[:300], labels[:300]), (features[300:], labels[300:]))
    assert found["shape"] > 0.97
    assert found["colour"] < 0.3


def test_export_round_trip(tmp_path: Path) -> None:
    model = ShapesViTPretrain(**TINY)
    save_file(model.trainable_state_dict(), tmp_path / "model.safetensors")
    written = export_vit(tmp_path / "model.safetensors", target=tmp_path / "vit.safetensors")
    encoder = ShapesViT(**TINY)
    encoder.load_pretrained(str(written))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name].half().float())
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no weights named encoder"):
        export_vit(tmp_path / "other.safetensors", target=tmp_path / "no.safetensors")


def test_the_recipe_is_a_valid_configuration() -> None:
    config = load_config(ROOT / "projects" / "shapes" / "pretrain_vit.yaml")
    assert config.model["arch"] == "shapes_vit_pretrain" and config.task["name"] == "shapes_probe"
    with pytest.raises(ConfigError, match="did you mean 'keep_patches'"):
        load_config(ROOT / "projects" / "shapes" / "pretrain_vit.yaml", ["model.keep_patch=3"])


def picture() -> Image.Image:
    return render(sample_scene(seed=0, split="train", index=1))


def test_processors_follow_torchs_generator_alone() -> None:
    train, evaluate = ShapesImageTrain(), ShapesImageEval()
    torch.manual_seed(0)
    first = train(picture())
    second = train(picture())
    torch.manual_seed(0)
    assert torch.equal(first, train(picture())) and not torch.equal(first, second)
    assert torch.equal(evaluate(picture()), evaluate(picture()))
    assert first.shape == evaluate(picture()).shape == (3, 64, 64) and first.dtype == torch.float32
    assert ShapesImageTrain.from_config({"image_size": 32})(picture().convert("L")).shape == (3, 32, 32)


def test_augmentation_moves_by_two_pixels_at_most_and_mirrors_nothing() -> None:
    plain = ShapesImageEval()(picture())
    train = ShapesImageTrain(brightness=0.0, tint=0.0, noise=0.0)
    moves = set()
    for _ in range(200):
        image = train(picture())
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.allclose(
                image[:, 4:-4, 4:-4], plain.roll((down, right), (1, 2))[:, 4:-4, 4:-4], atol=1e-5
            )
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) == 25


def test_pictures_are_normalised_to_about_zero_mean_and_unit_deviation() -> None:
    images = torch.stack(
        [ShapesImageTrain()(render(sample_scene(seed=0, split="train", index=i))) for i in range(100)]
    )
    assert images.mean().abs() < 0.15 and (images.std() - 1).abs() < 0.15
