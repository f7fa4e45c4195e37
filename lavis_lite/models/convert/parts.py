"""The parts that every BLIP-2 checkpoint has, with our names filled in and the other side's as arguments."""

from __future__ import annotations

from lavis_lite.models.convert.rules import Group, Rule, renamed

# A tower around an encoder around timm's model.
ENCODER = "visual_encoder.encoder.model."
BLOCK = ENCODER + "blocks.{n}."
QFORMER_EMBEDDINGS = "Qformer.bert.embeddings."
QFORMER_LAYER = "Qformer.bert.encoder.layer.{n}."
PREDICTIONS = "Qformer.cls.predictions."
LANGUAGE_MODEL = "language_model.model."


def queries(ln_vision: str, layer_norm: str) -> Group:
    """What is there once: the learned queries, the norms of image features and of the Q-Former's input.

    Args:
        ln_vision, layer_norm: their prefixes of the two norms.
    """
    rules = (
        *renamed("query_tokens", "query_tokens"),
        *renamed(ln_vision + "{weight|bias}", "ln_vision.{weight|bias}"),
        *renamed(layer_norm + "{weight|bias}", QFORMER_EMBEDDINGS + "LayerNorm.{weight|bias}"),
    )
    return Group("queries and norms", rules, required=True)


def qformer_blocks(layer: str, projections: str) -> tuple[Group, Group]:
    """The blocks of the Q-Former as far as queries pass through them, and cross-attention.

    Args:
        layer: their prefix of block n. projections: what they call query, key and value together, `self` in BERT.
    """
    blocks = (
        *_attention(layer, "attention", projections),
        *_feed_forward(layer, "intermediate_query", "output_query"),
    )
    cross = _attention(layer, "crossattention", projections)
    return (
        Group("the Q-Former's blocks", blocks, required=True),
        Group("the Q-Former's cross-attention", cross, required=True, every_block=False),
    )


def qformer_text_blocks(layer: str, *, required: bool) -> Group:
    """The feed-forward networks that text passes through; a plain stage-2 model has none."""
    return Group(
        "the Q-Former's text side", _feed_forward(layer, "intermediate", "output"), required=required
    )


def qformer_embeddings(prefix: str, *, required: bool) -> Group:
    """Word and position tables; a plain stage-2 model has none."""
    names = "{word|position}_embeddings.weight"
    rules = renamed(prefix + names, QFORMER_EMBEDDINGS + names)
    return Group("the Q-Former's text embeddings", rules, required=required)


def linear(name: str, theirs: str, ours: str, *, required: bool = True) -> Group:
    """A linear layer."""
    return Group(name, renamed(theirs + ".{weight|bias}", ours + ".{weight|bias}"), required=required)


def language_model(prefix: str) -> Group:
    """The frozen language model, whose own names are transformers' everywhere."""
    return Group("the language model", renamed(prefix + "{rest}", LANGUAGE_MODEL + "{rest}"))


def _attention(layer: str, kind: str, projections: str) -> tuple[Rule, ...]:
    own, made = "{query|key|value}.{weight|bias}", "output.{dense|LayerNorm}.{weight|bias}"
    return (
        *renamed(f"{layer}{kind}.{projections}.{own}", f"{QFORMER_LAYER}{kind}.self.{own}"),
        *renamed(f"{layer}{kind}.{made}", f"{QFORMER_LAYER}{kind}.{made}"),
    )


def _feed_forward(layer: str, wide: str, narrow: str) -> tuple[Rule, ...]:
    names = (wide + ".dense.{weight|bias}", narrow + ".{dense|LayerNorm}.{weight|bias}")
    return tuple(rule for name in names for rule in renamed(layer + name, QFORMER_LAYER + name))
