"""The two language models of the embedded world in pre-training: transformers' own OPT and T5, made small.

Legend: B documents, T tokens, L labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.models.base import BaseModel
from lavis_lite.worlds.shapes.lm_encoding import ROLES
from lavis_lite.worlds.shapes.lm_hints import CLASSES, FALSE
from lavis_lite.worlds.shapes.lm_tokenizers import MAX_LENGTH, NEWLINE, tokens

# Of T5's attention to a neighbouring word at the start: e^4 times as much as to any other.
NEIGHBOUR_BIAS = 4.0


@registry.register_model("shapes_lm_pretrain")
class ShapesLMPretrain(BaseModel):
    """Next-word loss on documents about scenes, with a weight for each role a word can have.

    Answers are one word in fifty of a document and the ones that need the context read: without more say for
    them the model learns the language and not to use what it has read.

    Args:
        family: "opt" (decoder only) or "t5" (encoder and decoder, gated GELU as in FlanT5).
        width, depth, num_heads, hidden: of the blocks; a T5 has `depth` of them on either side.
        encoder_depth: blocks of a T5's encoder, if another number.
        context_weight, prompt_weight, text_weight, answer_weight, object_weight, pair_weight: of the loss on a
            word of that role.
        hint_weight: of the loss on what a T5's encoder should know at words of questions, see `lm_hints`; 0: none.
    """

    presets: ClassVar[str] = "shapes_lm_pretrain"
    # A model that had no hints can go on with them.
    optional_keys: ClassVar[tuple[str, ...]] = (r"^hint_head\.",)

    def __init__(
        self,
        *,
        family: str,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        hidden: int = 512,
        encoder_depth: int | None = None,
        context_weight: float = 0.05,
        prompt_weight: float = 0.05,
        text_weight: float = 1.0,
        answer_weight: float = 5.0,
        object_weight: float = 2.0,
        pair_weight: float = 2.0,
        hint_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.family = family
        self.lm = build_language_model(
            family,
            width=width,
            depth=depth,
            num_heads=num_heads,
            hidden=hidden,
            encoder_depth=encoder_depth,
        )
        weights = {
            "context": context_weight,
            "prompt": prompt_weight,
            "text": text_weight,
            "answer": answer_weight,
            "object": object_weight,
            "pair": pair_weight,
        }
        table = torch.zeros(len(ROLES) + 1)
        for role, number in ROLES.items():
            table[number] = weights[role]
        self.hint_weight = hint_weight
        self.hint_head = nn.Linear(width, CLASSES) if family == "t5" and hint_weight else None
        self.role_weights: Tensor
        self.register_buffer("role_weights", table, persistent=False)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted loss, the plain mean loss of answers and of other texts, and the accuracy of both.

        samples: input_ids int64[B, T], blend int64[B, T, W-1], attention_mask bool[B, T], roles int64, and for T5
        labels int64[B, L] and hints int64[B, T]; roles are those of the labels, which in OPT are the input's own words.
        """
        read = {"inputs_embeds": self._embed(samples), "attention_mask": samples["attention_mask"].long()}
        hinted: dict[str, Tensor] = {}
        if self.family == "opt":
            logits = self.lm(**read, use_cache=False).logits[:, :-1]
            labels, roles = samples["input_ids"][:, 1:], samples["roles"][:, 1:]
        else:
            labels, roles = samples["labels"], samples["roles"]
            # The decoder starts with `<pad>` (0) and then reads what it should have said.
            output = self.lm(**read, decoder_input_ids=F.pad(labels, (1, -1)), use_cache=False)
            logits = output.logits
            if self.hint_head is not None:
                hinted = self._hints(output.encoder_last_hidden_state, samples["hints"])
        scored = roles > 0
        logits, labels, roles = logits[scored].float(), labels[scored], roles[scored]
        each, weights = F.cross_entropy(logits, labels, reduction="none"), self.role_weights[roles]
        losses = {"loss": (each * weights).sum() / weights.sum()}
        right = (logits.argmax(-1) == labels).float()
        for name in ("text", "answer", "object", "pair"):
            chosen = roles == ROLES[name]
            count = chosen.sum().clamp(min=1)
            losses[f"loss_{name}"] = (each * chosen).sum() / count
            losses[f"{name}_acc"] = (right * chosen).sum() / count
        if hinted:
            losses["loss"] = losses["loss"] + self.hint_weight * hinted["loss_hint"]
        return {**losses, **hinted}

    def _hints(self, hidden: Tensor, hints: Tensor) -> dict[str, Tensor]:
        """Loss on encoder states [B, T, D] at words with a hint int64[B, T], and accuracy by kind.

        Half the mean loss of places and that of relations, which are fewer and come later.
        """
        assert self.hint_head is not None
        some = hints > 0
        logits, classes = self.hint_head(hidden[some]).float(), hints[some]
        each = F.cross_entropy(logits, classes, reduction="none")
        right = (logits.argmax(-1) == classes).float()
        found = {"loss_hint": each.new_zeros(())}
        for name, chosen, weight in (("place", classes < FALSE, 0.5), ("relation", classes >= FALSE, 1.0)):
            count = chosen.sum().clamp(min=1)
            found["loss_hint"] = found["loss_hint"] + weight * (each * chosen).sum() / count
            found[f"{name}_hint_acc"] = (right * chosen).sum() / count
        return found

    def _embed(self, samples: Mapping[str, Any]) -> Tensor:
        """Embeddings float[B, T, D]; words that share a place are averaged, and as long as one of them."""
        table, blend = self.lm.get_input_embeddings(), samples["blend"]
        first, present = table(samples["input_ids"]), (blend > 0)[..., None]
        return (first + (table(blend) * present).sum(-2)) / (1 + present.sum(-2)).sqrt()

    def no_weight_decay(self) -> set[str]:
        """Embeddings of positions."""
        return {name for name, _ in self.named_parameters() if "embed_positions" in name}


