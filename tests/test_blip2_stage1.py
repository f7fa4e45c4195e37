"""Stage 1 as a whole: losses against a version that shares nothing, sizes, edge cases, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from torch.nn.functional import cross_entropy, normalize

from lavis_lite.common.checkpoint import save_tensors
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.models import losses
from lavis_lite.models.base import build_model
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.tokenizer import TextTokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tiny_model(tokenizer: str, **changes: Any) -> Blip2QFormer:
    torch.manual_seed(0)
    model = Blip2QFormer.from_config(tiny_config(tokenizer, **changes))
    enlarge_weights(model, std=0.1)
    return model


def first_others(
    logits: torch.Tensor, same: torch.Tensor, *, count: int = 1, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Instead of a draw: the hardest negatives, so that a slow version can take the same."""
    best = logits.masked_fill(same, float("-inf")).topk(min(count, logits.shape[1]), dim=1)
    return best.indices, best.values > float("-inf")


def slow_losses(
    model: Blip2QFormer, samples: dict[str, Any], ids: list[int], negatives: int = 1
) -> dict[str, Any]:
    """Pair by pair, every image and text encoded afresh; each text alone, so without padding."""
    qformer, batch = model.Qformer, len(ids)
    tokens = [model.tokenize([text]) for text in samples["text_input"]]

    def image_kv(i: int) -> Any:
        return model.project_image(model.encode_image(samples["image"][i : i + 1]))

    def feats(i: int) -> torch.Tensor:
        return normalize(
            model.vision_proj(qformer.encode_queries(model.query_tokens, image_kv(i)).output[0]), dim=-1
        )

    def text(j: int) -> torch.Tensor:
        return normalize(model.text_proj(qformer.encode_text(tokens[j])[0]), dim=-1)

    logits = torch.stack(
        [torch.stack([(feats(i) @ text(j)).max() for j in range(batch)]) for i in range(batch)]
    )
    logits = logits / model.temp
    itc = torch.zeros(())
    for i in range(batch):
        twins = [j for j in range(batch) if ids[j] == ids[i]]
        for scores in (logits[i], logits[:, i]):
            log_probs = scores.log_softmax(0)
            itc = itc - (0.9 * log_probs[twins].mean() + 0.1 * log_probs.mean()) / (2 * batch)

    pairs: list[tuple[int, int, int]] = []
    for i in range(batch):
        others = [j for j in range(batch) if ids[j] != ids[i]]
        if others:
            hard_texts = sorted(others, key=lambda j: -logits[i, j].item())[:negatives]
            hard_images = sorted(others, key=lambda j: -logits[j, i].item())[:negatives]
            pairs += [(i, i, 1), *((i, j, 0) for j in hard_texts), *((j, i, 0) for j in hard_images)]
    itm, right = torch.zeros(()), 0
    for i, j, label in pairs:
        scores = model.itm_head(qformer.encode_pairs(model.query_tokens, image_kv(i), tokens[j])[0]).mean(0)
        itm = itm - scores.log_softmax(0)[label] / len(pairs)
        right += int(scores.argmax()) == label

    itg, count = torch.zeros(()), 0
    for i in range(batch):
        words = tokens[i].input_ids[0].tolist()
        inputs = torch.tensor([[model.tokenizer.dec_id, *words[1:]]])
        states = qformer.encode_queries(model.query_tokens, image_kv(i))
        hidden = qformer.encode_text(
            TextTokens(inputs, torch.ones_like(inputs, dtype=torch.bool)), prefix=states
        )
        said, targets = qformer.lm_logits(hidden)[:-1], torch.tensor(words[1:])
        itg = itg + cross_entropy(said, targets, label_smoothing=0.1, reduction="sum")
        count += len(targets)
    itg = itg / count
    return {
        "loss": itc + itm + itg,
        "loss_itc": itc,
        "loss_itm": itm,
        "loss_itg": itg,
        "itm_acc": right / len(pairs),
    }


