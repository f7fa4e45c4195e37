"""Re-ranking's scores: those of pairs one by one, with what belongs to several pairs computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_helpers import enlarge_weights, tiny_config, write_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.tasks import rerank
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.feature_spool import FeatureSpool
from lavis_lite.tasks.gallery import Gallery
from lavis_lite.tasks.heldout import evaluating
from lavis_lite.tasks.pretrain import ImageTextPretrainTask
from lavis_lite.tasks.rerank import match_candidates
from tests.retrieval_world import WORDS, Matcher, Pictures

PROJECTED = 12  # numbers that `Matcher` projects an image to


def gallery_of(embeds: Tensor, tokens: object, texts: list[str], similarity: Tensor) -> Gallery:
    spool = FeatureSpool(len(embeds))
    spool.append(embeds)
    return Gallery(
        rows=list(range(len(embeds))),
        texts=texts,
        image_of_text=torch.arange(len(texts)) % len(embeds),
        similarity=similarity,
        tokens=tokens,
        text_lengths=tokens.attention_mask.sum(dim=1),  # type: ignore[attr-defined]
        mine=torch.arange(len(embeds)),
        embeds=spool,
        unreadable=0,
    )


@pytest.mark.parametrize("images_a_block", [2, 100])
@torch.inference_mode()
def test_candidates_score_as_pairs_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_a_block: int
) -> None:
    """The model's own halves of a pair against its whole, one pair at a time and nothing shared."""
    torch.manual_seed(0)
    model = Blip2QFormer.from_config(tiny_config(write_tokenizer(tmp_path))).eval()
    enlarge_weights(model, std=0.3)
    draw = torch.Generator().manual_seed(1)
    words = ["red", "blue", "dog", "cat", "mat", "big", "small"]
    texts = [
        " ".join(words[int(w)] for w in torch.randint(7, (1 + number % 8,), generator=draw))
        for number in range(17)
    ]
    images = torch.randn(5, 3, 16, 16, generator=draw)
    embeds = model.encode_image(images)
    monkeypatch.setattr(rerank, "IMAGE_BLOCK", model.project_image(embeds[:1]).numel() * images_a_block)
    monkeypatch.setattr(rerank, "TEXT_BLOCK", 6)
    monkeypatch.setattr(rerank, "MAX_PAIRS", 4)
    similarity = torch.randn(5, 17, generator=draw)
    gallery = gallery_of(embeds, model.tokenize(texts), texts, similarity)
    found = match_candidates(model, gallery, 3, EvalArgs())
    one_by_one = torch.stack(
        [
            torch.cat([model.match_logits(embeds[i : i + 1], model.tokenize([text])) for text in texts])
            for i in range(5)
        ]
    )
    assert one_by_one.std(dim=(0, 1)).min() > 0.1  # else any pair's score would do for another's
    assert found.texts.equal(similarity.topk(3, dim=1).indices)
    assert found.images.equal(similarity.T.topk(3, dim=1).indices)
    for image, row in enumerate(found.texts):
        torch.testing.assert_close(found.text_logits[image], one_by_one[image, row], rtol=0, atol=1e-4)
    for text, row in enumerate(found.images):
        torch.testing.assert_close(found.image_logits[text], one_by_one[row, text], rtol=0, atol=1e-4)


