"""Questions into the Q-Former and the language model: against Hugging Face, from two checkpoints, answers ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import OPT, T5, hf_model, stage2_config, without_key_bias
from generative_helpers import FAMILIES
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from torch import Tensor
from vqa_helpers import ANSWERS, PROMPT, QUESTIONS, question_config, question_model, question_samples

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError, ConfigError, InputError
from lavis_lite.models import ranking
from lavis_lite.models.base import build_model, without_sources
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.convert.bert import load_bert
from lavis_lite.models.text_side import in_text_side

CANDIDATES = ["red", "a small blue cat on the mat", "yes", "no", "two", "in the center", "a", "red"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Blip2Generative:
    return question_model(tmp_path, request.param)


# --- the Q-Former reads the question ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("llm", [OPT, T5], ids=["opt", "t5"])
def test_parity_with_instruct_blip(tmp_path: Path, llm: dict[str, Any]) -> None:
    theirs = hf_model("InstructBlipForConditionalGeneration", llm)
    enlarge_weights(theirs)
    without_key_bias(theirs)
    theirs.vision_model.post_layernorm.eps = 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    section = {
        **{"prompt": PROMPT, "qformer_text_input": True, "max_txt_len": 12},
        "tokenizer": write_tokenizer(tmp_path / "bert"),
    }
    model = Blip2Generative.from_config({**stage2_config(llm), **section}).eval()
    model.load_checkpoint(tmp_path / "theirs")
    pixels = torch.randn(4, 3, 28, 28)
    tokens = model.tokenize(QUESTIONS)
    assert not tokens.attention_mask.all(), "rows of different lengths"
    queries = theirs.query_tokens.expand(4, -1, -1)
    seen = theirs.qformer(
        input_ids=tokens.input_ids,
        attention_mask=torch.cat([torch.ones(queries.shape[:2]), tokens.attention_mask], 1).long(),
        query_embeds=queries,
        encoder_hidden_states=theirs.vision_model(pixels).last_hidden_state,
    ).last_hidden_state[:, : queries.shape[1]]
    ours = model.visual_prompt(pixels, QUESTIONS)
    torch.testing.assert_close(ours, theirs.language_projection(seen), rtol=0, atol=1e-4)
    assert (ours - model.visual_prompt(pixels, QUESTIONS[::-1])).abs().max() > 0.1
    written = model.trainable_state_dict()
    expected = {
        name for name in model.state_dict() if not name.startswith(("visual_encoder", "language_model"))
    }
    assert expected <= set(written), "also what nobody trains of the text side"


def test_training_reaches_all_but_what_nobody_reads(model: Blip2Generative) -> None:
    model.train()
    model(question_samples())["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set(), "DDP waits for each of them"
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and in_text_side(name)}
    assert frozen and all(".layer.3." in name for name in frozen)
    assert model.Qformer.embeddings.word_embeddings.weight.grad is not None


def test_the_loss_is_on_the_answer_behind_the_filled_prompt(model: Blip2Generative) -> None:
    samples = question_samples()
    lm = model.language_model
    visual = model.visual_prompt(samples["image"], QUESTIONS)
    prompts = [PROMPT.replace("{}", question) for question in QUESTIONS]
    expected = lm.answer_losses(visual, prompts, ANSWERS, max_length=12)
    torch.testing.assert_close(model(samples)["loss"], expected.mean())
    other = {**samples, "text_input": QUESTIONS[::-1]}
    assert (model(other)["loss"] - model(samples)["loss"]).abs() > 1e-4
    long = PROMPT.replace("{}", "is there a small blue cat on the mat " * 4)
    whole = lm.answer_losses(visual[:1], [long], ["yes"], max_length=12)
    cut = lm.answer_losses(visual[:1], [" ".join(long.split()[:11])], ["yes"], max_length=12)
    assert not torch.allclose(whole, cut), "a long question must not cost the end of the prompt"


def test_without_the_option_the_queries_see_no_question(tmp_path: Path) -> None:
    model = question_model(tmp_path, qformer_text_input=False)
    assert not any(in_text_side(name) for name, _ in model.named_parameters())
    image = tiny_samples()["image"]
    assert torch.equal(model.visual_prompt(image, QUESTIONS), model.visual_prompt(image))
    assert model(question_samples())["loss"].isfinite()
    assert len(model.predict_answers(question_samples(), num_beams=2)) == 4
    model.prompt = "a photo of"
    with pytest.raises(InputError, match=r"would learn to say the questions; set model\.prompt"):
        model(question_samples())


# --- where the text side comes from -------------------------------------------------------------------------


def save(folder: Path, model: Any) -> Path:
    ckpt.save_checkpoint(folder / ckpt.FOLDER, 1, model=model.trainable_state_dict(), optimizer={}, state={})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Any]:
    """A stage-1 run and a stage-2 run with different weights, and the section of a model that reads questions."""
    stage1 = Blip2QFormer.from_config(tiny_config(write_tokenizer(tmp_path / "bert")))
    enlarge_weights(stage1, seed=1)
    stage2 = question_model(tmp_path, qformer_text_input=False, prompt="")
    return {
        "stage1": (str(save(tmp_path / "stage1", stage1)), stage1.state_dict()),
        "stage2": (str(save(tmp_path / "stage2", stage2)), stage2.state_dict()),
        "section": {"arch": "blip2_opt", **question_config(tmp_path)},
    }


def holds(model: Any, expected: dict[str, Tensor], *, text: bool) -> bool:
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("Qformer")}
    chosen = {name: tensor for name, tensor in own.items() if in_text_side(name) == text}
    return bool(chosen) and all(torch.equal(tensor, expected[name]) for name, tensor in chosen.items())


def test_stage_2_and_the_text_side_of_stage_1(runs: dict[str, Any], tmp_path: Path) -> None:
    (first, weights1), (second, weights2) = runs["stage1"], runs["stage2"]
    section = {**runs["section"], "pretrained": second, "qformer_text_from": first}
    model: Any = build_model(section)
    assert holds(model, weights1, text=True) and holds(model, weights2, text=False)
    assert torch.equal(model.llm_proj.weight, weights2["llm_proj.weight"])
    # Fine-tuned, it holds all of that itself: the stage-1 run may be gone.
    enlarge_weights(model.Qformer, seed=4)
    tuned = str(save(tmp_path / "tuned", model))
    again = build_model({**section, "pretrained": tuned, "qformer_text_from": str(tmp_path / "gone")})
    assert holds(again, model.state_dict(), text=True) and holds(again, model.state_dict(), text=False)
    assert without_sources(section)["qformer_text_from"] is None


def test_a_stage_1_checkpoint_brings_its_text_side(runs: dict[str, Any]) -> None:
    path, weights = runs["stage1"]
    model = build_model({**runs["section"], "pretrained": path})
    assert holds(model, weights, text=True) and holds(model, weights, text=False)


def test_bert_begins_a_q_former_that_reads_and_predicts_nothing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = question_model(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40}
    size = len(model.tokenizer) - 1  # without [DEC]
    config = transformers.BertConfig(vocab_size=size, max_position_embeddings=20, **shape)
    bert = transformers.BertForMaskedLM(config)
    bert.save_pretrained(tmp_path / "masked")
    load_bert(model.Qformer, str(tmp_path / "masked"))
    words = model.Qformer.embeddings.word_embeddings.weight
    assert torch.equal(words[:size], bert.bert.embeddings.word_embeddings.weight)


def test_a_text_side_that_nothing_tells_is_an_error(runs: dict[str, Any], tmp_path: Path) -> None:
    section = {**runs["section"], "pretrained": runs["stage2"][0]}
    with pytest.raises(CheckpointError, match=r"set model\.qformer_text_from to the stage-1 run"):
        build_model(section)
    with pytest.raises(CheckpointError, match="reads no text; name a stage-1 run"):
        build_model({**section, "qformer_text_from": runs["stage2"][0]})
    tensors = dict(runs["stage1"][1])
    del tensors["Qformer.bert.encoder.layer.2.intermediate.dense.bias"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual_encoder")}
    ckpt.save_tensors(tmp_path / "lacking.safetensors", kept)
    with pytest.raises(CheckpointError, match=r"1 missing: Qformer\.bert\.encoder\.layer\.2\.intermediate"):
        build_model({**section, "qformer_text_from": str(tmp_path / "lacking.safetensors")})


def test_configuration_mistakes(tmp_path: Path) -> None:
    config = question_config(tmp_path)
    for change, message in (
        ({"prompt": "a photo of"}, r"set model\.prompt to what asks a question, with \{\} in its place"),
        ({"max_txt_len": 21}, "3 to qformer.max_position_embeddings = 20 tokens, got 21"),
        (
            {"qformer_text_input": False, "qformer_text_from": "x"},
            "reads no text without model.qformer_text_in",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Blip2Generative.validate_config({**config, **change})


# --- answers ------------------------------------------------------------------------------------------------


def one_by_one(model: Blip2Generative, samples: dict[str, Any], answers: list[str]) -> Tensor:
    """log p of each answer from the training loss: its own pass through everything, for each image and answer."""
    scores = torch.empty(len(samples["image"]), len(answers))
    for row, question in enumerate(samples["text_input"]):
        for place, answer in enumerate(answers):
            one = {"image": samples["image"][row : row + 1], "text_input": [question]}
            visual = model.visual_prompt(one["image"], [question])
            prompt = [model.prompt.replace("{}", question)]
            losses = model.language_model.answer_losses(
                visual, prompt, [answer], max_length=model.max_txt_len
            )
            scores[row, place] = -losses.sum()
    return scores


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranking_is_scoring_one_by_one(
    family: str, conditioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "PAIRS", 5)  # several rounds, which mix images and lengths
    # Not too far apart: float32 has seven digits.
    model = question_model(tmp_path, family, std=0.1, qformer_text_input=conditioned)
    samples = question_samples()
    expected = one_by_one(model, samples, CANDIDATES)
    found = model.score_answers(samples, CANDIDATES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    answers = model.predict_answers(samples, inference_method="rank", answer_list=CANDIDATES)
    assert answers == [CANDIDATES[place] for place in expected.argmax(1).tolist()]
    ranked = model.predict_answers_with_scores(samples, inference_method="rank", answer_list=CANDIDATES)
    torch.testing.assert_close(ranked.scores, expected.amax(1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_only_the_likeliest_beginnings_are_scored_whole(model: Blip2Generative) -> None:
    samples = question_samples()
    whole = model.score_answers(samples, CANDIDATES[:-1])
    few = model.score_answers(samples, CANDIDATES[:-1], num_ans_candidates=3)
    kept = few.isfinite()
    assert kept.sum(1).tolist() == [3] * 4
    torch.testing.assert_close(few[kept], whole[kept], rtol=0, atol=1e-4)
    many = [f"{color} {number}" for color in ("red", "blue", "green") for number in range(50)]
    assert model.score_answers(samples, many).isfinite().all()
    blanks = model.score_answers(samples, [f" {answer}\n" for answer in CANDIDATES[:-1]])
    torch.testing.assert_close(blanks, whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_visual_prompt_and_question_are_read_once(
    model: Blip2Generative, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many answers: places that go through the language model's embedding beyond the answers' own."""
    seen: list[int] = []
    inner = model.language_model.model
    hook = (inner.get_encoder() if hasattr(inner, "encoder") else inner).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            len(kwargs["inputs_embeds"]) if kwargs.get("inputs_embeds") is not None else 0
        ),
        with_kwargs=True,
    )
    calls: list[int] = []
    pairs = model.Qformer.encode_pairs
    monkeypatch.setattr(model.Qformer, "encode_pairs", lambda *a: calls.append(1) or pairs(*a))
    model.score_answers(question_samples(), CANDIDATES * 4)
    hook.remove()
    assert sum(seen) == 4 and calls == [1]


