"""Greedy, beam and nucleus search over any one-token-at-a-time decoder.

R rows being decoded (B inputs x K beams or samples), L new tokens, V vocabulary. Every row stands for itself:
what is decoded for an input doesn't depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lavis_lite.common.errors import InputError

NEVER = float("-inf")


class Decoder(Protocol):
    """Something that says what may come next."""

    def step(self, ids: Tensor) -> Tensor:
        """Take the next token int64[R] of every row; return the logits [R, V] of the one after.

        The first call's tokens begin the text, for a decoder that hasn't read its beginning already.
        """
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row `rows[r]` of the same input was."""
        ...


class Beginning(Decoder, Protocol):
    """A decoder whose beginning, once it has been read by the first step, can be continued in many ways."""

    def continued(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The logits [R, T, V] after each of the tokens int64[R, T], which follow the beginning of row `rows[r]`.

        The decoder is left as it was. Needs one row an input, and no step but the first.
        """
        ...


@dataclass(frozen=True)
class Decoded:
    """What was said.

    ids: int64[B, K, L], the end token at and after the end; best first. scores: float[B, K], what texts are ranked by:
    of beams log-probability / length ** length_penalty, otherwise log-probability / length, the end counted, under the
    rules. log_likelihoods: float[B, K], log p(text) as the decoder has it, whatever the rules and the length: of a text
    that ended with its end, of one that was cut off without.
    """

    ids: Tensor
    scores: Tensor
    log_likelihoods: Tensor


@dataclass(frozen=True)
class Search:
    """How many texts are sought for an input, and how: `keep` by nucleus sampling, or the best of `num_beams`.

    draws: float[B * keep, L] in [0, 1), the chance of every row's every token, for sampling that depends on nothing
    else: not on the batch, nor on torch's generator. L is at least as long as a text may be.
    """

    num_beams: int = 1
    keep: int = 1
    nucleus: bool = False
    draws: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that a decoder needs for each input."""
        return self.keep if self.nucleus else self.num_beams


@dataclass(frozen=True)
class DecodingRules:
    """What may be said: all lengths count new tokens only, without the end.

    repetition_penalty: logits of tokens said before are divided by it when positive, else multiplied.
    length_penalty: beams are ranked by log-probability / length ** length_penalty, the end counted.
    """

    end_id: int
    max_length: int = 30
    min_length: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "max_length must be at least 1": self.max_length >= 1,
            "min_length must be from 0 to max_length": 0 <= self.min_length <= self.max_length,
            "temperature must be above 0": self.temperature > 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise InputError(f"{rule}: {self}")

    @classmethod
    def for_search(
        cls,
        search: Search,
        *,
        max_length: int,
        min_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        **others: Any,
    ) -> Self:
        """Rules for one kind of search: only sampling has a temperature and a nucleus; the shortest text that is
        asked for may be no longer than the longest."""
        if not search.nucleus:
            temperature = top_p = 1.0
        return cls(
            max_length=max_length,
            min_length=min(min_length, max_length),
            temperature=temperature,
            top_p=top_p,
            **others,
        )

    def apply_at(self, place: int) -> bool:
        """Whether they change what may come at that place of a text, 0 its first."""
        return (
            place < self.min_length
            or bool(self.forbidden_ids)
            or self.temperature != 1.0
            or (self.repetition_penalty != 1.0 and place > 0)
        )

    def log_probs(self, logits: Tensor, said: Tensor) -> Tensor:
        """Log-probabilities [R, V] of the next token under the rules, after the tokens said int64[R, L]."""
        logits = logits.float()
        if self.repetition_penalty != 1.0 and said.shape[1]:
            seen = logits.gather(1, said)
            penalised = torch.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
            logits = logits.scatter(1, said, penalised)
        if self.forbidden_ids:
            logits = logits.index_fill(1, torch.tensor(self.forbidden_ids, device=logits.device), NEVER)
        if said.shape[1] < self.min_length:
            logits = logits.index_fill(1, torch.tensor([self.end_id], device=logits.device), NEVER)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.log_softmax(-1)


def decode(decoder: Decoder, start: Tensor, rules: DecodingRules, search: Search) -> Decoded:
    """Continuations of every input: drawn from the nucleus, by beam search, or the likeliest token each time.

    Args:
        start: int64[B]. The decoder has B * search.rows rows.

    Raises InputError when more texts are sought than there are beams.
    """
    if search.nucleus:
        starts = start.repeat_interleave(search.keep)
        decoded = sample(decoder, starts, rules, greedy=False, draws=search.draws)
    elif search.num_beams == 1 and search.keep == 1:
        decoded = sample(decoder, start, rules, greedy=True)
    else:
        return beam_search(decoder, start, rules, num_beams=search.num_beams, keep=search.keep)
    shape = (len(start), search.keep)
    return Decoded(
        decoded.ids.reshape(*shape, -1),
        decoded.scores.reshape(shape),
        decoded.log_likelihoods.reshape(shape),
    )


def _next_log_probs(rules: DecodingRules, logits: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R, V] of the next token under the rules, and without them."""
    ruled = rules.log_probs(logits, said)
    return ruled, logits.float().log_softmax(-1) if rules.apply_at(said.shape[1]) else ruled


def sample(
    decoder: Decoder, start: Tensor, rules: DecodingRules, *, greedy: bool, draws: Tensor | None = None
) -> Decoded:
    """One continuation per row: the likeliest token each time, or a draw from the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al.,
    2020).

    Args:
        start: int64[R]. draws: as of `Search`.

    Returns: one continuation (K = 1) for each of the R rows.
    Raises InputError for draws that are too few.
    """
    if draws is not None and (len(draws) != len(start) or draws.shape[1] < rules.max_length):
        raise InputError(f"{list(draws.shape)} draws for {len(start)} texts of {rules.max_length} tokens")
    ids, said = start, start.new_empty(start.shape[0], 0)
    ended = torch.zeros_like(start, dtype=torch.bool)
    total, length = torch.zeros(start.shape, device=start.device), torch.zeros_like(start)
    likelihood = total
    for place in range(rules.max_length):
        log_probs, plain = _next_log_probs(rules, decoder.step(ids), said)
        chance = None if draws is None else draws[:, place].to(log_probs.device)
        ids = log_probs.argmax(-1) if greedy else draw_from_nucleus(log_probs.exp(), rules.top_p, chance)
        ids = ids.masked_fill(ended, rules.end_id)
        total = total + log_probs.gather(1, ids[:, None]).squeeze(1).masked_fill(ended, 0.0)
        likelihood = likelihood + plain.gather(1, ids[:, None]).squeeze(1).masked_fill(ended, 0.0)
        length = length + (~ended).long()
        said = torch.cat([said, ids[:, None]], 1)
        ended = ended | (ids == rules.end_id)
        if bool(ended.all()):
            break
    return Decoded(said[:, None], (total / length)[:, None], likelihood[:, None])


def draw_from_nucleus(probs: Tensor, top_p: float, chance: Tensor | None = None) -> Tensor:
    """A token int64[R] of each row's nucleus; probs: float[R, V].

    Args:
        chance: float[R] in [0, 1), what decides; without it torch's generator does.
    """
    probs, order = probs.sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    nucleus = probs.masked_fill(before >= top_p, 0.0)
    if chance is None:
        drawn = torch.multinomial(nucleus, 1)
    else:
        reached = nucleus.cumsum(-1)
        drawn = torch.searchsorted(reached, chance[:, None].to(reached.dtype) * reached[:, -1:], right=True)
        # The product may round up to the whole, behind which there is nothing.
        drawn = drawn.minimum((nucleus > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, drawn).squeeze(1)


def beam_search(
    decoder: Decoder, start: Tensor, rules: DecodingRules, *, num_beams: int, keep: int = 1
) -> Decoded:
    """The `keep` best continuations of every input by beam search.

    A beam that ends is set aside with its score; an input is finished when `num_beams` have ended and the best running
    one, were it to end as it stands, would not be among them (what transformers does unless told otherwise, and
    published scores rest on; with a length penalty above 0 a longer text might still have overtaken them).

    Args:
        start: int64[B]. The decoder has B * num_beams rows, those of an input together.
    """
    if not 1 <= keep <= num_beams:
        raise InputError(f"{keep} captions asked of {num_beams} beams")
    batch, end = start.shape[0], rules.end_id
    ids = start.repeat_interleave(num_beams)
    # All beams of an input start equal, so only the first counts in the first step.
    scores = torch.full((batch, num_beams), NEVER, device=start.device)
    scores[:, 0] = 0.0
    said = start.new_full((batch, num_beams, rules.max_length), end)
    running = _Beams(scores, torch.zeros_like(scores), said)
    ended = running._replace(scores=torch.full_like(scores, NEVER))
    done = torch.zeros(batch, dtype=torch.bool, device=start.device)
    for length in range(1, rules.max_length + 1):
        log_probs, plain = _next_log_probs(
            rules, decoder.step(ids), running.said.flatten(0, 1)[:, : length - 1]
        )
        # At most one of a beam's continuations is the end, so the best 2K of an input leave at least K that run on;
        # they are among the best 2K of each of its beams.
        each, tokens = log_probs.topk(min(2 * num_beams, log_probs.shape[1]), dim=1)
        totals = running.scores[..., None] + each.unflatten(0, (batch, num_beams))
        best, flat = totals.flatten(1).topk(min(2 * num_beams, totals[0].numel()), dim=1)
        beam, token = flat // each.shape[1], tokens.reshape(batch, -1).gather(1, flat)
        likelihoods = running.likelihoods[..., None] + plain.gather(1, tokens).unflatten(
            0, (batch, num_beams)
        )
        longer = running.said.gather(1, beam[..., None].expand(-1, -1, rules.max_length)).clone()
        longer[:, :, length - 1] = token
        found = _Beams(best, likelihoods.flatten(1).gather(1, flat), longer)

        is_end = token == end
        final = best / length**rules.length_penalty
        # Only an end among the K best counts: one further down would not have survived this step.
        among_best = torch.arange(best.shape[1], device=best.device) < num_beams
        newly = final.masked_fill(~(is_end & among_best) | done[:, None], NEVER)
        ended = ended.joined(found._replace(scores=newly)).best(num_beams)[0]

        running, place = found._replace(scores=best.masked_fill(is_end, NEVER)).best(num_beams)
        reachable = running.scores[:, 0] / length**rules.length_penalty
        done = done | (ended.scores[:, -1] >= reachable)
        if bool(done.all()) or length == rules.max_length:
            break
        rows = beam.gather(1, place) + torch.arange(batch, device=start.device)[:, None] * num_beams
        decoder.reorder(rows.flatten())
        ids = running.said[:, :, length - 1].flatten()
    # What was still running at the limit counts as it stands.
    final = (running.scores / length**rules.length_penalty).masked_fill(done[:, None], NEVER)
    ended = ended.joined(running._replace(scores=final)).best(num_beams)[0]
    return Decoded(ended.said[:, :keep, :length], ended.scores[:, :keep], ended.likelihoods[:, :keep])


class _Beams(NamedTuple):
    """N texts for each of B inputs. scores: float[B, N], what they are ranked by. likelihoods: float[B, N], their log p
    without the rules. said: int64[B, N, L]."""

    scores: Tensor
    likelihoods: Tensor
    said: Tensor

    def joined(self, others: _Beams) -> _Beams:
        """The texts of both, input by input."""
        return _Beams(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))

    def best(self, number: int) -> tuple[_Beams, Tensor]:
        """The `number` best of every input, best first, and their places int64[B, number]."""
        scores, place = self.scores.topk(number, dim=1)
        whole = place[..., None].expand(-1, -1, self.said.shape[2])
        return _Beams(scores, self.likelihoods.gather(1, place), self.said.gather(1, whole)), place
