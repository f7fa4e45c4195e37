"""BERT's weights for a Q-Former; strict: what the map doesn't name is an error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.qformer import QFormer
from lavis_lite.models.strict import load_strictly

# What BERT has nothing for and therefore keeps its random weights.
NOT_IN_BERT = (r"\.crossattention\.",)
# A bare encoder is saved without the prediction head, which then stays random too.
PREDICTION_HEAD = r"^cls\.predictions\."
# BERT's that have no place here: a pooler, sentence-pair head, position counters, and the decoder's second
# names for the word embedding and the prediction bias.
DROPPED = (
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_embeddings.weight",
    "bert.pooler.",
    "cls.predictions.decoder.",
    "cls.seq_relationship.",
)
QUERY_TWINS = {".intermediate.": ".intermediate_query.", ".output.": ".output_query."}


def load_bert(qformer: QFormer, source: str) -> None:
    """Start a Q-Former from BERT (section 3.1): a hub name such as `bert-base-uncased`, or a local folder.

    Raises CheckpointError when it can't be read or isn't of the Q-Former's shape.
    """
    from transformers import BertForMaskedLM

    try:
        bert, report = BertForMaskedLM.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"model.qformer.pretrained: no BERT at '{source}': {reason}") from error
    absent = {key for key in report["missing_keys"] if not key.startswith("cls.")}
    if absent:
        raise CheckpointError(f"model.qformer.pretrained: '{source}' lacks {', '.join(sorted(absent)[:5])}")
    without_head = bool(report["missing_keys"])
    state = bert.state_dict()
    own = qformer.state_dict()
    predicts = any(name.startswith("cls.") for name in own)
    tensors = bert_to_qformer(state, own, with_head=predicts and not without_head)
    optional = (*NOT_IN_BERT, PREDICTION_HEAD) if without_head else NOT_IN_BERT
    load_strictly(qformer, tensors, source=f"BERT '{source}'", optional=optional)


def bert_to_qformer(
    bert: Mapping[str, Tensor], own: Mapping[str, Tensor], *, with_head: bool = True
) -> dict[str, Tensor]:
    """BERT's weights under the Q-Former's names.

    - The queries' feed-forward network starts as a copy of the text's.
    - The embedding of token type 0, which BERT adds to every token, is added to the positions: the text side
      then computes exactly what BERT does.
    - Tables are resized: added words ([DEC]) keep their random rows in `own`; positions are cut to those
      there are.
    """
    mapped: dict[str, Tensor] = {}
    for name, tensor in bert.items():
        if name.startswith(DROPPED) or (name.startswith("cls.") and not with_head):
            continue
        mapped[name] = tensor
        for part, twin in QUERY_TWINS.items():
            # `.attention.output.` is the self-attention's own, which both share.
            if name.startswith("bert.encoder.") and part in name and ".attention." not in name:
                mapped[name.replace(part, twin)] = tensor.clone()
    positions = "bert.embeddings.position_embeddings.weight"
    token_types = bert.get("bert.embeddings.token_type_embeddings.weight")
    if token_types is not None:
        mapped[positions] = mapped[positions] + token_types[0]
    mapped[positions] = mapped[positions][: own[positions].shape[0]]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        if name in mapped:
            mapped[name] = _with_added_rows(mapped[name], own[name])
    return mapped


def _with_added_rows(table: Tensor, own: Tensor) -> Tensor:
    return torch.cat([table, own[table.shape[0] :].to(table)]) if own.shape[0] > table.shape[0] else table