@torch.no_grad()
def test_generated_answers_follow_the_prompt(model: Blip2Generative) -> None:
    samples = question_samples()
    said = model.predict_answers(samples, num_beams=3, max_len=4)
    filled = {"image": samples["image"], "prompt": [PROMPT.replace("{}", q) for q in QUESTIONS]}
    by_hand = model.generate(
        {**filled, "text_input": QUESTIONS}, num_beams=3, max_length=4, min_length=1, length_penalty=-1.0
    )
    assert said == by_hand and len(set(said)) > 1
    assert said == model.generate(samples, num_beams=3, max_length=4, length_penalty=-1.0)
    assert said == model.predict_answers(samples, num_beams=3, max_len=4, prompt=PROMPT)
    other = model.predict_answers_with_scores(samples, num_beams=3, max_len=4, prompt="{}")
    assert other.scores.shape == (4,)


@torch.no_grad()
def test_confidence_is_the_answers_probability_however_it_was_found(model: Blip2Generative) -> None:
    samples = question_samples()
    ranked = model.predict_answers_with_scores(samples, inference_method="rank", answer_list=CANDIDATES)
    assert torch.equal(ranked.scores, ranked.log_likelihoods)
    # One beam is greedy, which no penalty changes.
    found, other = (
        model.predict_answers_with_scores(samples, num_beams=1, max_len=4, length_penalty=penalty)
        for penalty in (-1.0, 1.0)
    )
    assert found.texts == other.texts and found.confidences == other.confidences
    for answers in (ranked, found):
        assert answers.confidences == pytest.approx(answers.log_likelihoods.exp().tolist())
        assert all(0 < confidence < 1 for confidence in answers.confidences)


