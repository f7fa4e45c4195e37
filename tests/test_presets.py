"""Every configuration in the repository: valid, buildable in shape, and with the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis_lite.common.config import PRESETS, load_config, load_model_preset
from lavis_lite.common.registry import registry
from lavis_lite.models.language.loading import EMBEDDED

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECTS = sorted(path for path in (REPOSITORY / "projects").rglob("*.yaml") if not path.name.startswith("_"))
MODELS = sorted(path for path in (PRESETS / "models").rglob("*.yaml") if not path.name.startswith("_"))
PAPER = REPOSITORY / "projects/blip2/paper"

# method.md section 4: global batch over 16 GPUs, peak and lowest rate, warm-up, betas, layer-wise decay, pixels.
STAGE1 = {"vitg": 1680, "vitl": 2320}
STAGE2 = {"opt": 1920, "t5": 1520}
CAPTION_DECAY = {"opt2.7b": 1.0, "opt6.7b": 0.95, "flant5xl": 1.0}
# Of question answering, test-dev and test-std in per cent (section 7).
VQA_PUBLISHED = {"opt2.7b": (81.59, 81.74), "opt6.7b": (82.19, 82.30), "flant5xl": (81.55, 81.66)}
VQA_DECAY = {"opt2.7b": 0.95, "opt6.7b": 0.9, "flant5xl": 0.95}
GPUS = 16


def test_none_is_overlooked() -> None:
    assert len(PROJECTS) >= 67 and len(MODELS) >= 22


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: str(path.relative_to(REPOSITORY / "projects")))
def test_every_project_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    options = []
    if path.stem == "own_images":
        options = ["datasets.custom.train.annotations=captions.jsonl", "datasets.custom.train.images=photos"]
    load_config(path, options)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_model_can_be_built_in_shape(path: Path) -> None:
    preset = load_model_preset({"arch": path.parent.name, "model_type": path.stem})
    model_class = registry.get_model_class(path.parent.name)
    section = {**preset["model"], "arch": path.parent.name}
    name = section.get("language_model", {}).get("model_name")
    if name in EMBEDDED and not EMBEDDED[name].is_dir():
        pytest.skip("the embedded language models are not shipped yet")
    model_class.validate_config(section)
    if section.get("tokenizer") == "bert-base-uncased":
        section["tokenizer"] = "shapes"  # its files are not here; the vocabulary's size is all it changes
    with torch.device("meta"):
        model = model_class.from_config(section)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) > 0


@pytest.mark.parametrize("vit", STAGE1)
def test_stage_1_has_the_papers_numbers(vit: str) -> None:
    run = load_config(PAPER / f"pretrain_stage1_{vit}.yaml").run
    assert run.batch_size_train * GPUS == STAGE1[vit]
    assert (run.max_steps, run.init_lr, run.warmup_steps) == (250_000, 1e-4, 2000)
    assert (run.betas, run.weight_decay) == ((0.9, 0.98), 0.05)


@pytest.mark.parametrize("vit", STAGE1)
@pytest.mark.parametrize("llm", ["opt2.7b", "opt6.7b", "flant5xl", "flant5xxl"])
def test_stage_2_has_the_papers_numbers(vit: str, llm: str) -> None:
    config = load_config(PAPER / f"pretrain_stage2_{vit}_{llm}.yaml")
    run, family = config.run, "opt" if llm.startswith("opt") else "t5"
    assert run.batch_size_train * GPUS == STAGE2[family]
    assert (run.max_steps, run.init_lr, run.min_lr, run.warmup_steps) == (80_000, 1e-4, 5e-5, 2000)
    assert (run.betas, run.weight_decay) == ((0.9, 0.98), 0.05)
    encoder, language_model = config.model["vision_encoder"], config.model["language_model"]
    assert encoder["name"] == {"vitg": "eva_clip_g", "vitl": "clip_L"}[vit]
    assert encoder["freeze"] and encoder["precision"] == "fp16" and encoder["image_size"] == 224
    assert language_model["precision"] == {"opt": "fp16", "t5": "bf16"}[family]


@pytest.mark.parametrize("llm", CAPTION_DECAY)
def test_caption_fine_tuning_has_the_papers_numbers(llm: str) -> None:
    config = load_config(PAPER / f"caption_coco_{llm}.yaml")
    run = config.run
    assert run.batch_size_train * GPUS == 256 and run.max_epochs == 5
    assert (run.init_lr, run.warmup_steps, run.betas) == (1e-5, 1000, (0.9, 0.999))
    assert run.lr_layer_decay == CAPTION_DECAY[llm]
    encoder = config.model["vision_encoder"]
    assert not encoder["freeze"] and encoder["precision"] == "fp32" and encoder["image_size"] == 364
    assert config.model["prompt"] == config.task["prompt"] == "a photo of"

    assert config.datasets["coco_caption"]["train"]["split_captions"]  # epochs of captions


# Peak rate and betas, R@1 of table 5.
RETRIEVAL = {"vitl": (5e-6, (0.9, 0.98), 0.835, 0.663), "vitg": (1e-5, (0.9, 0.999), 0.854, 0.683)}


@pytest.mark.parametrize("vit", RETRIEVAL)
def test_retrieval_fine_tuning_has_the_papers_numbers(vit: str) -> None:
    config = load_config(PAPER / f"retrieval_coco_{vit}.yaml")
    rate, betas, tr, ir = RETRIEVAL[vit]
    run = config.run
    assert run.batch_size_train * GPUS == 224 and run.max_epochs == 5
    assert (run.init_lr, run.warmup_steps, run.betas) == (rate, 1000, betas)
    assert run.lr_layer_decay == 0.95 and run.weight_decay == 0.05
    encoder = config.model["vision_encoder"]
    assert not encoder["freeze"] and encoder["precision"] == "fp32" and encoder["image_size"] == 364
    assert encoder["name"] == {"vitl": "clip_L", "vitg": "eva_clip_g"}[vit]
    assert config.model["pretrained"] == f"output/pretrain_stage1_{vit}" and config.task["k_test"] == 128
    coco = config.datasets["coco_caption"]
    assert coco["train"]["split_captions"] and coco["vis_processor"]["train"]["image_size"] == 364
    assert config.expected is not None
    expected = config.expected.metrics
    assert (expected["test/rerank/tr_r1"], expected["test/rerank/ir_r1"]) == (tr, ir)
    assert config.task["rerank"] == "lavis"  # as those were formed


# method.md section 7, table 5 in per cent: image to text, then text to image.
TABLE_5 = {
    "flickr30k_vitl": (96.9, 100, 100, 88.6, 97.6, 98.9),
    "flickr30k_vitg": (97.6, 100, 100, 89.7, 98.1, 98.9),
    "coco_caption_vitl": (83.5, 96.0, 98.0, 66.3, 86.5, 91.8),
    "coco_caption_vitg": (85.4, 97.0, 98.5, 68.3, 87.7, 92.6),
}


def test_every_retrieval_evaluation_has_published_numbers() -> None:
    files = {path.stem for path in (PAPER / "eval").glob("retrieval_*.yaml")}
    assert files == {f"retrieval_{name}" for name in TABLE_5}


# method.md section 7: COCO's BLEU-4 and CIDEr, NoCaps' CIDEr and SPICE, in per cent.
TABLE_3 = {
    "opt2.7b": (43.7, 145.8, 119.7, 15.4),
    "opt6.7b": (43.5, 145.2, 121.0, 15.3),
    "flant5xl": (42.4, 144.5, 121.6, 15.8),
}


@pytest.mark.parametrize("llm", TABLE_3)
def test_captioning_evaluations_expect_the_papers_numbers(llm: str) -> None:
    found: list[float] = []
    for data, metrics in (
        ("coco_caption", ("test/bleu_4", "test/cider")),
        ("nocaps", ("val/cider", "val/spice")),
    ):
        config = load_config(PAPER / f"eval/{data}_{llm}.yaml")
        assert config.expected is not None and tuple(config.expected.metrics) == metrics
        assert list(config.datasets) == [data] and config.model["model_type"] == f"caption_coco_{llm}"
        assert (config.task["num_beams"], config.task["max_new_tokens"], config.task["min_length"]) == (
            5,
            30,
            8,
        )
        found += config.expected.metrics.values()
    assert found == pytest.approx([value / 100 for value in TABLE_3[llm]])


@pytest.mark.parametrize(
    ("name", "arm", "checkpoint"),
    [
        ("retrieval", "stage 1", "pretrain_stage1"),
        ("retrieval_ft", "fine-tuned by ITC, ITM and ITG", "retrieval_ft"),
    ],
)
def test_retrieval_on_the_embedded_world_expects_what_results_say(
    name: str, arm: str, checkpoint: str
) -> None:
    config = load_config(REPOSITORY / f"projects/blip2/eval/{name}.yaml")
    rows = (REPOSITORY / "docs/results.md").read_text().split("### Retrieval fine-tuning")[1].splitlines()
    row = next(line for line in rows if line.startswith(f"| {arm} |"))
    means = [float(cell.split("±")[0]) for cell in row.split("|")[2:-1]]
    names = [f"test/{by}/{way}_r1" for by in ("itc", "rerank") for way in ("tr", "ir")]
    assert config.expected is not None
    assert config.expected.metrics == dict(zip(names, means, strict=True))
    assert config.task == {"name": "retrieval"}  # all arms were re-ranked by the task of retrieval_ft.yaml
    assert config.run.checkpoint == f"output/{checkpoint}" and config.run.test_splits == ("test",)


@pytest.mark.parametrize("name", TABLE_5)
def test_retrieval_evaluations_ask_and_expect_what_was_published(name: str) -> None:
    config = load_config(PAPER / f"eval/retrieval_{name}.yaml")
    data, vit = name.rsplit("_", 1)
    assert config.expected is not None
    recalls = [f"test/rerank/{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)]
    assert config.expected.metrics == {
        metric: pytest.approx(value / 100) for metric, value in zip(recalls, TABLE_5[name], strict=True)
    }
    # The published scores: logit of a match + cosine, texts of at most 35 tokens.
    assert config.task == {"name": "retrieval", "k_test": 128, "rerank": "lavis", "loss_batches": 0}
    assert config.model["max_txt_len"] == 35
    assert list(config.datasets) == [data] and config.run.test_splits == ("test",)
    encoder = config.model["vision_encoder"]
    assert (encoder["name"], encoder["image_size"]) == (
        {"vitl": "clip_L", "vitg": "eva_clip_g"}[vit],
        364,
    )
    assert config.datasets[data]["vis_processor"]["eval"]["image_size"] == 364
    if vit == "vitl":  # nobody has released these weights
        assert config.run.checkpoint == "output/retrieval_coco_vitl"
    else:
        assert config.model["pretrained"] == "hub:Salesforce/blip2-itm-vit-g-coco"


def prompt_of(llm: str) -> str:
    return "Question: {} Short answer:" if llm == "flant5xl" else "Question: {} Answer:"


@pytest.mark.parametrize("llm", VQA_DECAY)
def test_vqa_fine_tuning_has_the_papers_numbers(llm: str) -> None:
    config = load_config(PAPER / f"vqav2_ft_{llm}.yaml")
    run = config.run
    assert run.batch_size_train * GPUS == 128 and run.max_epochs == 5
    assert (run.init_lr, run.warmup_steps, run.betas) == (1e-5, 1000, (0.9, 0.999))
    assert run.lr_layer_decay == VQA_DECAY[llm] and run.weight_decay == 0.05
    model = config.model
    encoder = model["vision_encoder"]
    assert not encoder["freeze"] and encoder["precision"] == "fp32" and encoder["image_size"] == 490
    assert model["qformer_text_input"] and model["qformer_text_from"] == "output/pretrain_stage1_vitg"
    assert model["pretrained"] == f"output/pretrain_stage2_vitg_{llm}" and model["prompt"] == prompt_of(llm)
    for section in config.datasets.values():
        sizes = {section["vis_processor"][kind]["image_size"] for kind in ("train", "eval")}
        assert sizes == {490} and section["text_processor"]["train"]["name"] == "blip_question"
    assert len(config.datasets["vqav2"]["train"]) == 2 and config.datasets["vqav2"]["val"] is None
    with torch.device("meta"):
        built = registry.get_model_class(model["arch"]).from_config({**model, "tokenizer": "shapes"})
    assert built.takes_questions and built.tokenizer.source == "shapes"


@pytest.mark.parametrize("llm", VQA_PUBLISHED)
def test_fine_tuned_question_answering_expects_the_papers_numbers(llm: str) -> None:
    tuned, checked = (f"vqav2_ft_{llm}.yaml", f"eval/vqav2_ft_{llm}.yaml")
    for name in (tuned, checked):
        config = load_config(PAPER / name)
        assert config.expected is not None and "test-dev" in config.expected.source
        dev, std = (published / 100 for published in VQA_PUBLISHED[llm])
        assert config.expected.metrics == {"test/accuracy": pytest.approx(dev)}
        assert f"# test-std: {std:.4f}" in (PAPER / name).read_text()
    training = load_config(PAPER / tuned)
    assert config.run.checkpoint == training.run.output_dir and config.run.test_splits == ("test",)
    assert config.model["arch"] == training.model["arch"] and config.model["model_type"] == f"vqa_{llm}"
    assert config.model["prompt"] == prompt_of(llm) and config.model["qformer_text_input"]
    section = config.datasets["vqav2"]
    assert section["train"] is None and section["val"] is None, "their files need not be there"
    assert (
        section["vis_processor"]["eval"]["image_size"] == 490 and "test-dev" in section["test"]["questions"]
    )


@pytest.mark.parametrize("name", ["vqa", "vqa_t5"])
def test_the_embedded_worlds_evaluations_expect_the_measured_numbers(name: str) -> None:
    config = load_config(REPOSITORY / f"projects/blip2/eval/{name}.yaml")
    stage2 = f"output/pretrain_stage2{name.removeprefix('vqa')}"
    assert config.run.checkpoint == stage2 and config.run.test_splits == ("test",)
    assert config.expected is not None
    results = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    told = results.split("## Questions about the embedded world")[1].split("\n## ")[0]
    metrics = config.expected.metrics
    kinds = [f"test/answer_type/{kind}" for kind in ("yes_no", "number", "other")]
    assert list(metrics) == ["test/accuracy", *kinds]
    assert all(f"{value:.3f}" in told for value in metrics.values())


@pytest.mark.parametrize("name", ["vqa_ft", "vqa_ft_t5", "vqa_zeroshot", "vqa_zeroshot_t5"])
def test_questions_on_the_embedded_world(name: str) -> None:
    config = load_config(REPOSITORY / "projects/blip2" / f"{name}.yaml")
    family = "t5" if name.endswith("t5") else "opt"
    assert config.model["prompt"] == prompt_of("flant5xl" if family == "t5" else "opt2.7b")
    assert config.task == {"name": "vqa", "num_beams": 5, "max_len": 10, "length_penalty": -1}
    assert list(config.datasets) == ["shapes_vqa"] and config.model["arch"] == f"blip2_{family}"
    assert config.model["pretrained"] == f"output/pretrain_stage2{'_t5' if family == 't5' else ''}"
    if name.startswith("vqa_zeroshot"):
        assert "qformer_text_input" not in config.model
        return
    assert (
        config.model["qformer_text_input"] and config.model["qformer_text_from"] == "output/pretrain_stage1"
    )
    assert (config.run.batch_size_train, config.run.max_steps) == (64, 1400)
    preset = load_model_preset({"arch": f"blip2_{family}", "model_type": "vqa_shapes"})["model"]
    assert preset["qformer_text_input"] and preset["prompt"] == config.model["prompt"]
    if not EMBEDDED[f"shapes_{family}"].is_dir():
        pytest.skip("this embedded language model is not shipped yet")
    with torch.device("meta"):
        model = registry.get_model_class(config.model["arch"]).from_config(config.model)
    assert model.tokenizer.source == "shapes"


# method.md section 7, in per cent: zero-shot VQAv2 val, OK-VQA and GQA.
ZERO_SHOT = {
    "vitl_opt2.7b": (50.1, 30.2, 33.9),
    "vitg_opt2.7b": (53.5, 31.7, 34.6),
    "vitg_opt6.7b": (54.3, 36.4, 36.4),
    "vitl_flant5xl": (62.6, 39.4, 44.4),
    "vitg_flant5xl": (63.1, 40.7, 44.2),
    "vitg_flant5xxl": (65.2, 45.9, 44.7),
}


@pytest.mark.parametrize("model", ZERO_SHOT)
def test_zero_shot_evaluations_expect_the_papers_numbers(model: str) -> None:
    for name, published in zip(("vqav2", "ok_vqa", "gqa"), ZERO_SHOT[model], strict=True):
        config = load_config(PAPER / f"eval/{name}_{model}.yaml")
        assert config.expected is not None
        ((metric, value),) = config.expected.metrics.items()
        assert value == pytest.approx(published / 100)
        assert metric == f"{config.run.test_splits[0]}/accuracy" and list(config.datasets) == [name]
        short = "Short answer" if "flant5" in model else "Answer"
        assert config.task["prompt"] == f"Question: {{}} {short}:"
        assert (config.task["num_beams"], config.task["length_penalty"]) == (5, -1)
        assert config.model["vision_encoder"]["name"] == {"vitg": "eva_clip_g", "vitl": "clip_L"}[model[:4]]