def test_images_that_share_their_texts_share_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kinds of images, one after the other, each with texts of its own: every text is begun once."""
    kinds, each = 4, 6
    draw = torch.Generator().manual_seed(0)
    kind_of_image = torch.arange(kinds * each) % kinds
    kind_of_text = torch.arange(kinds * each * 2) % kinds
    similarity = (kind_of_image[:, None] == kind_of_text).float()
    similarity += torch.rand(similarity.shape, generator=draw) / 10
    texts = [f"{WORDS[number % 40]} {WORDS[number // 40]}" for number in range(len(kind_of_text))]
    embeds = torch.randn(len(kind_of_image), 4, 12, generator=draw)
    model = Matcher()
    gallery = gallery_of(embeds, model.tokenize(texts), texts, similarity)
    with torch.inference_mode():
        monkeypatch.setattr(rerank, "IMAGE_BLOCK", PROJECTED * each)
        together = match_candidates(model, gallery, 5, EvalArgs())
        assert model.texts_projected == len(texts)
        monkeypatch.setattr(rerank, "IMAGE_BLOCK", PROJECTED)
        alone = match_candidates(model, gallery, 5, EvalArgs())
    torch.testing.assert_close(together.text_logits, alone.text_logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.image_logits, alone.image_logits, rtol=0, atol=1e-6)


class Ended(Matcher):
    """Is ended, as by a signal, before so many pairs are scored."""

    ends_at = 1 << 30

    def match_logits(self, images: Any, texts: Any) -> Tensor:
        if self.pairs_seen + len(texts.input_ids) >= self.ends_at:
            raise KeyboardInterrupt
        return super().match_logits(images, texts)


def evaluated(model: Matcher, folder: Path, *, data: Pictures | None = None, k: int = 5) -> dict[str, float]:
    task = ImageTextPretrainTask(k_test=k, loss_batches=0)
    args = EvalArgs(batch_size=5, folder=folder, label="test")
    return task.evaluate(model, data or Pictures(), loader_args=args).metrics


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """An evaluation was ended in its last batch; how many pairs it takes as a whole."""
    monkeypatch.setattr(rerank, "IMAGE_BLOCK", PROJECTED * 4)
    monkeypatch.setattr(rerank, "MAX_PAIRS", 8)
    monkeypatch.setattr(rerank, "KEPT_PAIRS", 20)
    whole = Matcher()
    evaluated(whole, tmp_path / "whole")
    assert not (tmp_path / "whole" / "rerank_test").exists()
    model = Ended()
    model.ends_at = whole.pairs_seen
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, tmp_path)
    assert len(list((tmp_path / "rerank_test").iterdir())) > 5
    return whole.pairs_seen


def test_the_same_evaluation_goes_on_where_it_was_ended(ended: int, tmp_path: Path) -> None:
    model = Matcher()
    metrics = evaluated(model, tmp_path)
    assert 0 < model.pairs_seen < ended / 2
    assert metrics == evaluated(Matcher(), tmp_path / "whole")
    assert not (tmp_path / "rerank_test").exists()


def test_fewer_candidates_use_what_is_there(ended: int, tmp_path: Path) -> None:
    assert evaluated(Matcher(), tmp_path, k=3) == evaluated(Matcher(), tmp_path / "whole", k=3)


@pytest.mark.parametrize("changed", ["head", "picture", "caption"])
def test_another_model_or_other_data_start_anew(
    ended: int, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = Matcher(), Pictures()
    if changed == "head":
        with torch.no_grad():
            model.match.bias += 0.5
    elif changed == "picture":
        data.pixels[3] += 0.01
    else:
        data.texts[3][0] += " w1"
    evaluated(model, tmp_path, data=data)
    assert model.pairs_seen > ended / 2
    assert "rerank_test aren't used: they are of other weights, texts, " in capsys.readouterr().err


def test_a_disk_that_fills_up_does_not_end_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some of the scores: they are removed in the end as always."""
    written = 0

    def filling(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("lavis_lite.tasks.rerank_journal.atomic_write", filling)
    monkeypatch.setattr(rerank, "IMAGE_BLOCK", PROJECTED * 4)
    monkeypatch.setattr(rerank, "MAX_PAIRS", 8)
    monkeypatch.setattr(rerank, "KEPT_PAIRS", 20)
    assert evaluated(Matcher(), tmp_path)["num_images"] == 23
    assert capsys.readouterr().err.count("scores are not kept while they are made: [Errno 28]") == 1
    assert written == 3 and not (tmp_path / "rerank_test").exists()


class Conversions(TorchDispatchMode):
    """Counts how often a weight is converted to bf16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.weight.data_ptr():
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "MAX_PAIRS", 8)
    draw = torch.Generator().manual_seed(0)
    model, texts = Matcher(), WORDS[:20]
    gallery = gallery_of(
        torch.randn(6, 4, 12, generator=draw),
        model.tokenize(texts),
        texts,
        torch.randn(6, 20, generator=draw),
    )
    with evaluating(model), Conversions(model.match.weight) as conversions:
        match_candidates(model, gallery, 5, EvalArgs(precision="bf16"))
    assert model.pairs_seen > 3 * 8 and conversions.count == 1