def build_language_model(
    family: str, *, width: int, depth: int, num_heads: int, hidden: int, encoder_depth: int | None = None
) -> Any:
    """A transformers `OPTForCausalLM` or `T5ForConditionalGeneration` with random weights."""
    vocabulary = tokens(family)
    if family == "opt":
        return _build_opt(vocabulary, width, depth, num_heads, hidden)
    return _build_t5(vocabulary, width, (encoder_depth or depth, depth), num_heads, hidden)


def _build_opt(vocabulary: list[str], width: int, depth: int, num_heads: int, hidden: int) -> Any:
    from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        ffn_dim=hidden,
        max_position_embeddings=MAX_LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
        # OPT's own 0.02 is for wide models: at this width attention would begin, and long stay, almost flat.
        init_std=width**-0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        dtype="float32",
    )
    model = OPTForCausalLM(config)
    newline = vocabulary.index(NEWLINE)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=newline)
    # Positions that begin as sines and cosines: attention finds the word before from the first steps.
    with torch.no_grad():
        positions = model.model.decoder.embed_positions.weight
        positions.copy_(_sinusoids(*positions.shape) * config.init_std)
        for layer in model.model.decoder.layers:
            _look_for_the_same(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, num_heads)
    return model


def _build_t5(vocabulary: list[str], width: int, depths: tuple[int, int], num_heads: int, hidden: int) -> Any:
    from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=width,
        d_kv=width // num_heads,
        d_ff=hidden,
        num_layers=depths[0],
        num_decoder_layers=depths[1],
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        # FlanT5's own are not tied. transformers reads that from a saved configuration in different ways in its
        # versions 5.x; tied ones all of them read alike, and a vocabulary of 100 words needs no second table.
        tie_word_embeddings=True,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dtype="float32",
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    # One head begins by looking at the word before and, in the encoder, one at the word after.
    after = config.relative_attention_num_buckets // 2 + 1
    with torch.no_grad():
        for stack, buckets in ((model.encoder, (1, after)), (model.decoder, (1,))):
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            for head, bucket in enumerate(buckets):
                bias[bucket, head] = NEIGHBOUR_BIAS
        for block in model.encoder.block:
            attention = block.layer[0].SelfAttention
            _look_for_the_same(attention.q.weight, attention.k.weight, num_heads, scale=config.d_kv**0.5)
        for block in model.decoder.block:
            attention = block.layer[1].EncDecAttention
            _look_for_the_same(attention.q.weight, attention.k.weight, num_heads, scale=config.d_kv**0.5)
    return model


def _look_for_the_same(query: Tensor, key: Tensor, num_heads: int, *, scale: float = 1.0) -> None:
    """Let the second half of an attention's heads begin with keys like queries: words find their own like."""
    start = len(query) // num_heads * (num_heads // 2)
    key[start:] = query[start:] * scale


def _sinusoids(number: int, width: int) -> Tensor:
    """Sine and cosine positions float32[number, width]."""
    rates = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(1e4)) / width))
    angles = torch.arange(number)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
