"""BLIP-2 stage 1: a Q-Former learns to read a frozen image encoder by ITC, ITM and ITG (section 3.2).

B rows of this rank, G rows of all ranks, Q queries, P image tokens, T text tokens, D Q-Former width,
C encoder width, E projection width, K hard negatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lavis_lite.common import dist
from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, InputError
from lavis_lite.common.registry import registry
from lavis_lite.models import losses
from lavis_lite.models.base import SECTION_KEYS
from lavis_lite.models.blip2_base import Blip2Base
from lavis_lite.models.decoding import DecodingRules, Search, decode
from lavis_lite.models.explain import Explanation, Method, Score, explain
from lavis_lite.models.qformer import QFormerConfig
from lavis_lite.models.qformer_decoder import QFormerDecoder
from lavis_lite.models.qformer_states import ImageKV, PairStart, QueryStates, Shares
from lavis_lite.models.tokenizer import TextTokens
from lavis_lite.models.vision.tower import validate_vision_config
from lavis_lite.samples import complete_samples, image_of

# The range in which the learned temperature is kept, ALBEF's: outside it one optimiser step can make it
# negative.
TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class Features:
    """What `extract_features` returns, with LAVIS's names; a field is None where its mode didn't ask for it.

    image_embeds: [B, Q, D]. image_embeds_proj: [B, Q, E], normalised.
    text_embeds: [B, T, D], zero at padding. text_embeds_proj: [B, T, E], normalised; row 0 is the text's
        feature.
    multimodal_embeds: [B, Q, D], queries that have seen image and text.
    """

    image_embeds: Tensor | None = None
    image_embeds_proj: Tensor | None = None
    text_embeds: Tensor | None = None
    text_embeds_proj: Tensor | None = None
    multimodal_embeds: Tensor | None = None


@dataclass(frozen=True)
class Contrast:
    """What image-text contrast leaves for the other losses.

    logits_i2t, logits_t2i: [B, G], similarity / temperature. same_image: bool[B, G]. rows: B of each rank.
    """

    logits_i2t: Tensor
    logits_t2i: Tensor
    same_image: Tensor
    rows: list[int]


@registry.register_model("blip2")
@registry.register_model("blip2_feature_extractor")
class Blip2QFormer(Blip2Base):
    """Image encoder + Q-Former with the three stage-1 losses, features, matching scores and captions.

    Args:
        vision_encoder: `name` of a registered encoder and its keywords, `freeze`, `precision`, `pretrained`.
        qformer: the Q-Former's shape.
        tokenizer: hub name, local folder, or `shapes`.
        max_txt_len: texts are cut to so many tokens, [CLS] and [SEP] included.
        embed_dim: E.
        label_smoothing: of the ITC and ITG targets.
        temperature: of ITC, where learning starts.
        itc_gather_with_grad: let the ITC gradient flow to other ranks' features; false detaches everything
            gathered, as LAVIS does even on one process, where it halves the gradient.
        num_hard_negatives: K images per text and K texts per image in ITM.
        itg_weight: of ITG in the sum of losses; 0 for learning without it (the paper's table 6). The loss is measured
            all the same.
    """

    presets: ClassVar[str] = "blip2"
    takes_prompt: ClassVar[bool] = False  # the ITG decoder was never taught to go on from one

    def __init__(
        self,
        *,
        vision_encoder: Mapping[str, Any],
        qformer: QFormerConfig | None = None,
        tokenizer: str = "bert-base-uncased",
        max_txt_len: int = 32,
        embed_dim: int = 256,
        label_smoothing: float = 0.1,
        temperature: float = 0.07,
        itc_gather_with_grad: bool = True,
        num_hard_negatives: int = 1,
        itg_weight: float = 1.0,
    ) -> None:
        config = qformer or QFormerConfig()
        super().__init__(
            vision_encoder=vision_encoder, qformer=config, tokenizer=tokenizer, max_txt_len=max_txt_len
        )
        self.label_smoothing = label_smoothing
        self.itc_gather_with_grad = itc_gather_with_grad
        self.num_hard_negatives = num_hard_negatives
        self.itg_weight = itg_weight
        width = config.hidden_size
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(temperature))

    @classmethod
    def validate_config(cls, cfg: Mapping[str, Any], *, where: str = "model") -> None:
        """Check a model section with its encoder's; raises ConfigError."""
        keywords = bind(cls, cfg, where=where, skip=SECTION_KEYS)
        validate_vision_config(keywords["vision_encoder"], where=f"{where}.vision_encoder")
        keywords = {"max_txt_len": 32, **keywords}
        longest = (keywords.get("qformer") or QFormerConfig()).max_position_embeddings
        limits: dict[str, tuple[float, float | None, str]] = {
            "max_txt_len": (3, longest, "qformer.max_position_embeddings = "),
            "num_hard_negatives": (1, None, ""),
            "embed_dim": (1, None, ""),
            "label_smoothing": (0, 1, ""),
            "itg_weight": (0, None, ""),
            "temperature": (*TEMPERATURE_RANGE, ""),
        }
        for key, (low, high, origin) in limits.items():
            if key in keywords and (keywords[key] < low or (high is not None and keywords[key] > high)):
                raise ConfigError(
                    f"{where}.{key}: must be at least {low}"
                    + (f" and at most {origin}{high}" if high is not None else "")
                    + f", got {keywords[key]}"
                )

    def no_weight_decay(self) -> set[str]:
        """Beside the queries the temperature: pulling it to zero means nothing either."""
        return super().no_weight_decay() | {"temp"}

    # Training

    def check_rows(self, dataset: Any) -> None:
        """Raise ConfigError for clips."""
        if getattr(dataset, "visual", None) == "video":
            raise ConfigError(
                f"dataset '{dataset.name}' shows clips, and a stage-1 model takes pictures alone: leave it out with "
                f"datasets.{dataset.name}=null, or use a stage-2 model, such as model.arch=blip2_opt"
            )

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The three losses of a batch of pairs and their sum.

        Returns: loss = loss_itc + loss_itm + itg_weight * loss_itg, the three losses and itm_acc, all scalars. In
        training, contrast and negatives are over the pairs of all ranks; in evaluation over this rank's batch.
        """
        batch = complete_samples(samples)
        tokens = self.Qformer.look_up(self.tokenize(batch["text_input"]), dec_id=self.tokenizer.dec_id)
        # Asked for before the encoder, which it would wait for on a GPU.
        rows = dist.rows_of_ranks(tokens.input_ids) if self._exchanges() else [len(tokens)]
        image_embeds = self.encode_image(batch["image"])
        image_kv = self.project_image(image_embeds)
        queries = self.encode_queries(image_kv)

        contrast = self._contrast(queries, tokens, batch["image_id"], rows)
        loss_itc = losses.itc_loss(
            contrast.logits_i2t, contrast.logits_t2i, contrast.same_image, smoothing=self.label_smoothing
        )
        # A mean over the joined batch is the ranks' average of means that weigh as much as their rows.
        loss_itc = loss_itc * (len(tokens) * len(rows) / sum(rows))
        loss_itm, itm_acc = self._match(image_embeds, image_kv, tokens, contrast)
        loss_itg = self._generate_loss(queries, tokens)
        return {
            "loss": loss_itc + loss_itm + self.itg_weight * loss_itg,
            "loss_itc": loss_itc.detach(),
            "loss_itm": loss_itm.detach(),
            "loss_itg": loss_itg.detach(),
            "itm_acc": itm_acc,
        }

    def _contrast(
        self, queries: QueryStates, tokens: TextTokens, image_id: Tensor, rows: list[int]
    ) -> Contrast:
        """Similarities of this rank's rows with those of all ranks."""
        if self.training:
            with torch.no_grad():
                self.temp.clamp_(*TEMPERATURE_RANGE)
        image_feats, text_feat = self._query_features(queries), self.text_features(tokens)
        sim_i2t = losses.itc_similarity(image_feats, self._gather_features(text_feat, rows))
        sim_t2i = losses.itc_similarity(self._gather_features(image_feats, rows), text_feat).t()
        same_image = image_id[:, None] == self._gather(image_id, rows)
        return Contrast(sim_i2t / self.temp, sim_t2i / self.temp, same_image, rows)

    def _match(
        self, image_embeds: Tensor, image_kv: ImageKV, tokens: TextTokens, contrast: Contrast
    ) -> tuple[Tensor, Tensor]:
        """ITM on the positives, (image, negative text) and (negative image, text); loss and accuracy."""
        count = self.num_hard_negatives
        texts, texts_valid = losses.sample_negatives(contrast.logits_i2t, contrast.same_image, count=count)
        images, images_valid = losses.sample_negatives(contrast.logits_t2i, contrast.same_image, count=count)
        others = texts.shape[1]
        # Every image with its own text and its negatives side by side, then every text with its negative images.
        negatives = self._negative_images(image_embeds, image_kv, images, contrast.rows)
        pairs_kv = [(image_kv, 1 + others), (negatives, 1)]
        logits = self.match_logits(pairs_kv, self._paired_texts(tokens, texts, contrast.rows))

        labels = torch.zeros(len(logits), dtype=torch.long, device=self.device)
        labels[: len(tokens) * (1 + others) : 1 + others] = 1
        # A row whose batch shows a single picture has no negative; its drawn ones, and it, don't count.
        some = (texts_valid | images_valid).any(1, keepdim=True)
        valid = torch.cat([torch.cat([some, texts_valid], 1).flatten(), images_valid.flatten()])
        return losses.itm_loss(logits, labels, valid, total=self._mean_over_ranks(valid.sum()))

    def _negative_images(
        self, image_embeds: Tensor, image_kv: ImageKV, images: Tensor, rows: list[int]
    ) -> ImageKV:
        """The images drawn for each text, numbered over the ranks [B, K] -> B * K of them."""
        if not self._exchanges():
            return image_kv[images.flatten()]
        # Features travel and the drawn ones are projected again: keys and values of all blocks would be 6.5
        # times as much to send at full size (6 x 2 x 768 numbers a token against 1408).
        return self.project_image(dist.all_gather_with_grad(image_embeds, rows)[images.flatten()])

    def _paired_texts(self, tokens: TextTokens, texts: Tensor, counts: list[int]) -> TextTokens:
        """Each own text followed by those drawn for its image [B, K], then each own text K times."""
        everywhere, offset = tokens, 0
        if self._exchanges():
            wide = tokens.padded(self.max_txt_len)
            everywhere = TextTokens(
                self._gather(wide.input_ids, counts), self._gather(wide.attention_mask, counts)
            )
            offset = sum(counts[: dist.rank()])
        own = torch.arange(len(tokens), device=self.device)[:, None] + offset
        rows = torch.cat([torch.cat([own, texts], 1).flatten(), own.expand_as(texts).flatten()])
        return everywhere[rows].trimmed() if self._exchanges() else everywhere[rows]

    def _generate_loss(self, queries: QueryStates, tokens: TextTokens) -> Tensor:
        """ITG: each token of a caption from the image's queries and the tokens before it."""
        inputs, targets = tokens.for_decoding(self.tokenizer.dec_id)
        logits = self.Qformer.lm_logits(self.Qformer.encode_text(inputs, prefix=queries))
        total = self._mean_over_ranks(torch.tensor(targets.numel(), device=targets.device))
        return losses.itg_loss(logits, targets, smoothing=self.label_smoothing, total=total)

    def _exchanges(self) -> bool:
        # Evaluation shards differ in length, so nothing may wait for another rank there.
        return self.training and dist.world_size() > 1

    def _gather(self, x: Tensor, rows: list[int] | None = None) -> Tensor:
        return dist.all_gather(x, rows) if self._exchanges() else x

    def _gather_features(self, x: Tensor, rows: list[int]) -> Tensor:
        if not self.itc_gather_with_grad:
            return self._gather(x, rows).detach()
        return dist.all_gather_with_grad(x, rows) if self._exchanges() else x

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        # A mean over the joined batch is the ranks' average of sums divided by this.
        return self._gather(count.reshape(1)).float().mean()

    # Parts that evaluation composes

    def query_features(self, images: ImageKV | Tensor) -> Tensor:
        """An image's Q projected queries [B, Q, E], L2-normalised; `images` as in `encode_queries`."""
        return self._query_features(self.encode_queries(images))

    def _query_features(self, queries: QueryStates) -> Tensor:
        return normalize(self.vision_proj(queries.output).float(), dim=-1)

    def text_features(self, tokens: TextTokens) -> Tensor:
        """A text's projected [CLS] [B, E], L2-normalised."""
        return normalize(self.text_proj(self.Qformer.encode_text(tokens, read="first")).float(), dim=-1)

    def project_text(self, tokens: TextTokens) -> PairStart:
        """What `match_logits` reads of texts before any image, computed once for all images they are paired with."""
        return self.Qformer.begin_pairs(self.query_tokens, tokens)

    def match_logits(self, images: ImageKV | Tensor | Shares, texts: TextTokens | PairStart) -> Tensor:
        """ITM logits [B, 2] (no match, match), averaged over the queries.

        Args:
            images: one image per text, or I images of which each serves B/I texts in a row (one: all
                texts), or groups of such, projected or not, see `QFormer.encode_pairs`.
            texts: tokens, or what `project_text` made of them.
        """
        paired = self.Qformer.encode_pairs(self.query_tokens, images, texts)
        # The head is affine: the mean of its logits is that of its inputs.
        return self.itm_head(paired.mean(1))

    # Inference

    @torch.no_grad()
    def extract_features(
        self, samples: Mapping[str, Any], mode: Literal["image", "text", "multimodal"] = "multimodal"
    ) -> Features:
        """Features of images, texts or pairs; see `Features`.

        Raises ValueError for another mode, or when `samples` lacks "image" or "text_input" where the mode
        needs it.
        """
        if mode not in ("image", "text", "multimodal"):
            raise ValueError(f"mode '{mode}' is not one of image, text, multimodal")
        for key in ("image",) * (mode != "text") + ("text_input",) * (mode != "image"):
            if samples.get(key) is None:
                raise ValueError(f"extract_features with mode '{mode}' needs samples['{key}']")
        if mode == "text":
            texts = samples["text_input"]
            return self._text_features_of([texts] if isinstance(texts, str) else texts)
        if mode == "multimodal":
            image_embeds, tokens = self._pairs(samples)
            paired = self.Qformer.encode_pairs(self.query_tokens, image_embeds, tokens)
            return Features(multimodal_embeds=paired)
        image = image_of(samples).to(self.device)
        queries = self.encode_queries(self.encode_image(image))
        return Features(image_embeds=queries.output, image_embeds_proj=self._query_features(queries))

    def _text_features_of(self, texts: Sequence[str]) -> Features:
        tokens = self.tokenize(texts)
        packed = self.Qformer.encode_text(tokens)
        mask = tokens.attention_mask
        embeds, proj = (
            x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x)
            for x in (packed, normalize(self.text_proj(packed).float(), dim=-1))
        )
        return Features(text_embeds=embeds, text_embeds_proj=proj)

    @torch.no_grad()
    def compute_itc(self, samples: Mapping[str, Any]) -> Tensor:
        """ITC score of each pair [B]: the cosine of text and best query, in [-1, 1]."""
        image_embeds, tokens = self._pairs(samples)
        text_feat = self.text_features(tokens)
        return torch.einsum("bqe,be->bq", self.query_features(image_embeds), text_feat).amax(1)

    @torch.no_grad()
    def compute_itm(self, samples: Mapping[str, Any]) -> Tensor:
        """ITM score of each pair [B]: the probability that image and text match, in [0, 1]."""
        return self.match_logits(*self._pairs(samples)).float().softmax(-1)[:, 1]

    def explain(
        self,
        image: Tensor,
        text: str | Sequence[str],
        *,
        method: Method = "gradcam",
        score: Score = "itg",
        per_word: bool = False,
    ) -> list[Explanation]:
        """Where in each image the evidence for its text lies, and if asked for each of its words; always in eval mode.

        Args:
            image: [B, 3, H, W]. text: one for all images, or one each.
            method: "gradcam": cross-attention weights times the score's positive gradients in them. "attention": the
                weights alone, the mean over queries, heads and blocks of the ITM pass; it knows no words. "occlusion":
                how far the score falls when a part of the picture is covered, a pass of everything for each part.
            score: what is explained, "itm" or "itg", see `lavis_lite.models.explain`.

        Raises InputError for another method or score, a text without a word, images and texts that don't fit together,
        images whose tokens are no square grid.
        """
        texts = complete_samples({"image": image, "text_input": text})["text_input"]
        return explain(self, image.to(self.device), texts, method=method, score=score, per_word=per_word)

    def _pairs(self, samples: Mapping[str, Any]) -> tuple[Tensor, TextTokens]:
        batch = complete_samples(samples)
        return self.encode_image(batch["image"].to(self.device)), self.tokenize(batch["text_input"])

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        length_penalty: float = 1.0,
        *,
        draws: Tensor | None = None,
    ) -> list[str]:
        """Captions of images by the ITG decoder: beam search, greedy (`num_beams=1`) or nucleus sampling.

        Args:
            samples: {"image": [B, 3, H, W]}.
            max_length, min_length: of new tokens; at most `max_txt_len - 1`, as long as captions were in
                training.
            num_captions: per image; above 1 it needs sampling or at least as many beams.
            draws: what decides when sampling, see `Search`; without it torch's generator does.

        Returns: B * num_captions texts, an image's together.

        Raises InputError for a prompt, which a stage-1 model doesn't take, and ValueError for impossible settings.
        """
        if samples.get("prompt"):
            raise InputError(
                "samples['prompt']: a stage-1 model takes no prompt; leave it out, or use a stage-2 model, such as "
                "blip2_opt"
            )
        image = image_of(samples).to(self.device)
        queries = self.encode_queries(self.encode_image(image))
        tokenizer = self.tokenizer
        search = Search(num_beams, num_captions, use_nucleus_sampling, draws)
        rules = DecodingRules.for_search(
            search,
            end_id=tokenizer.sep_id,
            max_length=min(max_length, self.max_txt_len - 1),
            min_length=min_length,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            forbidden_ids=(tokenizer.pad_id, tokenizer.cls_id, tokenizer.dec_id),
        )
        decoder = QFormerDecoder(self.Qformer, queries, rows_per_image=search.rows)
        start = torch.full((len(image),), tokenizer.dec_id, device=self.device)
        said = decode(decoder, start, rules, search).ids.flatten(0, 1)
        return [tokenizer.decode(row) for row in said.tolist()]


@registry.register_model("blip2_image_text_matching")
class Blip2ImageTextMatching(Blip2QFormer):
    """The same model called as LAVIS's users call it: `model(samples, match_head="itm")`."""

    def forward(self, samples: Mapping[str, Any], match_head: Literal["itm", "itc"] | None = None) -> Any:
        """ITM logits [B, 2] (no match, match), ITC cosines [B, 1], or without a head the training losses."""
        if match_head is None:
            return super().forward(samples)
        if match_head == "itm":
            return self.match_logits(*self._pairs(samples))
        if match_head == "itc":
            return self.compute_itc(samples)[:, None]
        raise ValueError(f"match_head '{match_head}' is neither itm nor itc")
