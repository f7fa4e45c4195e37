"""`lavis-lite index` from end to end with the embedded world's model, and its mistakes as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from search_world import save_pictures

from lavis_lite import load_model_and_preprocess
from lavis_lite.cli import main
from lavis_lite.common.checkpoint import save_tensors
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.model_recipe import model_recipe
from lavis_lite.datasets.images import read_image
from lavis_lite.search import ModelChoice, load_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a checkpoint at random, and the index that it built."""
    folder = tmp_path_factory.mktemp("search")
    save_pictures(folder / "pictures", 9)
    save_weights(folder / "model.safetensors", seed=0)
    build = ["index", "build", "--images", str(folder / "pictures"), "--out", str(folder / "idx")]
    main([*build, "--model", "blip2", "--type", "shapes", "--checkpoint", str(folder / "model.safetensors")])
    return folder


def save_weights(path: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    model, _, _ = load_model_and_preprocess("blip2", "shapes", is_eval=True)
    save_tensors(path, model.trainable_state_dict())


def test_search_finds_what_the_model_itself_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["index", "search", str(place / "idx"), "--text", "a red circle", "--top", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    model, processors, texts = load_model_and_preprocess(
        "blip2", "shapes", True, "cpu", place / "model.safetensors"
    )
    paths = sorted((place / "pictures").glob("*.png"))
    images = torch.stack([processors["eval"](read_image(path)) for path in paths])
    said = texts["eval"]("a red circle")
    scores = model.compute_itc({"image": images, "text_input": said})  # type: ignore[operator]
    assert found["query"] == "a red circle" and len(found["results"]) == 4
    by_path = dict(zip(map(str, paths), scores.tolist(), strict=True))
    for result in found["results"]:
        assert result["score"] == pytest.approx(
            by_path[result["image"]], abs=0.02
        )  # bf16 where there is some
    best = max(by_path.values())
    assert by_path[found["results"][0]["image"]] == pytest.approx(best, abs=0.02)


def test_matching_is_the_models_own(place: Path) -> None:
    encoder = load_encoder(
        ModelChoice("blip2/shapes", str(place / "model.safetensors")), device="cpu", precision="fp32"
    )
    images = torch.stack([encoder.processor(read_image(path)) for path in (place / "pictures").glob("*.png")])
    text = "a red circle and a large blue triangle"
    with torch.no_grad():
        tokens = encoder.model.tokenize([encoder.clean(text)] * len(images))
        expected = encoder.model.match_logits(encoder.model.encode_image(images), tokens)
    torch.testing.assert_close(
        encoder.match(images, encoder.project_text(text)), expected, rtol=1e-4, atol=1e-5
    )


def test_a_contact_sheet_is_one_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = place / "sheet.html"
    text = "a <b>red</b> circle"
    main(
        [
            "index",
            "search",
            str(place / "idx"),
            "--text",
            text,
            "--top",
            "3",
            "--rerank",
            "--html",
            str(sheet),
        ]
    )
    page = sheet.read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "http" not in page and "ITM 0." in page
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page and "<b>" not in page
    assert "3 images in" in capsys.readouterr().out


def test_a_table_of_what_a_picture_resembles(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["index", "search", str(place / "idx"), "--image", str(place / "pictures" / "004.png"), "--top", "2"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "score" in lines[0] and lines[1].split()[:2] == ["1", "1.0000"]


def test_check_tells_what_is_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["index", "check", str(place / "idx")])
    said = capsys.readouterr().out
    assert "is sound: 9 images, 0 deleted, 12 vectors each of 64 numbers in fp16; exact search" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("search IDX --text", 2, "expected one argument"),
        ("search IDX", 2, "one of the arguments --text --image is required"),
        ("search nowhere --text a", 1, "no index at 'nowhere'"),
        ("search IDX --image nowhere.jpg", 2, "--image 'nowhere.jpg': no such file"),
        ("search IDX --image PICTURE --rerank", 2, "re-ranking matches images with a text"),
        ("search IDX --text a --itm-weight 0.5", 2, "--itm-weight is part of --rerank sum"),
        ("search IDX --text a --top 0", 2, "at least one image is to be found"),
        ("search IDX --text a --checkpoint OTHER", 1, "was built by blip2/shapes with"),
        ("build --images nowhere --out new --model blip2/shapes", 1, "no such folder or tar file"),
        ("build --images PICTURES --out new --model blip2", 2, "give a name and a type"),
        ("build --images PICTURES --out IDX --model blip2/shapes", 1, "there is an index at"),
        *(
            (f"build --images PICTURES --out new --model blip2/shapes {option}", 2, message)
            for option, message in (
                ("--batch-size 0", "--batch-size must be at least 1, got 0"),
                ("--num-workers -1", "--num-workers must be at least 0, got -1"),
                ("--recall 99", "--recall must be above 0 and at most 1, got 99.0"),
                ("--recall 0", "--recall must be above 0 and at most 1, got 0.0"),
                ("--recall nan", "--recall must be above 0 and at most 1, got nan"),
            )
        ),
        ("add IDX --images PICTURES --batch-size 0", 2, "--batch-size must be at least 1, got 0"),
        ("delete IDX nothing.png", 2, "'nothing.png' fits no image"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str,
    code: int,
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "OTHER" in arguments:
        save_weights(tmp_path / "other.safetensors", seed=1)
    words = {
        "IDX": str(place / "idx"),
        "PICTURES": str(place / "pictures"),
        "PICTURE": str(place / "pictures" / "000.png"),
        "OTHER": str(tmp_path / "other.safetensors"),
    }
    with pytest.raises(SystemExit) as ended:
        main(["index", *(words.get(word, word) for word in arguments.split())])
    error = capsys.readouterr().err
    assert ended.value.code == code and message in error and "Traceback" not in error
    last = error.splitlines()[-1]
    assert message in last and (last.startswith("error: ") or "lavis-lite index" in last)


def test_the_fingerprint_tells_weights_apart_and_nothing_else(place: Path, tmp_path: Path) -> None:
    save_weights(tmp_path / "same.safetensors", seed=0)
    save_weights(tmp_path / "other.safetensors", seed=1)
    own, same, other = (
        load_encoder(ModelChoice("blip2/shapes", str(path)), device="cpu").identity["fingerprint"]
        for path in (
            place / "model.safetensors",
            tmp_path / "same.safetensors",
            tmp_path / "other.safetensors",
        )
    )
    assert own == same != other


def test_the_weight_of_matching_is_the_runs(place: Path, tmp_path: Path) -> None:
    weights = str(place / "model.safetensors")
    assert load_encoder(ModelChoice("blip2/shapes", weights), device="cpu").itm_weight == 1
    run, recipe = tmp_path / "run", model_recipe("blip2/shapes")
    content = {"model": dict(recipe.model), "datasets": {"shapes_caption": dict(recipe.preprocess)}}
    run.mkdir()
    save_weights(run / "model.safetensors", seed=0)
    (run / "config.yaml").write_text(json.dumps({**content, "task": {"itm_weight": 0.25}}))
    for choice in (ModelChoice(str(run), weights), ModelChoice("blip2/shapes", str(run))):
        assert load_encoder(choice, device="cpu").itm_weight == 0.25
    (run / "config.yaml").write_text(json.dumps({**content, "task": {"itm_weight": "much"}}))
    with pytest.raises(ConfigError, match=r"its config.yaml must be a number above 0, is much"):
        load_encoder(ModelChoice(str(run), weights), device="cpu")
    (run / "config.yaml").write_text(json.dumps(content))
    assert load_encoder(ModelChoice(str(run), weights), device="cpu").itm_weight == 1


def test_the_weight_of_matching_is_that_of_the_run_around_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = model_recipe("blip2/shapes")
    content = {"model": dict(recipe.model), "datasets": {"shapes_caption": dict(recipe.preprocess)}}
    for name, weight in (("run", 0.25), ("other", 0.75)):
        step = tmp_path / name / "checkpoints" / "step_000008"
        step.mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(json.dumps({**content, "task": {"itm_weight": weight}}))
        save_weights(step / "model.safetensors", seed=0)
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    step = tmp_path / "run" / "checkpoints" / "step_000008"
    (tmp_path / "run" / "own.safetensors").symlink_to(step / "model.safetensors")
    for weights in (step, step / "model.safetensors", tmp_path / "run" / "own.safetensors"):
        for model in ("blip2/shapes", other):
            caplog.clear()
            with caplog.at_level("INFO", logger="lavis_lite"):
                assert load_encoder(ModelChoice(model, str(weights)), device="cpu").itm_weight == 0.25
            assert f"re-ranking by sum weighs matching by 0.25, as '{run}' was evaluated" in caplog.text
    # A file of that name further up is none of a run's.
    deep = step / "copies" / "model.safetensors"
    deep.parent.mkdir()
    save_weights(deep, seed=0)
    assert load_encoder(ModelChoice("blip2/shapes", str(deep)), device="cpu").itm_weight == 1
    # What lies beside the weights may be another program's.
    (deep.parent / "config.yaml").write_text("task: translation")
    assert load_encoder(ModelChoice("blip2/shapes", str(deep)), device="cpu").itm_weight == 1


def test_the_benchmark_compares_what_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import importlib

    benchmark = importlib.import_module("search")
    result = tmp_path / "result.json"
    sizes = ["--images", "600", "--queries", "2", "--width", "8", "--asked", "3", "--rounds", "1"]
    benchmark.main([*sizes, "--kind", "IVF8,Flat", "--json", str(result)])
    cases = json.loads(result.read_text())["cases"]
    assert [case["data"] for case in cases] == ["clustered", "random"]
    assert all(case["recall"] > 0.95 and case["ratio"] > 0 for case in cases)
