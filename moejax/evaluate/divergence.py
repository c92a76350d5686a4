"""Perplexity, and how far a model's predictions are from its original's.

The protocol is llama.cpp's (`llama-perplexity`), so that figures compare: of every chunk of T tokens, those at T/2+1 to
T-1 are scored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError, note
from moejax.evaluate.forward import FinalStates, Tick, final_states
from moejax.formats import Leaf
from moejax.model import Config, DeepseekV3, require_tokens
from moejax.model.deepseek_v3 import head_logits
from moejax.model.finite import refuse_head
from moejax.model.source import Source, source_of
from moejax.progress import Progress, counted, silent
from moejax.sharding import by_sequence, gathered

# exp of more is infinite in float64.
_LARGEST_NLL = 709.0


class StatesOfChunks(Protocol):
    """`FinalStates.scored` of chunks: an array (N, S, D), or a file that is read where it is sliced."""

    def __getitem__(self, chunks: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of some chunks, to be compared with again: the states its head takes, and the head.

    Not log-probabilities: these follow from the states exactly, and a state of D numbers is smaller than a token's C.
    """

    states_NSD: StatesOfChunks
    head: Leaf


class TokenScores(NamedTuple):
    """Of every scored token, (N, T/2-1): its negative log-likelihood, the KL divergence KL(base | model) of its
    distribution in nats, and whether base and model like the same token best."""

    nll: jax.Array
    kld: jax.Array
    same_top1: jax.Array


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text, against `base_ppl`'s model if there is one.

    ppl = exp(mean nll); ln_ppl_ratio = ln(ppl / base_ppl); kld_mean and kld_p999, mean and 99.9 % quantile of KL(base |
    model), nats; same_top1, percent. mtp_ppl: the perplexity of the token after the next, as the first MTP block drafts
    it at the scored positions t = T/2 to T-3 (one less than are scored: nothing follows the last token), None if the
    model has none.
    """

    tokens: int
    ppl: float
    base_ppl: float | None = None
    ln_ppl_ratio: float | None = None
    kld_mean: float | None = None
    kld_p999: float | None = None
    same_top1: float | None = None
    mtp_ppl: float | None = None


def evaluate(
    model: DeepseekV3 | Source,
    chunks: np.ndarray,
    base: DeepseekV3 | Source | Predictions | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    batch: int = 8,
    wave: int = 0,
    keep: Callable[[np.ndarray], object] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of `model` on token chunks (N, T), and its divergence from `base`: the original, or what it predicted.

    Chunks go through the blocks in waves: one batch at a time, which suits models in memory, or `wave` chunks rounded
    down to batches, whose states are then kept while every part of a model is asked for once. The figures are the same.
    `keep` is given the states (B, S, D) that the original's head takes, the model's own without a `base`.

    Raises InputError for tokens that are not the model's, and, naming the matrix, where an output is not finite.
    """
    note_length(source_of(model).config, chunks)
    run = _Run(
        source_of(model), base if base is None or isinstance(base, Predictions) else source_of(base), dtype, keep
    )
    require_tokens(chunks, run.source.config)
    per_wave = max(1, wave // batch) * batch
    scores: list[_Scores] = []
    with counted(progress, -(-len(chunks) // batch) * run.steps_per_batch, "evaluating") as tick:
        for first in range(0, len(chunks), per_wave):
            own = chunks[first : first + per_wave]
            scores += run.wave(first, [own[n : n + batch] for n in range(0, len(own), batch)], tick)
    return _evaluation(scores)


def note_length(config: Config, chunks: np.ndarray) -> None:
    """Say so if chunks (N, T) are longer than the model is made for."""
    length = chunks.shape[1]
    if length > config.max_position_embeddings:
        note(
            f"chunks of {length} tokens are longer than the {config.max_position_embeddings} that the model is made "
            "for (max_position_embeddings); what it predicts behind those counts too"
        )


class _Scores(NamedTuple):
    """Of one batch, each (B, S) or, for `mtp_nll`, one shorter; None where nothing is compared or drafted."""

    nll: np.ndarray
    mtp_nll: np.ndarray | None
    base_nll: np.ndarray | None
    kld: np.ndarray | None
    same_top1: np.ndarray | None


@dataclass(frozen=True)
class _Run:
    """What all waves share."""

    source: Source
    base: Source | Predictions | None
    dtype: jax.typing.DTypeLike
    keep: Callable[[np.ndarray], object] | None

    @property
    def steps_per_batch(self) -> int:
        """Blocks of both models, and the comparison."""
        base = 0 if self.base is None or isinstance(self.base, Predictions) else self.base.config.num_hidden_layers
        return self.source.config.num_hidden_layers + self._drafts + base + 1

    @property
    def _drafts(self) -> bool:
        return self.source.config.num_nextn_predict_layers > 0

    def wave(self, first: int, batches: Sequence[np.ndarray], tick: Tick) -> list[_Scores]:
        """Scores of consecutive chunks, of which the first is chunk `first` of the text."""
        base_states = self._base_states(first, batches, tick)
        own = final_states(self.source, batches, self.dtype, self._drafts, tick)
        if self.keep is not None:
            for states_BSD in base_states or own.scored:
                self.keep(states_BSD)
        head = self.source.head()
        base_head = None
        if self.base is not None:
            base_head = self.base.head if isinstance(self.base, Predictions) else self.base.head()
        scores = []
        for n, tokens_BT in enumerate(batches):
            tick()
            scores.append(_scores(tokens_BT, n, own, head, base_states, base_head))
        return scores

    def _base_states(self, first: int, batches: Sequence[np.ndarray], tick: Tick) -> list[np.ndarray]:
        if self.base is None:
            return []
        if not isinstance(self.base, Predictions):
            return final_states(self.base, batches, self.dtype, False, tick).scored
        ends = first + np.cumsum([len(tokens_BT) for tokens_BT in batches])
        return [self.base.states_NSD[end - len(own) : end] for end, own in zip(ends, batches, strict=True)]


def _scores(
    tokens_BT: np.ndarray,
    n: int,
    own: FinalStates,
    head: Leaf,
    base_states: Sequence[np.ndarray],
    base_head: Leaf | None,
) -> _Scores:
    """Of batch `n`."""
    mtp_nll = None
    if own.drafted:
        mtp_nll = np.asarray(_nll(log_probabilities(own.drafted[n], head), tokens_BT))
    log_probs = log_probabilities(own.scored[n], head)
    if base_head is None:
        return _Scores(np.asarray(_nll(log_probs, tokens_BT)), mtp_nll, None, None, None)
    reference = log_probabilities(base_states[n], base_head)
    nll, kld, same_top1 = jax.device_get(compare(reference, log_probs, tokens_BT))
    return _Scores(nll, mtp_nll, np.asarray(_nll(reference, tokens_BT)), kld, same_top1)


def _evaluation(scores: Sequence[_Scores]) -> Evaluation:
    def of_tokens(batches: Sequence[np.ndarray | None]) -> np.ndarray | None:
        found = [np.ravel(own) for own in batches if own is not None]
        return np.concatenate(found) if found else None

    nll, mtp_nll, base_nll, kld, same_top1 = (of_tokens(own) for own in zip(*scores, strict=True))
    assert nll is not None
    if not all(np.all(np.isfinite(own)) for own in (nll, mtp_nll, base_nll, kld) if own is not None):
        refuse_head()
    figures = Evaluation(
        tokens=nll.size,
        ppl=_perplexity(nll),
        mtp_ppl=None if mtp_nll is None else _perplexity(mtp_nll),
    )
    if base_nll is None or kld is None or same_top1 is None:
        return figures
    return replace(
        figures,
        base_ppl=_perplexity(base_nll),
        ln_ppl_ratio=float(np.mean(nll, dtype=np.float64) - np.mean(base_nll, dtype=np.float64)),
        kld_mean=float(np.mean(kld, dtype=np.float64)),
        kld_p999=float(np.quantile(kld, 0.999)),
        same_top1=100 * float(np.mean(same_top1)),
    )


def _perplexity(nll: np.ndarray) -> float:
    """Raises InputError where it is no number of float64."""
    mean = float(np.mean(nll, dtype=np.float64))
    if mean > _LARGEST_NLL:
        raise InputError(
            f"the text is predicted with a mean of {mean:.4g} nats a token, of which there is no perplexity below "
            f"infinity; up to {_LARGEST_NLL:.0f} are accepted, and a checkpoint whose weights are sound has a few"
        )
    return math.exp(mean)


@jax.jit
def log_probabilities(states_BSD: jax.Array, head: Leaf) -> jax.Array:
    """log p(next token) from the states that the head takes, (B, S, C) in float32."""
    logits_BSC = by_sequence(lambda head, states_BSD: head_logits(states_BSD, head), (head,), (states_BSD,))
    return jax.nn.log_softmax(gathered(logits_BSC).astype(jnp.float32), axis=-1)


@jax.jit
def head_log_probabilities(normed_BTD: jax.Array, head: Leaf) -> jax.Array:
    """The same of the scored positions among the final norm's output: log p of tokens T/2+1 to T-1, (B, S, C)."""
    length = normed_BTD.shape[1]
    return log_probabilities(normed_BTD[:, length // 2 : length - 1], head)


@jax.jit
def compare(base: jax.Array, log_probs: jax.Array, tokens_BT: jax.Array) -> TokenScores:
    """Scores from two models' log-probabilities (B, S, C)."""
    kld = jnp.sum(jnp.exp(base) * (base - log_probs), axis=-1)
    same = jnp.argmax(base, axis=-1) == jnp.argmax(log_probs, axis=-1)
    return TokenScores(_nll(log_probs, tokens_BT), kld, same)


@jax.jit
def _nll(log_probs: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """-log p of the chunk's last tokens, as many as there are predictions (B, S, C)."""
    targets = tokens_BT[:, tokens_BT.shape[1] - log_probs.shape[1] :]
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