@pytest.mark.parametrize(("ids", "negatives"), [([0, 1, 2, 3], 1), ([4, 4, 2, 1], 1), ([0, 1, 2, 3], 2)])
def test_losses_and_gradients_equal_the_slow_ones(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, ids: list[int], negatives: int
) -> None:
    monkeypatch.setattr(losses, "sample_negatives", first_others)
    model = tiny_model(tokenizer, num_hard_negatives=negatives).train()
    samples = {**tiny_samples(), "image_id": torch.tensor(ids)}
    fast = model(samples)
    fast["loss"].backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    slow = slow_losses(model, samples, ids, negatives)
    slow["loss"].backward()
    for name, value in slow.items():
        assert fast[name].item() == pytest.approx(torch.as_tensor(value).item(), abs=1e-5), name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_generation_can_be_left_out_of_the_sum(tokenizer: str) -> None:
    model = tiny_model(tokenizer, itg_weight=0.0).train()
    found = model(tiny_samples())
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(
        found["loss_itc"].item() + found["loss_itm"].item(), abs=1e-6
    )
    assert found["loss_itg"] > 0
    head = model.Qformer.cls["predictions"]
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_an_untrained_model_starts_at_chance(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(995)]
    config = tiny_config(write_tokenizer(tmp_path, words), max_txt_len=20, qformer={"hidden_size": 64})
    torch.manual_seed(0)
    model = Blip2QFormer.from_config(config)
    batch = 16
    picks = torch.randint(0, 995, (batch, 12), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [" ".join(words[i] for i in row[: 4 + n % 8]) for n, row in enumerate(picks)]
    output = model({**tiny_samples(batch), "text_input": texts})
    expected = math.log(batch) + math.log(2) + math.log(len(model.tokenizer))
    assert output["loss"].item() == pytest.approx(expected, rel=0.05)


def test_size_at_full_scale(tmp_path: Path) -> None:
    # BERT's 30,522 words and [DEC], features of ViT-g: the 186,705,470 of public training logs.
    tokenizer = write_tokenizer(tmp_path, [f"w{i}" for i in range(30_522 - 5)])
    with torch.device("meta"):
        model = Blip2QFormer.from_config(
            {"vision_encoder": {"name": "tiny_patches", "width": 1408}, "tokenizer": tokenizer}
        )
    trainable = model.trainable_state_dict()
    assert sum(tensor.numel() for tensor in trainable.values()) == 186_705_470
    assert all(tensor.is_meta for tensor in trainable.values())
    assert not any(name.startswith("visual_encoder.") for name in trainable)
    stage2 = ("Qformer.cls.", "vision_proj", "text_proj", "itm_head", "temp")
    text_side = (".word_embeddings.", ".position_embeddings.", ".intermediate.", "layer.{}.output.")
    left = 0
    for name, tensor in trainable.items():
        text_only = any(part in name for part in text_side[:3]) or (
            ".output." in name and ".attention." not in name and ".crossattention." not in name
        )
        left += 0 if name.startswith(stage2) or text_only else tensor.numel()
    # With the projection to OPT-2.7B's width this is the public figure of stage 2.
    assert left + 768 * 2560 + 2560 == 107_133_696


def test_names_follow_bert_and_lavis(tokenizer: str) -> None:
    names = set(tiny_model(tokenizer).trainable_state_dict())
    layer = "Qformer.bert.encoder.layer.2."
    assert {
        "query_tokens", "temp", "ln_vision.weight", "vision_proj.weight", "text_proj.bias", "itm_head.weight",
        "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.bert.embeddings.LayerNorm.bias",
        layer + "attention.self.query.weight", layer + "attention.output.LayerNorm.weight",
        layer + "crossattention.self.key.weight", layer + "crossattention.output.dense.bias",
        layer + "intermediate.dense.weight", layer + "intermediate_query.dense.weight",
        layer + "output.LayerNorm.weight", layer + "output_query.dense.weight",
        "Qformer.cls.predictions.bias", "Qformer.cls.predictions.transform.dense.weight",
    } <= names  # fmt: skip
    assert not any("layer.1.crossattention" in name for name in names)


def test_one_class_has_three_names() -> None:
    assert (
        registry.get_model_class("blip2")
        is registry.get_model_class("blip2_feature_extractor")
        is Blip2QFormer
    )
    assert issubclass(registry.get_model_class("blip2_image_text_matching"), Blip2QFormer)


def test_batch_of_one_and_one_picture_for_all(tokenizer: str) -> None:
    model = tiny_model(tokenizer).train()
    for samples in (tiny_samples(1), {**tiny_samples(3), "image_id": torch.zeros(3, dtype=torch.long)}):
        output = model(samples)
        output["loss"].backward()
        assert torch.isfinite(output["loss"])
        assert output["loss_itm"] == 0, "without another picture there is nothing to match against"
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_frozen_encoder_stays_in_eval_mode_without_gradient(tokenizer: str) -> None:
    model = tiny_model(tokenizer).train()
    image = tiny_samples()["image"]
    assert torch.equal(model.encode_image(image), model.encode_image(image)), "dropout in a frozen encoder"
    model(tiny_samples())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.visual_encoder.parameters())


