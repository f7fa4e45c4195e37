"""Starting a Q-Former from BERT: strict, and on text alone exactly BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stage1_helpers import enlarge_weights

from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.convert.bert import load_bert
from lavis_lite.models.qformer import QFormer, QFormerConfig
from lavis_lite.models.tokenizer import TextTokens

transformers = pytest.importorskip("transformers")
VOCAB = 13


def save_bert(folder: Path, *, head: bool, num_hidden_layers: int = 2) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=12,
    )
    bert = (transformers.BertForMaskedLM if head else transformers.BertModel)(config).eval()
    enlarge_weights(bert)
    bert.save_pretrained(folder)
    return bert


def qformer_for_bert(**changes: int) -> QFormer:
    shape = {
        "num_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 20,
        "max_position_embeddings": 9,
        **changes,
    }
    return QFormer(
        QFormerConfig(num_heads=2, num_query_token=3, **shape), vocab_size=VOCAB + 1, image_width=6
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_text_side_is_bert(tmp_path: Path, head: bool) -> None:
    bert = save_bert(tmp_path, head=head)
    qformer = qformer_for_bert()
    before = {name: tensor.clone() for name, tensor in qformer.state_dict().items()}
    load_bert(qformer, str(tmp_path))

    ids = torch.randint(0, VOCAB, (3, 7))
    tokens = TextTokens(ids, torch.ones_like(ids, dtype=torch.bool))
    encoder = bert.bert if head else bert
    text = qformer.encode_text(tokens)
    torch.testing.assert_close(
        text.view(3, 7, 16), encoder(input_ids=ids).last_hidden_state, rtol=0, atol=1e-5
    )
    if head:
        logits = qformer.lm_logits(text).view(3, 7, VOCAB + 1)
        torch.testing.assert_close(logits[..., :VOCAB], bert(input_ids=ids).logits, rtol=0, atol=1e-5)

    after = qformer.state_dict()
    twin = "bert.encoder.layer.1.{}.dense.weight"
    assert torch.equal(after[twin.format("intermediate_query")], after[twin.format("intermediate")])
    assert torch.equal(after[twin.format("output_query")], after[twin.format("output")])
    for name in after:
        stays = ".crossattention." in name or (name.startswith("cls.") and not head)
        assert torch.equal(after[name], before[name]) == stays, name
    added = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[added][VOCAB], before[added][VOCAB]), "[DEC] is not in BERT"


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    save_bert(tmp_path, head=True)
    with pytest.raises(CheckpointError, match=r"22 missing: bert\.encoder\.layer\.2.*and 17 more"):
        load_bert(qformer_for_bert(num_layers=3, cross_attention_freq=3), str(tmp_path))
    with pytest.raises(CheckpointError, match="unexpected"):
        load_bert(qformer_for_bert(num_layers=1), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"intermediate\.dense\.weight \(20, 16\) here \(24, 16\)"):
        load_bert(qformer_for_bert(intermediate_size=24), str(tmp_path))


def test_a_folder_without_bert_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no BERT at") as caught:
        load_bert(qformer_for_bert(), str(tmp_path))
    assert "\n" not in str(caught.value)
