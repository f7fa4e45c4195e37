"""The Q-Former against hand-drawn masks, Hugging Face's, and itself with the sharing undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_helpers import enlarge_weights, tiny_config, write_tokenizer
from torch import Tensor

from lavis_lite.common.errors import ConfigError
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.convert.formats import our_names
from lavis_lite.models.qformer import QFormer, QFormerConfig
from lavis_lite.models.qformer_states import RealTokens
from lavis_lite.models.tokenizer import TextTokens

Q, T, VOCAB, IMAGE_WIDTH = 2, 3, 11, 6


def small_qformer(num_layers: int = 1, **changes: Any) -> QFormer:
    config = QFormerConfig(
        num_layers=num_layers,
        hidden_size=16,
        num_heads=2,
        intermediate_size=20,
        num_query_token=Q,
        dropout=0.0,
        max_position_embeddings=9,
        **changes,
    )
    qformer = QFormer(config, vocab_size=VOCAB, image_width=IMAGE_WIDTH).eval()
    enlarge_weights(qformer)
    return qformer


def tokens_of(*rows: list[int]) -> TextTokens:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return TextTokens(ids, mask)


def seen_by(outputs: Any, queries: Tensor, ids: list[int]) -> list[str]:
    """For each output row, an x for every one of Q queries and T tokens whose change changes it."""
    base = outputs(queries, ids)
    columns = []
    for column in range(Q + T):
        other_queries, other_ids = queries.clone(), list(ids)
        if column < Q:
            other_queries[0, column, 0] += 1.0
        else:
            other_ids[column - Q] = 10
        columns.append((outputs(other_queries, other_ids) - base).abs().amax(-1) > 1e-6)
    return ["".join("x" if column[row] else "." for column in columns) for row in range(len(base))]


@torch.no_grad()
def test_masks_are_the_hand_drawn_tables() -> None:
    # One block: what a row's output depends on is what its mask lets it see (and itself).
    qformer = small_qformer()
    queries, ids = torch.randn(1, Q, 16), [2, 5, 6]
    image_kv = qformer.project_image(torch.randn(1, 4, IMAGE_WIDTH))

    def unimodal(queries: Tensor, ids: list[int]) -> Tensor:
        return torch.cat(
            [qformer.encode_queries(queries, image_kv).output[0], qformer.encode_text(tokens_of(ids))]
        )

    def causal(queries: Tensor, ids: list[int]) -> Tensor:
        states = qformer.encode_queries(queries, image_kv)
        return torch.cat([states.output[0], qformer.encode_text(tokens_of(ids), prefix=states)])

    def bidirectional_queries(queries: Tensor, ids: list[int]) -> Tensor:
        return qformer.encode_pairs(queries, image_kv, tokens_of(ids))[0]

    assert seen_by(unimodal, queries, ids) == ["xx...", "xx...", "..xxx", "..xxx", "..xxx"]
    assert seen_by(causal, queries, ids) == ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert seen_by(bidirectional_queries, queries, ids) == ["xxxxx", "xxxxx"]


@torch.no_grad()
def test_no_later_token_changes_an_earlier_one_under_the_itg_mask() -> None:
    qformer = small_qformer(num_layers=4)
    queries = torch.randn(1, Q, 16)
    states = qformer.encode_queries(queries, qformer.project_image(torch.randn(1, 4, IMAGE_WIDTH)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        ids = torch.randint(1, VOCAB, (8,), generator=generator).tolist()
        base = qformer.encode_text(tokens_of(ids), prefix=states)
        for place in range(1, 8):
            changed = [*ids[:place], *torch.randint(1, VOCAB, (8 - place,), generator=generator).tolist()]
            other = qformer.encode_text(tokens_of(changed), prefix=states)
            torch.testing.assert_close(other[:place], base[:place], rtol=0, atol=1e-6)
            if changed[place] != ids[place]:
                assert (other[place] - base[place]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 4])
def test_padding_and_neighbours_change_nothing(num_layers: int) -> None:
    qformer = small_qformer(num_layers)
    queries = torch.randn(1, Q, 16)
    rows = [[2, 5, 6, 7, 3], [2, 3], [2, 9, 3]]
    image_kv = qformer.project_image(torch.randn(3, 4, IMAGE_WIDTH))
    states = qformer.encode_queries(queries, image_kv)
    batch = tokens_of(*rows)
    for tokens in (batch, batch.padded(9)):
        text = qformer.encode_text(tokens).split([len(row) for row in rows])
        first = qformer.encode_text(tokens, read="first")
        said = qformer.encode_text(tokens, prefix=states).split([len(row) for row in rows])
        paired = qformer.encode_pairs(queries, image_kv, tokens)
        for i, row in enumerate(rows):
            alone, one = tokens_of(row), image_kv[i : i + 1]
            own = qformer.encode_queries(queries, one)
            torch.testing.assert_close(text[i], qformer.encode_text(alone), rtol=0, atol=2e-6)
            torch.testing.assert_close(first[i], text[i][0], rtol=0, atol=2e-6)
            torch.testing.assert_close(said[i], qformer.encode_text(alone, prefix=own), rtol=0, atol=2e-6)
            torch.testing.assert_close(
                paired[i], qformer.encode_pairs(queries, one, alone)[0], rtol=0, atol=2e-6
            )


@torch.no_grad()
def test_one_image_serves_many_texts_like_its_copies() -> None:
    qformer = small_qformer(4)
    queries = torch.randn(1, Q, 16)
    image_kv = qformer.project_image(torch.randn(2, 4, IMAGE_WIDTH))
    tokens = tokens_of([2, 5, 3], [2, 6, 7, 3], [2, 3], [2, 8, 3])
    shared = qformer.encode_pairs(queries, image_kv, tokens)
    copied = qformer.encode_pairs(queries, image_kv[torch.tensor([0, 0, 1, 1])], tokens)
    torch.testing.assert_close(shared, copied, rtol=0, atol=2e-6)
    groups = qformer.encode_pairs(queries, [(image_kv[:1], 2), (image_kv[[1, 1]], 1)], tokens)
    torch.testing.assert_close(groups, copied, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="3 images can't serve 4 texts"):
        qformer.encode_pairs(queries, [(image_kv, 1), (image_kv[:1], 1)], tokens)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_a_text_begun_once_serves_many_images(num_layers: int) -> None:
    qformer = small_qformer(num_layers)
    queries = torch.randn(1, Q, 16)
    image_kv = qformer.project_image(torch.randn(3, 4, IMAGE_WIDTH))
    tokens = tokens_of([2, 5, 3], [2, 6, 7, 3])
    rows = torch.tensor([1, 0, 1])
    begun = qformer.begin_pairs(queries, tokens)[rows]
    afresh = qformer.encode_pairs(queries, image_kv, tokens[rows])
    torch.testing.assert_close(qformer.encode_pairs(queries, image_kv, begun), afresh, rtol=0, atol=2e-6)
    assert (afresh[0] - afresh[2]).abs().max() > 1e-3  # the images differ, not only the texts


@torch.no_grad()
def test_features_are_read_like_what_was_projected_of_them() -> None:
    qformer = small_qformer(4)
    queries, images = torch.randn(1, Q, 16), torch.randn(2, 4, IMAGE_WIDTH)
    image_kv, tokens = qformer.project_image(images), tokens_of([2, 5, 3], [2, 6, 7, 3])
    with torch.autocast("cpu", torch.bfloat16):
        low = qformer.encode_queries(queries, images).output
        assert torch.equal(low, qformer.encode_queries(queries, qformer.project_image(images)).output)
    assert torch.equal(
        qformer.encode_queries(queries, images).output, qformer.encode_queries(queries, image_kv).output
    )
    assert torch.equal(
        qformer.encode_pairs(queries, images, tokens), qformer.encode_pairs(queries, image_kv, tokens)
    )


def test_the_gradient_of_words_is_full_and_that_of_single_look_ups() -> None:
    qformer = small_qformer(2).train()
    tokens = tokens_of([2, 5, 6, 3], [2, 6, 3])
    table = qformer.embeddings.word_embeddings.weight
    found = qformer.look_up(tokens, dec_id=4)
    assert found.words is not None and found.dec_word is not None
    weights = torch.randn_like(found.words)
    (
        qformer.lm_logits(found.words[:, 0]).sum() + (found.words * weights).sum() + found.dec_word.sum()
    ).backward()
    ours, table.grad = table.grad, None
    words = table[tokens.input_ids]
    (qformer.lm_logits(words[:, 0]).sum() + (words * weights).sum() + table[4].sum()).backward()
    assert ours is not None and not ours.is_sparse
    torch.testing.assert_close(ours, table.grad, rtol=0, atol=1e-6)


def test_dropout_differs_between_rows_of_a_batch() -> None:
    # The one-row shortcut for equal queries must not give all rows the same dropout.
    config = QFormerConfig(
        num_layers=1, hidden_size=16, num_heads=2, intermediate_size=20, num_query_token=Q, dropout=0.5
    )
    qformer = QFormer(config, vocab_size=VOCAB, image_width=IMAGE_WIDTH).train()
    image = torch.randn(1, 4, IMAGE_WIDTH).expand(2, -1, -1)
    keys, _ = qformer.encode_queries(torch.randn(1, Q, 16), qformer.project_image(image)).keys_values[0]
    assert keys.shape[0] == 2 and not torch.equal(keys[0], keys[1])


def test_real_tokens_are_packed_and_spread_back() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    real = RealTokens(mask)
    x = torch.arange(12.0).view(2, 3, 2)
    packed = real.pack(x)
    assert packed.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert real.first_of_rows(packed).tolist() == [[0, 1], [6, 7]]
    assert torch.equal(real.spread(packed), x * mask[..., None])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_heads": 5}, "num_heads"), ({"dropout": 1.0}, "dropout"), ({"num_layers": 0}, "num_layers")],
)
def test_impossible_shapes_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        QFormerConfig(**change)


@torch.no_grad()
def test_parity_with_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Blip2QFormer.from_config(tiny_config(write_tokenizer(tmp_path))).eval()
    hf = transformers.Blip2ForImageTextRetrieval(
        transformers.Blip2Config(
            vision_config={
                "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
            qformer_config={
                "vocab_size": len(model.tokenizer), "hidden_size": 32, "num_hidden_layers": 4,
                "num_attention_heads": 4, "intermediate_size": 40, "encoder_hidden_size": 24,
                "cross_attention_frequency": 2, "use_qformer_text_input": True, "max_position_embeddings": 20,
            },
            num_query_tokens=5,
            image_text_hidden_size=16,
        )
    ).eval()  # fmt: skip
    enlarge_weights(hf)
    # All but the image encoder, for which its own features stand in.
    state = {k: v for k, v in our_names(hf.state_dict()).items() if not k.startswith("visual_encoder.")}
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    ours_alone = ("visual_encoder.", "Qformer.cls.", "temp")
    assert [key for key in report.missing_keys if not key.startswith(ours_alone)] == []

    pixels = torch.randn(4, 3, 16, 16)
    tokens = model.tokenize(["a red dog", "the big blue cat sits on a mat", "a cat runs", "dogs"])
    call = {
        "pixel_values": pixels,
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask.long(),
    }
    image_kv = model.project_image(hf.vision_model(pixels).last_hidden_state)

    queries = hf.qformer(
        query_embeds=hf.query_tokens.expand(4, -1, -1),
        encoder_hidden_states=hf.vision_model(pixels).last_hidden_state,
    )
    ours = model.Qformer.encode_queries(model.query_tokens, image_kv).output
    torch.testing.assert_close(ours, queries.last_hidden_state, rtol=0, atol=1e-5)

    itc = hf(**call, use_image_text_matching_head=False)
    image_feats, text_feat = model.query_features(image_kv), model.text_features(tokens)
    torch.testing.assert_close(image_feats, itc.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_feat, itc.text_embeds, rtol=0, atol=1e-5)
    similarity = (image_feats @ text_feat.t()).amax(1)
    torch.testing.assert_close(similarity, itc.logits_per_image, rtol=0, atol=1e-5)

    itm = hf(**call, use_image_text_matching_head=True)
    logits = model.match_logits(image_kv, tokens)
    torch.testing.assert_close(logits, itm.logits_per_image, rtol=0, atol=1e-5)
    assert logits.std(0).min() > 1e-3, "all pairs alike would match whatever the masks"