@torch.no_grad()
def test_generated_answers_to_one_question_and_in_turns(model: Blip2Generative) -> None:
    samples = question_samples()
    shared = {"image": samples["image"], "text_input": QUESTIONS[0]}
    assert len(model.predict_answers(shared, num_beams=1)) == 4
    answer, history = model.chat(samples["image"][0], [], "what is it", max_new_tokens=4)
    assert history == [("what is it", answer)]


@torch.no_grad()
def test_a_question_beyond_the_positions_is_one_clear_line(model: Blip2Generative) -> None:
    image = question_samples()["image"][:1]
    config = model.language_model.model.config
    limit = config.max_position_embeddings if config.model_type == "opt" else None

    def asked(words: int) -> dict[str, Any]:
        return {"image": image, "text_input": ["a " * words], "text_output": [CANDIDATES[1]]}

    calls = (
        lambda words: model.predict_answers(asked(words), num_beams=2, max_len=20, min_len=20),
        lambda words: model.score_answers(asked(words), CANDIDATES),
        lambda words: model(asked(words)),
    )
    for call in calls:
        call(40)
        if limit is None:  # relative (T5) and rotary (Llama) positions go on
            call(200)
            continue
        # The question fits and some answer behind it doesn't; not even the question fits.
        for words in (limit - model.visual_prompt(image, ["a"]).shape[1] - 8, 200):
            with pytest.raises(
                InputError, match=rf"text take \d+ places and the language model has {limit}: shorten"
            ):
                call(words)


def test_mistakes_are_one_clear_line(model: Blip2Generative) -> None:
    samples = question_samples()
    image = samples["image"]
    for call, message in (
        (lambda: model.predict_answers({"image": image}), r"samples\['text_input'\] must be a string or"),
        (lambda: model.predict_answers(samples, prompt="what?"), r"prompt 'what\?' has no \{\}"),
        (lambda: model.predict_answers(samples, inference_method="rank"), "needs answer_list"),
        (lambda: model.predict_answers(samples, inference_method="guess"), "neither generate nor rank"),
        (lambda: model.score_answers(samples, ["a"], num_ans_candidates=0), "must be at least 1"),
        (lambda: model.score_answers(samples, [1]), r"answer_list\[0\] must be a text .*, got 1"),  # type: ignore[list-item]
        (lambda: model.score_answers(samples, ["a", " "]), r"answer_list\[1\] must be a text .*, got ' '"),
        (lambda: model.generate({"image": image}), "the question is missing"),
        (lambda: model({**samples, "text_output": ["a", "", "b", "c"]}), "has an empty answer"),
        (lambda: model({"image": image, "text_input": QUESTIONS}), r"samples\['text_output'\] must be"),
    ):
        with pytest.raises(InputError, match=message):
            call()