@pytest.mark.parametrize("words", ["a red dog", "dogs", ""])
def test_losses_do_not_depend_on_padding(tokenizer: str, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(losses, "sample_negatives", first_others)
    model = tiny_model(tokenizer).eval()
    samples = {**tiny_samples(3), "text_input": [words, "a cat", "the big dog runs"]}
    with torch.no_grad():
        plain = model(samples)
        monkeypatch.setattr(
            model, "tokenize", lambda texts: Blip2QFormer.tokenize(model, texts).padded(model.max_txt_len)
        )
        padded = model(samples)
    for name in plain:
        torch.testing.assert_close(plain[name], padded[name], rtol=0, atol=1e-5, msg=name)


def test_low_precision_gives_nearly_the_same_losses(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "sample_negatives", first_others)
    model = tiny_model(tokenizer).train()
    exact = model(tiny_samples())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tiny_samples())
    rounded["loss"].backward()
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.05), name
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_detached_gathering_halves_the_itc_gradient(tokenizer: str) -> None:
    gradients = []
    for with_grad in (True, False):
        model = tiny_model(tokenizer, itc_gather_with_grad=with_grad)
        model.eval()  # no clamp, nothing but the two gradients
        batch = tiny_samples()
        tokens = model.tokenize(batch["text_input"])
        queries = model.Qformer.encode_queries(
            model.query_tokens, model.project_image(model.encode_image(batch["image"]))
        )
        contrast = model._contrast(queries, tokens, batch["image_id"], [len(tokens)])
        losses.itc_loss(
            contrast.logits_i2t, contrast.logits_t2i, contrast.same_image, smoothing=0.1
        ).backward()
        gradients.append(model.text_proj.weight.grad)
    # Detached, a text gets gradient from its own softmax over images only.
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-4)
    assert 0.2 < gradients[1].norm() / gradients[0].norm() < 1.0


def test_temperature_stays_in_its_range(tokenizer: str) -> None:
    model = tiny_model(tokenizer).train()
    with torch.no_grad():
        model.temp.fill_(-0.2)
    assert torch.isfinite(model(tiny_samples())["loss"])
    assert model.temp.item() == pytest.approx(0.001)


def test_optimiser_hints(tokenizer: str) -> None:
    model = tiny_model(tokenizer)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert model.lr_scale("Qformer.bert.embeddings.word_embeddings.weight", 0.5) == 1.0


def test_checkpoint_round_trip(tokenizer: str, tmp_path: Path) -> None:
    model = tiny_model(tokenizer)
    save_tensors(tmp_path / "model.safetensors", model.trainable_state_dict())
    torch.manual_seed(5)
    config = {"arch": "blip2", "pretrained": str(tmp_path), **tiny_config(tokenizer)}
    other = build_model(config)
    for name, tensor in other.trainable_state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_checkpoint_that_does_not_fit_is_one_line_with_names(tokenizer: str, tmp_path: Path) -> None:
    state = tiny_model(tokenizer).trainable_state_dict()
    path = tmp_path / "model.safetensors"

    def message(changes: dict[str, Any], remove: str | None = None) -> str:
        save_tensors(path, {**{k: v for k, v in state.items() if not remove or remove not in k}, **changes})
        model = tiny_model(tokenizer)
        before = model.itm_head.weight.clone()
        with pytest.raises(CheckpointError) as caught:
            model.load_checkpoint(path)
        assert torch.equal(model.itm_head.weight, before), "a refused checkpoint changes nothing"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "1 unexpected: surplus" in message({"surplus": torch.ones(1)})
    assert "1 missing: temp" in message({}, remove="temp")
    assert "itm_head.bias (3,) here (2,)" in message({"itm_head.bias": torch.ones(3)})
    assert "and " in message({}, remove="layer.3") and "layer.3" in message({}, remove="layer.3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qformer": {"num_layrs": 3}}, "num_layers"),
        ({"embed_dims": 3}, "embed_dim"),
        ({"max_txt_len": 21}, "max_txt_len.*at most.*20"),
        ({"num_hard_negatives": 0}, "num_hard_negatives"),
        ({"max_txt_len": "long"}, "model.max_txt_len"),
    ],
)
def test_a_wrong_configuration_names_the_key(tokenizer: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Blip2QFormer.validate_config(tiny_config(tokenizer, **changes))


@pytest.mark.parametrize("source", ["./no/such/folder", "tokk", "bert-base-uncased"])
def test_a_tokenizer_that_is_nowhere_is_one_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a name that it doesn't find transformers makes a tokenizer of special tokens, to which all words are one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="no local folder") as caught:
        Blip2QFormer.from_config(tiny_config(source))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is a folder without a tokenizer \(found no vocab.txt or tokenizer.json"
    ):
        Blip2QFormer.from_config(tiny_config(str(tmp_path)))
