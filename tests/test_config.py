"""Configuration: order of layers, checks with the YAML path, inheritance, a user's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from lavis_lite.common.binding import bind
from lavis_lite.common.config import load_config, merge, parse_options, read_project
from lavis_lite.common.errors import ConfigError, UnknownNameError
from lavis_lite.common.expected import Expected
from lavis_lite.common.registry import Table, registry
from lavis_lite.common.run_config import RunConfig
from lavis_lite.datasets.named import named_section

REPOSITORY = Path(__file__).resolve().parent.parent
STAGE1 = REPOSITORY / "projects/blip2/pretrain_stage1.yaml"


@dataclass
class Inner:
    width: int = 8
    kind: Literal["a", "bee"] = "a"


class Outer:
    def __init__(
        self,
        *,
        rate: float,
        inner: Inner | None = None,
        size: int | tuple[int, int] = 4,
        names: list[str] | None = None,
    ) -> None: ...


def test_bind_converts_to_what_the_signature_declares() -> None:
    keywords = bind(Outer, {"rate": 1, "inner": {"width": 1e3}, "size": [2, 3]}, where="outer")
    assert keywords == {"rate": 1.0, "inner": Inner(width=1000), "size": (2, 3)}
    assert isinstance(keywords["rate"], float) and isinstance(keywords["inner"].width, int)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rate": 1, "szie": 3}, "unknown key 'outer.szie'; did you mean 'size'?"),
        ({}, "outer: missing outer.rate"),
        ({"rate": "fast"}, "outer.rate: expected float, got 'fast' (str)"),
        ({"rate": True}, "outer.rate: expected float, got True (bool)"),
        ({"rate": 1, "inner": {"wdith": 3}}, "unknown key 'outer.inner.wdith'; did you mean 'width'?"),
        ({"rate": 1, "inner": {"kind": "be"}}, "did you mean 'bee'?"),
        ({"rate": 1, "names": ["a", 3]}, "outer.names[1]: expected str, got 3 (int)"),
        ({"rate": 1, "size": 2.5}, "outer.size: expected int or tuple[int, int], got 2.5 (float)"),
        (7, "outer: expected keys and values, got 7 (int)"),
    ],
)
def test_bind_names_the_place_and_the_remedy(mapping: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(Outer, mapping, where="outer")  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merge_replaces_a_mapping_that_names_another_part() -> None:
    below = {"vision_encoder": {"name": "eva_clip_g", "drop_path_rate": 0.1}, "lr": 1}
    assert merge(below, {"vision_encoder": {"image_size": 364}}) == {
        "vision_encoder": {"name": "eva_clip_g", "drop_path_rate": 0.1, "image_size": 364},
        "lr": 1,
    }
    assert merge(below, {"vision_encoder": {"name": "timm"}})["vision_encoder"] == {"name": "timm"}


def test_options_reach_preset_selection_and_lie_over_the_file() -> None:
    config = load_config(STAGE1, ["model.model_type=pretrain", "run.max_steps=7"])
    assert config.model["vision_encoder"]["name"] == "eva_clip_g"
    assert config.run.max_steps == 7
    assert load_config(STAGE1).model["vision_encoder"]["name"] == "shapes_vit"


def test_resolved_config_loads_again_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(STAGE1)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.batch_size_trian=8", "unknown key 'run.batch_size_trian'; did you mean 'batch_size_train'"),
        ("modle.arch=blip2", "unknown section 'modle' in the configuration; did you mean 'model'?"),
        ("run.max_steps=many", "run.max_steps: expected int, got 'many' (str)"),
        ("run.max_epochs=2", "run.max_steps and run.max_epochs are both set"),
        ("run.betas=[0.9]", "run.betas: expected 2 values"),
        ("model.model_type=pretrian", "has no type 'pretrian', did you mean 'pretrain'"),
        ("model.arch=blip3", "unknown model 'blip3', did you mean 'blip2'"),
        (
            "model.vision_encoder.name=eva_clip_h",
            "unknown vision encoder 'eva_clip_h', did you mean 'eva_clip_g'",
        ),
        (
            "model.vision_encoder.freez=true",
            "unknown key 'model.vision_encoder.freez'; did you mean 'freeze'",
        ),
        ("model.qformer.num_querys=4", "unknown key 'model.qformer.num_querys'"),
        ("task.name=image_text_pretrian", "did you mean 'image_text_pretrain'"),
        ("task.k_tset=3", "unknown key 'task.k_tset'; did you mean 'k_test'"),
        ("datasets.shapes_caption.image_sise=32", "did you mean 'image_size'"),
        ("imports=[nowhere.py]", "imports: no file 'nowhere.py', looked for"),
        ("run.max_steps", "is not of the form key.subkey=value"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(STAGE1, [option])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*pretrain_stage.yaml'; did you mean"):
        load_config(STAGE1.parent / "pretrain_stage.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1, 2\nmodel: }")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)


def test_base_is_inherited_and_a_cycle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("run: {seed: 1, max_steps: 5}")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nrun: {seed: 2}")
    assert read_project(tmp_path / "child.yaml") == {"run": {"seed": 2, "max_steps": 5}}
    (tmp_path / "base.yaml").write_text("base: child.yaml")
    with pytest.raises(ConfigError, match="leads back"):
        read_project(tmp_path / "child.yaml")


def test_of_several_bases_later_ones_lie_above(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {seed: 1, max_steps: 5}")
    (tmp_path / "b.yaml").write_text("run: {seed: 2}\ntask: {name: x}")
    (tmp_path / "child.yaml").write_text("base: [a.yaml, b.yaml]\ntask: {k: 1}")
    wanted = {"run": {"seed": 2, "max_steps": 5}, "task": {"name": "x", "k": 1}}
    assert read_project(tmp_path / "child.yaml") == wanted
    (tmp_path / "child.yaml").write_text("base: [a.yaml, 3]")
    with pytest.raises(
        ConfigError, match=r"child.yaml: base: expected the name of a file, or a list of them"
    ):
        read_project(tmp_path / "child.yaml")


def test_null_removes_a_dataset_that_lies_beneath(tmp_path: Path) -> None:
    both = {"shapes_caption": {}, "own": {"train": {"images": "x"}}}
    child, mixin, base = (tmp_path / f"{name}.yaml" for name in ("child", "mixin", "base"))
    base.write_text(yaml.safe_dump({"base": str(STAGE1), "datasets": both}))
    assert set(load_config(base).datasets) == {"shapes_caption", "own"}
    assert set(load_config(base, ["datasets.own=null"]).datasets) == {"shapes_caption"}
    child.write_text("base: base.yaml\ndatasets: {shapes_caption: null}")
    assert set(load_config(child).datasets) == {"own"}
    assert load_config(child, ["datasets.own=null"]).datasets == {}
    # Back by its preset, from which the base's keys are gone.
    again = load_config(child, ["datasets.shapes_caption={}"]).datasets
    assert set(again) == {"own", "shapes_caption"}
    mixin.write_text("datasets:\n  own:\n")
    child.write_text("base: [base.yaml, mixin.yaml]")
    assert set(load_config(child).datasets) == {"shapes_caption"}


def test_a_null_that_removes_nothing_is_an_error(tmp_path: Path) -> None:
    for option, message in (
        (
            "datasets.shapes_captoin=null",
            r"datasets\.shapes_captoin: null removes .*did you mean 'shapes_caption'",
        ),
        ("datasets.x=null", r"\(datasets: shapes_caption\); write \{\} for its preset"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(STAGE1, [option])
    bare = tmp_path / "bare.yaml"
    bare.write_text("datasets:\n  shapes_caption:\n")
    with pytest.raises(ConfigError, match=r"write \{\} for its preset"):
        load_config(bare, ["model.arch=blip2", "model.model_type=shapes"])
    with pytest.raises(ConfigError, match=r"write \{\} for its preset"):
        named_section(str(bare))
    with pytest.raises(ConfigError, match="leaves no dataset"):
        named_section("shapes_caption", ["datasets.shapes_caption=null"])


def test_what_is_expected_is_checked_and_kept(tmp_path: Path) -> None:
    wanted = "expected={source: a paper, metrics: {test/loss: 1}}"
    config = load_config(STAGE1, [wanted])
    assert config.expected == Expected("a paper", {"test/loss": 1.0})
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    for section, message in (
        ("{source: x, metrics: {}}", "expected.metrics: give at least one"),
        ("{metrics: {test/loss: 1}}", "expected.source"),
        ("{source: x, metrics: {test/loss: much}}", r"expected.metrics.test/loss: expected float"),
        ("7", "expected: expected keys and values"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(STAGE1, [f"expected={section}"])


@pytest.mark.parametrize(
    "text", ["Question: {} Answer:", "a: b", 'Say "it": {}', "ends:", "{}: b", "😀: x", "[1, 2"]
)
def test_texts_with_colons_need_no_quotes(text: str) -> None:
    assert parse_options([f"model.prompt={text}", "a=1"]) == {"model": {"prompt": text}, "a": 1}
    assert parse_options(["a={b: c}", "d='x: y'", "e= {b: 1}"]) == {
        "a": {"b": "c"},
        "d": "x: y",
        "e": {"b": 1},
    }


def test_options_are_read_as_yaml() -> None:
    assert parse_options(["a.b=[1, x]", "a.c=true", "d=1e-4", "e=null"]) == {
        "a": {"b": [1, "x"], "c": True},
        "d": 1e-4,
        "e": None,
    }


def test_registry_refuses_two_owners_and_forgives_a_second_import() -> None:
    table = Table("thing")

    def one() -> None: ...

    def two() -> None: ...

    table.register("x")(one)
    table.register("x")(one)
    with pytest.raises(ConfigError, match="thing 'x' is registered twice"):
        table.register("x")(two)
    with pytest.raises(UnknownNameError, match=r"unknown thing 'xx'.*registered: x"):
        table.get("xx")


def test_manifest_names_what_its_modules_register() -> None:
    from lavis_lite.manifest import MODULES

    seen = 0
    for kind, modules in MODULES.items():
        for module, names in modules.items():
            for name in names:
                assert registry.table(kind).get(name).__module__.startswith(module), (kind, name)
                seen += 1
    assert seen >= 20


def test_every_run_key_is_read_by_something() -> None:
    source = "".join(
        path.read_text() for path in (REPOSITORY / "lavis_lite").rglob("*.py") if path.name != "run_config.py"
    )
    unread = [key for key in RunConfig.__dataclass_fields__ if f".{key}" not in source]
    assert not unread
