"""Features, scores and captions of stage 1."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.decoding import DecodingRules, Search, beam_search, decode, sample
from lavis_lite.models.qformer_decoder import QFormerDecoder
from lavis_lite.models.tokenizer import TextTokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Blip2QFormer:
    torch.manual_seed(0)
    cls = registry.get_model_class("blip2_image_text_matching")
    model = cls.from_config(tiny_config(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))).eval()
    enlarge_weights(model, std=0.3)
    return model


def test_features_have_lavis_names_and_shapes(model: Blip2QFormer) -> None:
    samples = tiny_samples(2)
    image = model.extract_features(samples, mode="image")
    assert image.image_embeds.shape == (2, 5, 32) and image.image_embeds_proj.shape == (2, 5, 16)
    text = model.extract_features({"text_input": samples["text_input"]}, mode="text")
    tokens = model.tokenize(samples["text_input"])
    assert text.text_embeds.shape == (*tokens.input_ids.shape, 32)
    assert (text.text_embeds.abs().sum(-1) > 0).equal(tokens.attention_mask), "zero at padding, only there"
    torch.testing.assert_close(text.text_embeds_proj[:, 0], model.text_features(tokens), rtol=0, atol=1e-5)
    assert model.extract_features(samples).multimodal_embeds.shape == (2, 5, 32)
    assert image.text_embeds is None and text.image_embeds is None


def test_what_extract_features_lacks_is_named(model: Blip2QFormer) -> None:
    with pytest.raises(ValueError, match="image, text, multimodal"):
        model.extract_features(tiny_samples(1), mode="both")
    with pytest.raises(ValueError, match=r"'image' needs samples\['image'\]"):
        model.extract_features({"text_input": "a dog"}, mode="image")
    with pytest.raises(ValueError, match=r"samples\['text_input'\]"):
        model.extract_features({"image": torch.zeros(1, 3, 16, 16)})


def test_scores_are_in_their_ranges_and_agree_with_lavis_calls(model: Any) -> None:
    samples = tiny_samples(4)
    itc, itm = model.compute_itc(samples), model.compute_itm(samples)
    assert itc.shape == itm.shape == (4,)
    assert (itc.abs() <= 1 + 1e-6).all() and ((itm >= 0) & (itm <= 1)).all()
    with torch.no_grad():
        logits, cosine = model(samples, match_head="itm"), model(samples, match_head="itc")
    assert logits.shape == (4, 2) and cosine.shape == (4, 1)
    torch.testing.assert_close(logits.softmax(1)[:, 1], itm)
    torch.testing.assert_close(cosine[:, 0], itc)
    one = model.compute_itm({"image": samples["image"][2:3], "text_input": samples["text_input"][2]})
    torch.testing.assert_close(one, itm[2:3], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="neither itm nor itc"):
        model(samples, match_head="both")


@torch.no_grad()
def test_step_by_step_decoding_equals_the_itg_pass(model: Blip2QFormer) -> None:
    image = tiny_samples(3)["image"]
    queries = model.Qformer.encode_queries(model.query_tokens, model.project_image(model.encode_image(image)))
    ids = torch.randint(5, 19, (3, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = model.tokenizer.dec_id
    whole = model.Qformer.encode_text(TextTokens(ids, torch.ones_like(ids, dtype=torch.bool)), prefix=queries)
    expected = model.Qformer.lm_logits(whole).view(3, 6, -1)
    decoder = QFormerDecoder(model.Qformer, queries)
    for place in range(6):
        torch.testing.assert_close(decoder.step(ids[:, place]), expected[:, place], rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "num_captions": 2}])
def test_a_batch_says_what_its_images_say_alone(model: Blip2QFormer, options: dict[str, int]) -> None:
    image = tiny_samples(5)["image"] * 3
    options = {"min_length": 2, "max_length": 9, **options}
    together = model.generate({"image": image}, **options)
    alone = [text for row in image for text in model.generate({"image": row[None]}, **options)]
    assert together == alone
    assert len(set(together)) > 1, "the images must lead to different captions to prove anything"


def test_nucleus_sampling(model: Blip2QFormer) -> None:
    samples = tiny_samples(2)
    torch.manual_seed(0)
    texts = model.generate(
        samples, use_nucleus_sampling=True, num_captions=4, top_p=0.95, min_length=3, max_length=8
    )
    assert len(texts) == 8 and len(set(texts)) > 1
    narrow = model.generate(samples, use_nucleus_sampling=True, top_p=1e-6, min_length=3, max_length=8)
    assert narrow == model.generate(samples, num_beams=1, min_length=3, max_length=8)


def test_a_prompt_is_refused_where_it_would_be_overlooked(model: Blip2QFormer) -> None:
    samples = tiny_samples()
    with pytest.raises(InputError, match=r"samples\['prompt'\]: a stage-1 model takes no prompt"):
        model.generate({**samples, "prompt": "a photo of"}, num_beams=1, max_length=3, min_length=1)
    plain = model.generate(samples, num_beams=1, max_length=3, min_length=1)
    assert plain == model.generate({**samples, "prompt": None}, num_beams=1, max_length=3, min_length=1)


def test_generate_does_not_exceed_the_length_of_training(model: Blip2QFormer) -> None:
    model.generate(tiny_samples(1), max_length=1000, min_length=0)


class Markov:
    """Logits that depend on the last token of the row and on its place; counts what it was asked."""

    def __init__(self, rows: int, vocabulary: int, seed: int) -> None:
        self.table = torch.randn(6, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
        self.place = 0

    def step(self, ids: Tensor) -> Tensor:
        self.place += 1
        return self.table[self.place - 1][ids]

    def reorder(self, rows: Tensor) -> None:
        pass


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_wide_beam_search_finds_the_best_of_all_texts(seed: int, length_penalty: float) -> None:
    vocabulary, longest, end = 4, 4, 3
    rules = DecodingRules(end_id=end, max_length=longest, length_penalty=length_penalty)
    table = Markov(1, vocabulary, seed).table.log_softmax(-1)
    scores: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(vocabulary), repeat=longest):
        said = text[: text.index(end) + 1] if end in text else text
        total = sum(
            float(table[i, before, now])
            for i, (before, now) in enumerate(zip((0, *said), said, strict=False))
        )
        scores[said] = total / len(said) ** length_penalty
    best = sorted(scores, key=lambda said: -scores[said])[:2]
    beams = vocabulary**longest
    found = beam_search(
        Markov(beams, vocabulary, seed), torch.zeros(1, dtype=torch.long), rules, num_beams=beams, keep=2
    )
    for place, (row, said) in enumerate(zip(found.ids[0].tolist(), best, strict=True)):
        assert row == [*said, *[end] * (len(row) - len(said))]
        plain = scores[said] * len(said) ** length_penalty
        assert float(found.log_likelihoods[0, place]) == pytest.approx(plain, abs=1e-4)


RULES: dict[str, Any] = {
    "min_length": 2,
    "repetition_penalty": 3.0,
    "forbidden_ids": (1,),
    "length_penalty": -1.0,
}


@pytest.mark.parametrize("search", [Search(3, 2), Search(1), Search(1, 2, nucleus=True)])
@pytest.mark.parametrize("rules", [{}, RULES])
def test_log_likelihoods_are_the_decoders_own(search: Search, rules: dict[str, Any]) -> None:
    """Whatever the search is told to avoid, and however it ranks, of every text that it returns."""
    torch.manual_seed(0)
    end, temperature = 3, 2.0 if search.nucleus else 1.0
    limits = DecodingRules(end_id=end, max_length=5, temperature=temperature, **rules)
    found = decode(Markov(2 * search.rows, 6, 1), torch.tensor([0, 2]), limits, search)
    table = Markov(1, 6, 1).table.log_softmax(-1)
    for row, start in enumerate((0, 2)):
        for place, ids in enumerate(found.ids[row].tolist()):
            said = ids[: ids.index(end) + 1] if end in ids else ids
            before = (start, *said)
            plain = sum(float(table[i, before[i], now]) for i, now in enumerate(said))
            assert float(found.log_likelihoods[row, place]) == pytest.approx(plain, abs=1e-4)


def test_decoding_rules() -> None:
    rules = DecodingRules(end_id=3, max_length=5, min_length=2, repetition_penalty=2.0, forbidden_ids=(1,))
    logits = torch.tensor([[1.0, 9.0, -1.0, 5.0]])
    first = rules.log_probs(logits, torch.empty(1, 0, dtype=torch.long))
    assert first[0, 1] == float("-inf") and first[0, 3] == float("-inf")
    later = rules.log_probs(logits, torch.tensor([[0, 2]]))
    # Said before: a positive logit is halved, a negative one doubled; the end is allowed from now on.
    torch.testing.assert_close(later[0, [0, 2, 3]], torch.tensor([0.5, -2.0, 5.0]).log_softmax(0))
    for wrong in ({"max_length": 0}, {"top_p": 0.0}, {"temperature": 0.0}, {"min_length": 31}):
        with pytest.raises(ValueError):
            DecodingRules(end_id=3, **wrong)
    with pytest.raises(ValueError, match="captions"):
        beam_search(Markov(1, 4, 0), torch.zeros(1, dtype=torch.long), rules, num_beams=2, keep=3)


def test_texts_go_on_after_their_neighbours_ended() -> None:
    rules = DecodingRules(end_id=3, max_length=4)
    said = sample(Markov(4, 4, 1), torch.tensor([0, 1, 2, 0]), rules, greedy=True).ids[:, 0]
    for row, start in zip(said.tolist(), [0, 1, 2, 0], strict=True):
        alone = sample(Markov(1, 4, 1), torch.tensor([start]), rules, greedy=True).ids[0, 0].tolist()
        assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {3}


def test_captions_end_where_the_model_ends_them(model: Blip2QFormer, tmp_path: Path) -> None:
    # A decoder bias that makes the end certain gives empty captions unless a minimum is asked for.
    bias = model.Qformer.cls["predictions"].bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[model.tokenizer.sep_id] += 1000
        assert model.generate(tiny_samples(2), min_length=0) == ["", ""]
        assert all(model.generate(tiny_samples(2), min_length=3))
    finally:
        with torch.no_grad():
            bias.copy_(before)
