"""A run's folder means the same model from any working directory, and its command the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from feature_world import config
from stage1_helpers import write_tokenizer

from lavis_lite import load_model_and_preprocess
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.local_paths import MODEL_PATHS, absolute_paths
from lavis_lite.models.language.loading import EMBEDDED
from lavis_lite.runners.resume import find_start
from lavis_lite.runners.runner import Runner


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a first run, with a tokenizer in it; `there` is another one beside it."""
    write_tokenizer(tmp_path / "here" / "words")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run_with(tokenizer: str, folder: Path, *options: str) -> Config:
    plain = ["run.cache_features=false", "run.max_steps=2", "run.save_every=1"]
    return config(folder, *plain, f"model.tokenizer={tokenizer}", *options)


def test_a_run_is_a_model_and_goes_on_from_another_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Runner(run_with("words", here)).train()
    assert yaml.safe_load((here / "run/config.yaml").read_text())["model"]["tokenizer"] == str(here / "words")
    assert find_start(run_with("words", here)).summary  # a finished run stays finished
    assert Runner(run_with("./words", here, "run.max_steps=3")).train().step == 3
    monkeypatch.chdir(here.parent / "there")
    model, *_ = load_model_and_preprocess(str(here / "run"), is_eval=True)
    assert len(model.tokenizer) > 10  # type: ignore[arg-type]
    assert find_start(run_with("../here/words", here, "run.max_steps=3")).summary
    assert Runner(run_with(str(here / "words"), here, "run.max_steps=4")).train().step == 4
    write_tokenizer(here.parent / "there" / "words")
    with pytest.raises(ConfigError, match=r"differs in model\.tokenizer"):
        find_start(run_with("words", here))


def test_a_run_goes_on_where_all_was_moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = here.parent / "data"
    Runner(run_with("words", data, "run.output_dir=run")).train()
    monkeypatch.chdir(here.rename(here.parent / "moved"))
    assert find_start(run_with("./words", data, "run.output_dir=run")).summary
    assert Runner(run_with("words", data, "run.output_dir=run", "run.max_steps=3")).train().step == 3
    with pytest.raises(ConfigError, match=r"differs in model\.tokenizer"):
        find_start(run_with("others", data, "run.output_dir=run"))


def test_a_run_that_was_saved_with_relative_paths_goes_on(here: Path) -> None:
    Runner(run_with("words", here)).train()
    for file in (here / "run/config.yaml", here / "run/summary.json"):
        file.write_text(file.read_text().replace(str(here / "words"), "words"))
    assert find_start(run_with("words", here)).summary
    assert Runner(run_with("words", here, "run.max_steps=3")).train().step == 3


def test_weights_to_begin_with_may_be_gone_when_the_run_goes_on(here: Path) -> None:
    first = Runner(run_with("words", here)).train().checkpoint
    assert first is not None
    shutil.copy(first / ckpt.MODEL, "begin.safetensors")
    shutil.rmtree("run")
    begin = "model.pretrained=begin.safetensors"
    Runner(run_with("words", here, begin)).train()
    Path("begin.safetensors").unlink()
    assert Runner(run_with("words", here, begin, "run.max_steps=3")).train().step == 3


def test_only_what_is_there_is_a_path(here: Path) -> None:
    for name in ("shapes", "shapes_opt"):
        (here / name).mkdir()
    model = {
        "tokenizer": "shapes",
        "pretrained": "hub:some/model",
        "qformer": {"pretrained": "bert-base-uncased", "num_layers": 2},
        "vision_encoder": {"pretrained": True},
        "language_model": {"model_name": "shapes_opt", "pretrained": True},
    }
    assert absolute_paths(model) == model
    assert absolute_paths(
        {"language_model": {"model_name": "words"}, "vision_encoder": {"pretrained": "words"}}
    ) == {
        "language_model": {"model_name": str(here / "words")},
        "vision_encoder": {"pretrained": str(here / "words")},
    }
    assert absolute_paths({"qformer": None}) == {"qformer": None} and absolute_paths(3) == 3
    assert set(MODEL_PATHS["language_model.model_name"]) == set(EMBEDDED)
