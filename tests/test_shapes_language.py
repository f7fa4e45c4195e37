"""The embedded world's two language models: tokenizers, documents, pre-training, and what is shipped."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lavis_lite.common.config import load_config
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.io import atomic_write
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.worlds.shapes.captions import captions, describe
from lavis_lite.worlds.shapes.encoder import WEIGHTS
from lavis_lite.worlds.shapes.export import main as export
from lavis_lite.worlds.shapes.lm_data import DEFAULT_CONTEXTS, SceneDocumentsBuilder
from lavis_lite.worlds.shapes.lm_documents import (
    BLEND,
    CONTEXTS,
    DESCRIBE_PROMPT,
    QUESTION_PROMPTS,
    document,
)
from lavis_lite.worlds.shapes.lm_encoding import ROLES, encode_opt, encode_t5
from lavis_lite.worlds.shapes.lm_export import export_language_model, write_language_model
from lavis_lite.worlds.shapes.lm_pretrain import ShapesLMPretrain
from lavis_lite.worlds.shapes.lm_reading import reading_scores, replies_to
from lavis_lite.worlds.shapes.lm_task import ANSWER_GATE, COPY_GATE, GATES, ShapesReadingTask, margin
from lavis_lite.worlds.shapes.lm_tokenizers import FAMILIES, LANGUAGE, build_tokenizer
from lavis_lite.worlds.shapes.questions import TYPES, answer, ask, questions
from lavis_lite.worlds.shapes.scene import Scene, Split, sample_scene
from lavis_lite.worlds.shapes.words import PLACES, RELATIONS, noun

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
TINY = {"width": 32, "depth": 2, "num_heads": 2, "hidden": 48}
PARAMETERS = {"opt": 838_400, "t5": 2_161_792}
MAX_BYTES = 12_000_000
SHIPPED = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            not (LANGUAGE / family / "model.safetensors").is_file(),
            reason=f"not shipped yet: projects/shapes/pretrain_{family}.yaml makes it",
        ),
    )
    for family in FAMILIES
]
AUTO = {"opt": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}


def scenes(count: int, split: Split = "train") -> list[Scene]:
    return [sample_scene(seed=0, split=split, index=index) for index in range(count)]


def shipped(family: str) -> tuple[Any, Any]:
    folder = LANGUAGE / family
    model = AUTO[family].from_pretrained(folder, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_of_the_world_survives_its_tokenizer(family: str) -> None:
    tokenizer = build_tokenizer(family)
    texts = ["a photo of", DESCRIBE_PROMPT]
    for scene in scenes(150):
        texts += [describe(scene), *captions(scene, count=4)]
        for question in questions(scene):
            texts += [question.answer, *(prompt.format(question.text) for prompt in QUESTION_PROMPTS)]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_lower_case_and_know_what_they_do_not_know(family: str) -> None:
    tokenizer = build_tokenizer(family)
    assert tokenizer("Question: What COLOR?")["input_ids"] == tokenizer("question: what color?")["input_ids"]
    ids = tokenizer("a zeppelin", add_special_tokens=False)["input_ids"]
    assert ids == [*tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer.unk_token_id]
    # Parts that are put together give the tokens of the whole: prompt and answer are encoded apart.
    parts = tokenizer(["answer:", "red"], add_special_tokens=False)["input_ids"]
    assert [*parts[0], *parts[1]] == tokenizer("answer: red", add_special_tokens=False)["input_ids"]
    with pytest.raises(ConfigError, match="no language family 'gpt'"):
        build_tokenizer("gpt")


def test_opt_begins_texts_and_ends_them_with_a_line_break() -> None:
    tokenizer = build_tokenizer("opt")
    ids = tokenizer("a red ring\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token == "</s>"
    assert ids[-1:] == tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ids[-1] not in (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red ring\n"
    assert tokenizer.pad_token_id != tokenizer.bos_token_id


def test_t5_ends_texts_with_its_end_token() -> None:
    tokenizer = build_tokenizer("t5")
    ids = tokenizer("a red ring\n")["input_ids"]
    assert len(ids) == 4 and ids[-1] == tokenizer.eos_token_id and tokenizer.bos_token is None


def test_documents_are_a_function_of_their_seed_and_use_every_form() -> None:
    found = set()
    for index, scene in enumerate(scenes(200)):
        one, again = (
            document(scene, random.Random(index), replies=4, contexts=DEFAULT_CONTEXTS) for _ in range(2)
        )
        assert one == again
        assert len(set(one.replies)) == len(one.replies) >= 1
        found |= {reply.kind for reply in one.replies} | {bool(one.context), BLEND in one.context}
        if not one.context:
            assert {reply.kind for reply in one.replies} == {"caption"}
    assert found == {"answer", "object", "caption", "description", True, False}


def test_replies_follow_from_the_context() -> None:
    checked = 0
    for index, scene in enumerate(scenes(150)):
        text = document(scene, random.Random(index), replies=6, contexts={"full": 1.0})
        for reply in text.replies:
            if reply.kind == "description":
                assert reply.text == text.context
            if reply.kind == "answer":
                match = re.fullmatch(r"question: (.*\?) (?:short )?answer:", reply.prompt)
                assert match
                assert answer(match[1], text.context) == reply.text
                checked += 1
    assert checked > 200


def test_pair_replies_are_the_steps_to_a_relation() -> None:
    seen = {"where": 0, "what": 0}
    for index, scene in enumerate(scenes(60)):
        text = document(
            scene, random.Random(index), replies=6, contexts={"full": 1.0}, reply_weights={"pair": 1}
        )
        for reply in text.replies:
            if reply.kind != "pair":
                continue  # of a picture without two objects that can be told apart
            match = re.fullmatch(
                r"question: is the (.*) (?:left of|right of|above|below) the (.*)\? (\w+):", reply.prompt
            )
            assert match
            first, second, asked = match.groups()
            seen[asked] += 1
            if asked == "where":
                told = [answer(f"where is the {name}?", text.context) for name in (first, second)]
            else:
                told = [
                    r for r in RELATIONS if answer(f"is the {first} {r} the {second}?", text.context) == "yes"
                ]
            assert reply.text == ", ".join(told)
    assert min(seen.values()) > 80


def test_a_scene_that_allows_no_question_of_the_wanted_type_gets_captions() -> None:
    lonely = next(scene for scene in scenes(200) if len(scene.objects) == 1)
    text = document(
        lonely, random.Random(0), replies=3, contexts={"full": 1}, reply_weights={"answer": 1},
        type_weights={"relation": 1.0, "color": 0.0},
    )  # fmt: skip
    assert {reply.kind for reply in text.replies} == {"caption"}


@pytest.mark.parametrize("form", CONTEXTS)
def test_every_form_of_context_holds_all_facts(form: str) -> None:
    for index, scene in enumerate(scenes(40)):
        told = CONTEXTS[form](scene, random.Random(index)).replace(BLEND, " ")
        assert scene.background in told
        for item in scene.objects:
            for word in (item.size, item.colour, item.shape, *PLACES[item.cell].split()[2:]):
                assert word in told.replace(",", "").replace(":", "").split(), (word, told)


def test_opt_documents_put_roles_on_words_and_end_every_reply() -> None:
    tokenizer = build_tokenizer("opt")
    newline = tokenizer.convert_tokens_to_ids("\n")
    places = set()
    for index, scene in enumerate(scenes(100)):
        text = document(scene, random.Random(index), replies=8, contexts={"full": 1.0})
        row = encode_opt(tokenizer, text, random.Random(index), max_length=104)
        ids, roles = row["input_ids"], row["roles"]
        assert len(ids) == len(roles) <= 104 and ids[-1] == newline
        (start,) = (ids == tokenizer.bos_token_id).nonzero()[:, 0].tolist()
        assert roles[start] == (ROLES["context"] if start else 0)
        places.add(start == 0)
        said = tokenizer.decode(ids[roles >= ROLES["prompt"]])
        expected = "".join(f"{reply.prompt} {reply.text}\n".lstrip() for reply in text.replies)
        assert expected.startswith(said)
        assert (
            tokenizer.decode(ids[roles == ROLES["context"]], skip_special_tokens=True).rstrip(".")
            == text.context
        )
    assert places == {True, False}


def test_words_that_share_a_place_are_averaged() -> None:
    tokenizer = build_tokenizer("opt")
    scene = next(scene for scene in scenes(30) if len(scene.objects) == 2)
    text = document(scene, random.Random(0), replies=1, contexts={"slots": 1.0})
    dataset = SceneDocumentsBuilder(name="texts", family="opt").build_datasets()["train"]
    row = encode_opt(tokenizer, text, random.Random(0), max_length=104)
    model = ShapesLMPretrain(family="opt", **TINY)
    embedded = model._embed(dataset.collate([{"index": 0, **row}]))[0]
    table = model.lm.get_input_embeddings().weight
    for place, words in enumerate(text.context.split()):
        ids = tokenizer.convert_tokens_to_ids(words.split(BLEND))
        assert torch.allclose(embedded[place], table[ids].sum(0) / len(ids) ** 0.5, atol=1e-6)
    rest = slice(len(text.context.split()), None)
    assert torch.equal(embedded[rest], table[row["input_ids"][rest]])
    assert (row["roles"][: rest.start] == 0).all()


def test_t5_documents_ask_up_to_four_questions_or_split_a_caption() -> None:
    tokenizer = build_tokenizer("t5")
    numbers, splits = set(), 0
    for index, scene in enumerate(scenes(300)):
        text = document(scene, random.Random(index), replies=4, contexts={"full": 1.0})
        row = encode_t5(tokenizer, text, random.Random(index))
        read, said = (
            tokenizer.decode(row[name], skip_special_tokens=True) for name in ("input_ids", "labels")
        )
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
        first = text.replies[0]
        if first.kind == "answer":
            numbers.add(read.count("question:"))
            assert len(said.split(", ")) == read.count("question:") and said.startswith(first.text)
        elif not first.prompt:
            prefix = read.removeprefix(text.context).removeprefix(".").strip()
            assert f"{prefix} {said}" == first.text or f"{prefix}{said}" == first.text
            splits += 1
        else:
            assert said == first.text
    assert numbers == {1, 2, 3, 4} and splits > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_starts_at_chance_and_reaches_every_parameter(family: str) -> None:
    torch.manual_seed(0)
    model = ShapesLMPretrain(family=family)
    dataset = SceneDocumentsBuilder(name="texts", family=family).build_datasets()["train"]
    losses = model(dataset.collate([dataset.load(index, seed=index) for index in range(24)]))
    assert abs(losses["loss"].item() - math.log(len(dataset.tokenizer))) < 1.5
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_padding_changes_no_loss_and_answers_weigh_more() -> None:
    dataset = SceneDocumentsBuilder(name="texts", family="t5").build_datasets()["train"]
    rows = [dataset.load(index, seed=index) for index in range(8)]
    model = ShapesLMPretrain(
        family="t5", **TINY, text_weight=1.0, answer_weight=3.0, object_weight=2.0
    ).eval()
    of_role = {ROLES["answer"]: 3.0, ROLES["object"]: 2.0}
    weights, total = 0.0, 0.0
    for row in rows:
        alone = model(dataset.collate([row]))
        weight = sum(of_role.get(role, 1.0) for role in row["roles"].tolist())
        weights, total = weights + weight, total + weight * alone["loss"].item()
    assert abs(model(dataset.collate(rows))["loss"].item() - total / weights) < 1e-4


def test_training_rows_are_new_in_every_epoch_and_held_out_scenes_stay() -> None:
    datasets = SceneDocumentsBuilder(name="texts", family="opt").build_datasets()
    first, again, later = (datasets["train"].load(3, seed=seed)["input_ids"].tolist() for seed in (7, 7, 8))
    assert first == again != later
    assert datasets["val"].scene(3) == sample_scene(seed=0, split="val", index=3)
    with pytest.raises(ConfigError, match="contexts: no full_text; there are full"):
        SceneDocumentsBuilder(name="texts", family="opt", contexts={"full_text": 1.0})
    with pytest.raises(ConfigError, match="type_weights: no colour; there are existence"):
        SceneDocumentsBuilder(name="texts", family="opt", type_weights={"colour": 1.0})


def test_type_weights_say_how_often_a_type_is_asked() -> None:
    weights = {**dict.fromkeys(TYPES, 0.0), "background": 1.0}
    dataset = SceneDocumentsBuilder(name="texts", family="opt", type_weights=weights).build_datasets()[
        "train"
    ]
    replies = [reply for index in range(20) for reply in dataset.document(index, seed=1).replies]
    asked = [reply.prompt for reply in replies if reply.kind == "answer"]
    assert len(asked) >= 10 and all("color is the background" in prompt for prompt in asked)


class Reader(torch.nn.Module):
    """A stand-in for a language model that answers by rule, and wrongly where it is told to."""

    def __init__(self, tokenizer: Any, wrong: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.tokenizer, self.wrong = tokenizer, wrong
        self.config = replace_namespace(is_encoder_decoder=True)
        self.device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        replies = []
        for text in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            context, _, prompt = text.partition(". ")
            if prompt == DESCRIBE_PROMPT:
                replies.append(context)
                continue
            question = prompt.removeprefix("question: ").rsplit("?", 1)[0] + "?"
            said = answer(question, context)
            replies.append("red ring" if any(word in question for word in self.wrong) else said)
        return self.tokenizer(replies, padding=True, return_tensors="pt")["input_ids"]


def replace_namespace(**values: Any) -> Any:
    return type("Namespace", (), values)()


def test_reading_scores_count_what_is_right() -> None:
    tokenizer = build_tokenizer("t5")
    chosen = scenes(30, "val")
    perfect = reading_scores(Reader(tokenizer), tokenizer, chosen)
    assert perfect == dict.fromkeys((*TYPES, "copy"), 1.0)
    assert margin(perfect) == pytest.approx(min(1 - ANSWER_GATE, 1 - COPY_GATE))
    flawed = reading_scores(Reader(tokenizer, wrong=("background",)), tokenizer, chosen)
    assert flawed == {**perfect, "background": 0.0}
    assert margin(flawed) == pytest.approx(-ANSWER_GATE)


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_do_not_depend_on_the_batch(family: str) -> None:
    torch.manual_seed(0)
    model, tokenizer = ShapesLMPretrain(family=family, **TINY).eval().lm, build_tokenizer(family)
    prompts = ["a photo of", "question: what color is the ring? answer:", "describe:"]
    together = replies_to(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    alone = [replies_to(model, tokenizer, [p], max_new_tokens=5, batch_size=1)[0] for p in prompts]
    assert together == alone


def test_task_reports_every_gate() -> None:
    model = ShapesLMPretrain(family="opt", **TINY)
    dataset = SceneDocumentsBuilder(name="texts", family="opt", val_rows=8).build_datasets()["val"]
    task = ShapesReadingTask(scenes=6, glance=2, loss_batch_size=4, loss_batches=1)
    metrics = task.evaluate(model, dataset, loader_args=EvalArgs(batch_size=16)).metrics
    assert {f"reading/{name}" for name in (*GATES, "gates")} <= set(metrics) and "loss" in metrics
    assert metrics["reading/gates"] < 0 and model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_is_a_valid_configuration(family: str) -> None:
    path = ROOT / "projects" / "shapes" / f"pretrain_{family}.yaml"
    config = load_config(path)
    assert config.model["arch"] == "shapes_lm_pretrain" and config.task["name"] == "shapes_reading"
    assert config.model["family"] == config.datasets["scene_documents"]["family"] == family
    assert (
        sum(p.numel() for p in ShapesLMPretrain.from_config(config.model).parameters()) == PARAMETERS[family]
    )
    with pytest.raises(ConfigError, match="did you mean 'answer_weight'"):
        load_config(path, ["model.answer_weigth=3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_export_writes_a_folder_that_transformers_reads(family: str, tmp_path: Path) -> None:
    config = load_config(
        ROOT / "projects" / "shapes" / f"pretrain_{family}.yaml", [f"model.width={TINY['width']}"]
    )
    model = ShapesLMPretrain.from_config(config.model)
    atomic_write(tmp_path / "run" / "config.yaml", config.to_yaml())
    from lavis_lite.common.checkpoint import FOLDER, save_checkpoint

    save_checkpoint(tmp_path / "run" / FOLDER, 1, model=model.trainable_state_dict(), optimizer={}, state={})
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == str(tmp_path / "out")
    loaded = AUTO[family].from_pretrained(tmp_path / "out", local_files_only=True)
    assert loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.lm.state_dict()[name].half().float()), name
    with pytest.raises(CheckpointError, match="no run of shapes_lm_pretrain"):
        export_language_model(tmp_path)


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_model_loads_offline_and_has_the_size_it_claims(family: str) -> None:
    model, tokenizer = shipped(family)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[family]
    assert model.dtype == torch.float32
    assert model.config.model_type == family and model.config.vocab_size == len(tokenizer)
    assert {t.dtype for t in load_file(LANGUAGE / family / "model.safetensors").values()} == {torch.float16}
    if family == "t5":
        assert model.config.is_gated_act and model.config.decoder_start_token_id == tokenizer.pad_token_id
    else:
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("\n")


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_model_reads_a_description(family: str) -> None:
    model, tokenizer = shipped(family)
    scene = next(scene for scene in scenes(30, "test") if len(scene.objects) == 2)
    item, text = scene.objects[0], describe(scene)
    question = f"what color is the object {PLACES[item.cell]}?"
    prompts = [f"{text}. question: {question} answer:", f"{text}. {DESCRIBE_PROMPT}"]
    assert replies_to(model, tokenizer, prompts, max_new_tokens=60, batch_size=2) == [item.colour, text], (
        noun(item)
    )


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_tokenizer_is_the_one_the_function_writes(family: str, tmp_path: Path) -> None:
    model = ShapesLMPretrain(family=family, **TINY)
    write_language_model(model.lm, family, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (LANGUAGE / family / "tokenizer.json").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (LANGUAGE / family).iterdir()}


def test_embedded_weights_are_small() -> None:
    files = [WEIGHTS, *(path for path in LANGUAGE.rglob("*") if path.is_file())]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_weights_pass_the_gates(family: str) -> None:
    scores = reading_scores(*shipped(family), scenes(500, "test"))
    assert margin(scores) >= 0, scores


def test_held_out_scenes_never_come_up_in_training() -> None:
    train = SceneDocumentsBuilder(name="texts", family="opt").build_datasets()["train"]
    keys = {sample_scene(seed=seed, split="train", index=1).key for seed in range(300)}
    assert train.split == "train"
    assert not keys & {scene.key for split in ("val", "test") for scene in scenes(300, split)}  # type: ignore[arg-type]


def test_every_question_type_can_be_asked_of_held_out_scenes() -> None:
    kinds = {kind for scene in scenes(20, "test") for kind in TYPES if ask(scene, kind, random.Random(0))}
    assert kinds == set(TYPES)
    assert replace(scenes(1)[0], noise_seed=1).key == scenes(1)[0].key
