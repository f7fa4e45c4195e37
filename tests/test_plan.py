"""Plans of memory against real steps, and what the command says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generative_helpers import tiny_generative_config

from lavis_lite.commands.plan import parse_memory, plan_main
from lavis_lite.common.config import Config, load_config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.common.sizes import parse_bytes
from lavis_lite.models.blocks import transformer_blocks
from lavis_lite.parallel import auto
from lavis_lite.parallel.auto import process_memory
from lavis_lite.runners.features import check_storable
from lavis_lite.runners.planning.account import Planner, Target, largest_batch
from lavis_lite.runners.planning.proposals import _settings, _smaller_batch, propose
from lavis_lite.runners.planning.shapes import Shape, WordTokens, frames_of, image_size_of, offline_section
from lavis_lite.runners.planning.trace import Block, Book

REPOSITORY = Path(__file__).resolve().parent.parent
STAGE1 = REPOSITORY / "projects/blip2/pretrain_stage1.yaml"
CPU = Target("cpu", None, 0)
RECOMPUTING = "model.language_model.grad_checkpointing=true"
# A plan follows every operation of every layer; two of them show all there is to show.
SHALLOW = ["model.qformer.num_layers=2"]


def shallow(options: Sequence[str] = ()) -> Config:
    """Stage 1 with few layers."""
    return load_config(STAGE1, [*SHALLOW, *options])


@pytest.fixture(scope="module")
def stage1() -> Planner:
    return Planner(shallow(), CPU)


def real_shape(cfg: Config) -> Shape:
    """The same model with storage."""
    model_class = registry.get_model_class(cfg.model["arch"])
    with offline_section(model_class, cfg.model) as section:
        model = model_class.from_config(section).train()
    if hasattr(model, "language_model"):
        model.language_model.tokenizer = WordTokens(model.language_model.model.config)
    return Shape(model, contextlib.nullcontext(), image_size_of(cfg, model), model.max_txt_len)  # type: ignore[arg-type]


def kept_bytes(shape: Shape, batch: int) -> int:
    """What a real forward keeps for its backward, by torch's own hooks: unique storages that are no parameter's."""
    own = {p.untyped_storage().data_ptr() for p in (*shape.model.parameters(), *shape.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    samples = shape.samples(batch)
    samples["video" if shape.frames else "image"].normal_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shape.model(samples)["loss"]
    return sum(kept.values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pretrain_stage1", []),
        ("pretrain_stage2", []),
        ("pretrain_stage2", [RECOMPUTING]),
        ("pretrain_stage2_t5", [RECOMPUTING]),
        ("caption_ft", []),
        ("caption_ft", [RECOMPUTING, "model.vision_encoder.grad_checkpointing=true"]),
    ],
)
def test_what_a_forward_keeps_is_what_torch_saves(name: str, options: list[str]) -> None:
    cfg = load_config(REPOSITORY / f"projects/blip2/{name}.yaml", options)
    planner = Planner(cfg, CPU)
    plan = planner.plan(16)
    planned = sum(part.activations for part in plan.parts)
    saved = kept_bytes(real_shape(cfg), 16)
    # At the peak the forward's results that nothing keeps are still there: losses, the images, the last logits. Blocks
    # that recompute reach it in the backward pass, when the first of what was kept is gone.
    assert saved * (0.95 if options else 0.97) < planned < saved * 1.15, (saved, planned)


def test_parameters_gradients_and_optimizer_are_counted(stage1: Planner) -> None:
    plan = stage1.plan(8)
    model = real_shape(stage1.cfg).model
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    parts = {part.name: part for part in plan.parts}
    assert not parts["image encoder"].trained and parts["image encoder"].optimizer == 0
    assert sum(part.gradients_whole for part in plan.parts) == trained
    assert trained * 2 <= sum(part.optimizer for part in plan.parts) <= trained * 2 + 4000
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert sum(part.parameters for part in plan.parts) == trained + frozen + buffers


def test_activations_grow_with_the_batch_in_a_straight_line(stage1: Planner) -> None:
    small, middle, large = (stage1.plan(batch).tensors for batch in (8, 16, 24))
    assert large - middle == pytest.approx(middle - small, rel=0.1)


def test_other_processes_texts_and_features_need_memory(stage1: Planner) -> None:
    alone = stage1.plan(8)
    four = Planner(stage1.cfg, replace(CPU, world_size=4)).plan(8)
    heads = [sum(part.activations for part in plan.parts) for plan in (alone, four)]
    assert four.strategy == "ddp" and heads[1] > heads[0]
    trained = [part for part in four.parts if part.trained]
    assert all(part.gradients >= part.gradients_whole for part in trained)  # DDP's buckets


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_stored_features_leave_the_encoder_s_weights(stage1: Planner, precision: str) -> None:
    cfg = shallow([f"run.features.precision={precision}"])
    stored = Planner(cfg, replace(CPU, stored_features=True)).plan(8)
    before, after = ({part.name: part for part in p.parts} for p in (stage1.plan(8), stored))
    assert after["image encoder"].parameters == before["image encoder"].parameters
    assert after["Q-Former"].activations == before["Q-Former"].activations
    assert after["inputs"].activations < before["inputs"].activations


def test_every_frame_of_a_clip_is_planned() -> None:
    cfg = load_config(REPOSITORY / "projects/blip2/video_ft.yaml")
    planner = Planner(cfg, CPU)
    with planner.shape.mode:
        assert planner.shape.samples(2)["video"].shape == (2, 4, 3, 64, 64)
    planned = sum(part.activations for part in planner.plan(8).parts)
    shape = replace(real_shape(cfg), frames=4)
    assert kept_bytes(shape, 8) * 0.97 < planned < kept_bytes(shape, 8) * 1.25


def test_clips_without_a_processor_have_their_builder_s_frames() -> None:
    cfg = load_config(REPOSITORY / "projects/blip2/video_ft.yaml")
    own = {"builder": "video_vqa", "vis_processor": {"train": {"name": "video", "num_frames": 5}}}
    assert frames_of(replace(cfg, datasets={"clips": {"builder": "video_vqa"}})) == 8
    assert frames_of(replace(cfg, datasets={"clips": {"builder": "video_vqa"}, "own": own})) == 8
    assert frames_of(replace(cfg, datasets={"own": own})) == 5
    assert frames_of(shallow()) is None


def test_sharding_leaves_each_process_its_share(stage1: Planner) -> None:
    four = Planner(stage1.cfg, replace(CPU, world_size=4))
    whole, sharded = four.plan(8), four.for_strategy("fsdp2").plan(8)
    for before, after in zip(whole.parts, sharded.parts, strict=True):
        assert after.optimizer == pytest.approx(before.optimizer / 4, abs=4)
    assert sharded.gathered > 0
    oss = four.for_strategy("fairscale").plan(8)
    trained = {part.name: part.parameters for part in oss.parts if part.trained}
    assert trained == {part.name: part.parameters for part in whole.parts if part.trained}
    with pytest.raises(ConfigError, match="no plan for 'zero9'; known: single, ddp"):
        four.for_strategy("zero9")


@pytest.mark.parametrize(("limit", "chosen"), [(None, "ddp"), (10**11, "ddp"), (10**6, "fsdp2")])
def test_auto_is_what_the_run_would_choose(stage1: Planner, limit: int | None, chosen: str) -> None:
    four = Planner(stage1.cfg, replace(CPU, world_size=4, limit=limit))
    assert four.strategy == chosen


def test_auto_takes_its_share_of_a_gpu_as_the_run_does(
    stage1: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever --usable leaves of it for the rest of the plan."""
    card = type("Card", (), {"total_memory": 4 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    there = process_memory(torch.device("cuda"))
    assert there is not None and there < 4 * 2**30
    monkeypatch.setattr(auto, "SHARE_FOR_STATE", stage1._needed() / (there - 2))
    assert auto.choose(stage1._needed(), there, 4) == "ddp"
    assert auto.choose(stage1._needed(), there - 4, 4) == "fsdp2"
    for usable in ("0.9", "1"):
        arguments = ["--gpu-memory", "4GB", "--usable", usable, "--world-size", "4", "--json"]
        plan_main(["--cfg-path", str(STAGE1), *arguments, "--options", *SHALLOW])
        assert json.loads(capsys.readouterr().out)["strategy"] == "ddp"


def test_sharding_and_quantizing_are_not_proposed_together() -> None:
    options = ["model.language_model.quantize=none"]
    path = REPOSITORY / "projects/blip2/caption_ft.yaml"
    target = replace(CPU, device_type="cuda", world_size=2, strategy="ddp", limit=1)
    planner = Planner(load_config(path, options), target)
    remedy = propose(lambda more: load_config(path, [*options, *more]), planner, planner.plan(8))
    assert not any("quantize" in option for option in remedy.together)
    assert any("run.strategy" in option for option in remedy.together)
    with pytest.raises(ConfigError, match="can't shard a quantized"):
        Planner(load_config(path, ["model.language_model.quantize=int8"]), replace(target, strategy="fsdp2"))


@pytest.mark.parametrize(("share", "accumulated"), [(0.7, True), (0.4, False)])
def test_a_batch_in_parts_is_planned_as_it_will_run(share: float, accumulated: bool) -> None:
    """With the gradients that stay from part to part; where those leave no room, a part alone."""
    options = ["model.vision_encoder.freeze=false"]
    cfg = load_config(STAGE1, options)
    whole = Planner(cfg, CPU).plan(8).total
    target = replace(CPU, limit=round(whole * share))
    planner = Planner(cfg, target)
    found = _smaller_batch(planner, planner.plan(8))
    assert found is not None
    proposal, smaller = found
    assert any("accum_grad_iters" in option for option in proposal.options) is accumulated
    again = Planner(load_config(STAGE1, [*options, *proposal.options]), target).plan()
    assert again.total == smaller.total and again.fits


def test_processes_share_the_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 8000 kB\n")
    cpu = torch.device("cpu")
    assert process_memory(cpu, tmp_path / "meminfo", processes=8) == 1000 * 1024


def test_fsdp2_keeps_the_q_former_whole_through_a_step(stage1: Planner) -> None:
    target = replace(CPU, world_size=4, strategy="fsdp2", precision="bf16")
    plan = Planner(stage1.cfg, target).plan(8)
    qformer = next(part for part in plan.parts if part.name == "Q-Former")
    assert plan.gathered >= qformer.gradients_whole and plan.copies > 0
    cfg = shallow(["run.accum_grad_iters=2"])
    accumulated = Planner(cfg, target).plan(8)
    for part in accumulated.parts:
        assert part.gradients >= part.gradients_whole


@pytest.mark.parametrize(("accumulated", "times"), [(1, 2), (2, 1)])
def test_fsdp2_holds_a_block_s_gradients_whole_until_they_are_exchanged(accumulated: int, times: int) -> None:
    """Beside a buffer with those of the block before; accumulated ones are whole anyway."""
    options = ["model.vision_encoder.freeze=false", f"run.accum_grad_iters={accumulated}"]
    target = replace(CPU, world_size=4, strategy="fsdp2")
    planner = Planner(shallow(options), target)
    blocks = transformer_blocks(planner.shape.model.visual_encoder)
    largest = max(sum(4 * p.numel() for p in block.parameters()) for block in blocks)
    assert planner._exchanged() == times * largest
    assert planner.plan(8).temporaries >= times * largest


def test_fsdp2_exchanges_all_that_lies_outside_of_blocks_in_one_buffer(stage1: Planner) -> None:
    """It outweighs a small batch's activations, which are gone by then."""
    cfg = shallow(["model.max_txt_len=4"])
    planner = Planner(cfg, replace(CPU, world_size=4, strategy="fsdp2"))
    plan = planner.plan(1)
    outside = sum(part.gradients_whole for part in plan.parts)
    assert planner._exchanged() == 0 and planner._exchanged_at_the_end() == outside
    assert plan.temporaries >= outside
    assert sum(part.gradients for part in plan.parts) >= outside


def test_fairscale_shards_only_frozen_blocks_of_one_type_and_only_on_cuda() -> None:
    target = replace(CPU, world_size=4, strategy="fairscale")
    for precision, device_type, shared in (
        ("fp32", "cuda", True),
        ("fp32", "cpu", False),
        ("bf16", "cuda", False),
    ):
        cfg = shallow([f"model.vision_encoder.precision={precision}"])
        planner = Planner(cfg, replace(target, device_type=device_type))
        plan, whole = planner.plan(8), planner.for_strategy("ddp").plan(8)
        assert (plan.parts[0].parameters < whole.parts[0].parameters) is shared, (precision, device_type)
        assert (plan.gathered > 0) is shared


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_fairscale_gathers_for_a_backward_pass_is_planned_as_whole(precision: str) -> None:
    """The language model's frozen blocks, which nothing gives back before their next forward pass."""
    options = [f"model.language_model.precision={precision}", "model.vision_encoder.precision=fp32"]
    cfg = load_config(REPOSITORY / "projects/blip2/pretrain_stage2.yaml", options)
    target = replace(CPU, device_type="cuda", world_size=4, strategy="fairscale")
    plan = Planner(cfg, target).plan(8)
    whole = Planner(cfg, replace(target, strategy="ddp")).plan(8)
    cut = {
        one.name
        for one, other in zip(plan.parts, whole.parts, strict=True)
        if one.parameters < other.parameters
    }
    assert cut == {"image encoder"}


def test_the_book_finds_the_peak_and_what_it_is_made_of() -> None:
    first, second = Block(10, "activation", "a"), Block(5, "gradient", "b")
    book = Book([(1, first), (1, second), (-1, first), (1, Block(7, "temporary", "a")), (-1, second)])
    assert book.peak() == (15, {("activation", "a"): 10, ("gradient", "b"): 5})
    assert book.peak({("activation", "a"): 0.0}) == (12, {("gradient", "b"): 5, ("temporary", "a"): 7})


@pytest.mark.parametrize(("limit", "expected"), [(1000, 90), (105, 0), (10**9, 10**8 - 10)])
def test_the_largest_batch_is_where_the_line_meets_the_limit(limit: int, expected: int) -> None:
    assert largest_batch(lambda batch: 100 + 10 * batch, limit, 3) == pytest.approx(expected, rel=0.01)


def test_the_largest_batch_is_tried_where_memory_grows_faster() -> None:
    def total(batch: int) -> int:
        return 100 + 10 * batch + batch * batch

    best = largest_batch(total, 1_000_000, 8)
    assert total(best) <= 1_000_000 and best > 900


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("16g", 2**34),
        ("40000MB", 40000 * 2**20),
        ("1TiB", 2**40),
    ],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "size"), [("16g", 16 * 10**9), ("1TiB", 2**40), ("24 GB", 24 * 10**9), (7, 7)]
)
def test_other_sizes_have_the_same_names(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size
    for wrong in ("lots", "1i", "1iB", "1Gi", "-1"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            parse_bytes(wrong)


def test_what_is_no_size_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan_main(["--cfg-path", str(STAGE1), "--gpu-memory", "lots"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --gpu-memory: 'lots' is no size; write e.g. 24GB\n"


def test_a_gpu_s_memory_is_not_all_usable(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cfg-path", str(STAGE1), "--gpu-memory", "4GB", "--json", "--options", *SHALLOW]
    for more, share in (([], 0.92), (["--usable", "0.5"], 0.5)):
        plan_main([*arguments, *more])
        assert json.loads(capsys.readouterr().out)["limit"] == round(4 * 2**30 * share)
    with pytest.raises(SystemExit):
        plan_main([*arguments, "--usable", "1.5"])
    assert capsys.readouterr().err == "error: --usable must be above 0 and at most 1, got 1.5\n"


def test_what_the_run_refuses_is_not_planned(stage1: Planner) -> None:
    with pytest.raises(ConfigError, match="'single' with 8 processes"):
        Planner(stage1.cfg, replace(CPU, world_size=8, strategy="single"))
    cfg = shallow(["run.strategy_options.cpu_ofload=true"])
    with pytest.raises(ConfigError, match=r"run\.strategy_options\.cpu_ofload.*cpu_offload"):
        Planner(cfg, replace(CPU, world_size=2, strategy="fsdp2"))
    with pytest.raises(ConfigError, match="with strategy auto"):
        Planner(cfg, replace(CPU, world_size=2))


@pytest.mark.parametrize(("device_type", "offloaded"), [("cuda", True), ("cpu", False)])
def test_what_is_offloaded_is_not_on_the_gpu(stage1: Planner, device_type: str, offloaded: bool) -> None:
    cfg = shallow(["run.strategy_options.cpu_offload=true"])
    target = replace(CPU, device_type=device_type, world_size=2, strategy="fsdp2")
    plain, plan = Planner(stage1.cfg, target).plan(8), Planner(cfg, target).plan(8)
    assert (plan.total < plain.total) is offloaded
    if offloaded:
        assert sum(part.optimizer for part in plan.parts) == 0 and plan.gathered == plain.gathered


def test_fairscale_s_recomputed_blocks_keep_no_activations() -> None:
    path = REPOSITORY / "projects/blip2/pretrain_stage2.yaml"
    target = replace(CPU, world_size=2, strategy="fairscale")
    plain = Planner(load_config(path), target)
    recomputing = Planner(load_config(path, ["run.strategy_options.checkpoint_blocks=true"]), target)
    kept = [
        next(part.activations for part in planner.plan(8).parts if part.name == "language model")
        for planner in (plain, recomputing, recomputing.for_strategy("ddp"))
    ]
    assert kept[1] < 0.8 * kept[0] and kept[2] >= kept[0]


def test_a_language_model_that_recomputes_is_planned_and_proposed() -> None:
    path = REPOSITORY / "projects/blip2/pretrain_stage2_t5.yaml"
    low = ["model.language_model.precision=bf16", "model.vision_encoder.precision=bf16"]

    def load(options: Sequence[str]) -> Config:
        return load_config(path, [*low, *options])

    target = replace(CPU, precision="bf16")
    planner, recomputing = Planner(load([]), target), Planner(load([RECOMPUTING]), target).plan(16)
    plain = planner.plan(16)
    kept = [
        next(part.activations for part in plan.parts if part.name == "language model")
        for plan in (plain, recomputing)
    ]
    assert kept[1] < 0.2 * kept[0]
    planner = Planner(load([]), replace(target, limit=recomputing.total))
    remedy = propose(load, planner, planner.plan(16))
    assert remedy.together == (RECOMPUTING,) and remedy.plan.fits
    assert remedy.proposals[0].saves == plain.total - recomputing.total


def test_a_frozen_encoder_s_features_may_be_stored(stage1: Planner) -> None:
    planner = Planner(stage1.cfg, replace(CPU, limit=1))
    remedy = propose(lambda more: shallow(more), planner, planner.plan(8))
    assert ("run.cache_features=true",) in [proposal.options for proposal in remedy.proposals]
    assert "run.cache_features=true" in remedy.together


def test_strategies_are_proposed_that_take_the_options_given() -> None:
    options = ["run.strategy_options.checkpoint_blocks=true"]
    for given, proposed in ((options, False), ([], True)):
        planner = Planner(shallow(given), replace(CPU, world_size=2, strategy="fairscale"))
        keys = {key for setting in _settings(planner) for key in setting.keys}
        assert ("run.strategy" in keys) is proposed


def test_a_run_that_does_not_fit_is_told_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--cfg-path",
        str(STAGE1),
        "--gpu-memory",
        "1.1GB",
        "--usable",
        "1",
        "--json",
        "--options",
        *SHALLOW,
    ]
    plan_main([*arguments, "run.precision=fp32"])
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and 0 < plan["largest_batch"] < 64
    remedy = plan["remedy"]
    assert remedy["fits"] and remedy["total"] <= plan["limit"]
    assert "run.precision=bf16" in [o for proposal in remedy["proposals"] for o in proposal["options"]]
    assert all(proposal["saves"] > 0 for proposal in remedy["proposals"])
    keys = [option.partition("=")[0] for option in remedy["together"]]
    assert len(keys) == len(set(keys))


def test_a_frozen_language_model_in_fp16_computes_in_fp16_whatever_surrounds(tmp_path: Path) -> None:
    section = tiny_generative_config(tmp_path, "opt", language_model={"precision": "fp16"})
    model = registry.get_model_class("blip2_opt").from_config(section)
    image = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model({"image": image, "text_input": ["a red dog", "a cat"]})["loss"]
        assert len(model.generate({"image": image}, num_beams=2, max_length=3)) == 2
    assert torch.isfinite(loss)


CLIPS = REPOSITORY / "projects/blip2/video_ft.yaml"
NO_SOURCES = ["model.pretrained=null", "model.qformer_text_from=null"]
STREAM = ["datasets.shapes_caption.builder=shards", "datasets.shapes_caption.train.samples=9"]
STREAM.append("datasets.shapes_caption.train.shards='pipe:cat {0..3}.tar'")


@pytest.mark.parametrize(
    ("path", "options", "stored"), [(STAGE1, [], True), (STAGE1, STREAM, False), (CLIPS, NO_SOURCES, False)]
)
def test_storing_features_is_proposed_where_a_run_could(
    path: Path, options: list[str], stored: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load_config(path, [*SHALLOW, *options])
    found = [option for setting in _settings(Planner(cfg, CPU)) for option in setting.options]
    assert ("run.cache_features=true" in found) is stored
    if not stored:
        with pytest.raises(SystemExit):
            plan_main(["--cfg-path", str(path), "--options", *SHALLOW, *options, "run.cache_features=true"])
        assert "has no picture files whose features could be stored" in capsys.readouterr().err


def test_clips_that_are_only_evaluated_on_do_not_keep_features_from_being_stored() -> None:
    clips = "datasets.clips={builder: video_text, train: null, val: {annotations: a.json, images: b}}"
    check_storable(load_config(STAGE1, [*SHALLOW, clips, "run.cache_features=true"]))


def test_a_dataset_of_ones_own_needs_no_builder_to_be_planned(tmp_path: Path) -> None:
    own = {"own": {"train": {"annotations": "a.json", "images": "b"}}}
    cfg = load_config(STAGE1, SHALLOW)
    assert Planner(replace(cfg, datasets=own), CPU).plan(2).total > 0
