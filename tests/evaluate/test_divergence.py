"""Perplexity and divergence against the same figures in NumPy and float64, and against Hugging Face's perplexity."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.errors import Note
from moejax.evaluate.divergence import Predictions, compare, evaluate, head_log_probabilities
from moejax.evaluate.text import chunks
from moejax.formats import dense
from moejax.model import DeepseekV3, named_leaves
from moejax.tokenizer import load_tokenizer
from small_models import CHUNKS, CONFIG, first_layers, small_model

Array = NDArray[Any]

N, T, C = *CHUNKS.shape, CONFIG.vocab_size
FIRST, SCORED = T // 2 + 1, T // 2 - 1

# A text that no model has seen, and the perplexity that transformers 5.23 gives the tiny checkpoint on its 5 chunks of
# 64 tokens, in float32 from weights dequantized as `tools/make_golden.py` does.
TEXT = '''"""Intervals on a line, and what they cover together."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """The numbers x with start <= x < stop."""

    start: float
    stop: float

    def __post_init__(self) -> None:
        if self.start > self.stop:
            raise ValueError(f"start {self.start} is greater than stop {self.stop}")

    def __contains__(self, x: float) -> bool:
        return self.start <= x < self.stop

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.stop and other.start < self.stop


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same numbers in as few intervals as possible, in ascending order."""
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if merged and interval.start <= merged[-1].stop:
            last = merged.pop()
            interval = Interval(last.start, max(last.stop, interval.stop))
        merged.append(interval)
    return merged
'''
PERPLEXITY = 12.356730

quick_logits = jax.jit(DeepseekV3.__call__)
quick_hidden = jax.jit(DeepseekV3.hidden)
quick_draft_logits = jax.jit(DeepseekV3.draft_logits)


def figures_of(*arguments: Any, **options: Any) -> dict[str, float]:
    """Those that there are of models without an MTP block."""
    figures = asdict(evaluate(*arguments, **options))
    assert figures.pop("mtp_ppl") is None
    return figures


@cache
def other_model() -> DeepseekV3:
    """`first_layers(1)` with noise on its head."""
    leaves = named_leaves(first_layers(1))
    head = dense(leaves["head"], jnp.dtype(jnp.float32))
    noise = 0.3 * jnp.std(head) * np.random.RandomState(1).randn(*head.shape).astype(np.float32)
    return DeepseekV3(first_layers(1).config, (leaves | {"head": head + noise}).__getitem__)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    return wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))


@cache
def log_probabilities_by_hand(model: DeepseekV3) -> Array:
    """log p of every token after every token of CHUNKS, (N, T, C)."""
    return log_softmax(np.asarray(quick_logits(model, jnp.asarray(CHUNKS))))


def negative_log_likelihoods(log_probs_NTC: Array) -> list[float]:
    """Of the scored tokens, chunk by chunk."""
    return [-log_probs_NTC[n, t - 1, CHUNKS[n, t]] for n in range(N) for t in range(FIRST, T)]


def test_perplexity_is_that_of_the_scored_tokens() -> None:
    figures = evaluate(first_layers(1), CHUNKS, batch=2)
    nll = negative_log_likelihoods(log_probabilities_by_hand(first_layers(1)))
    assert figures.tokens == len(nll) == N * SCORED
    assert figures.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    others = {name: value for name, value in asdict(figures).items() if name not in ("tokens", "ppl")}
    assert set(others.values()) == {None}


def test_chunks_longer_than_the_model_is_made_for_are_spoken_of() -> None:
    own = first_layers(1)
    for limit in (T, T - 1):
        config = replace(own.config, max_position_embeddings=limit)
        model = DeepseekV3(config, named_leaves(own).__getitem__)
        told = (
            nullcontext() if limit == T else pytest.warns(Note, match=f"chunks of {T} tokens are longer than the 13 ")
        )
        with told:
            assert evaluate(model, CHUNKS, batch=2) == evaluate(own, CHUNKS, batch=2)


def test_divergence_from_another_model_token_by_token() -> None:
    figures = evaluate(other_model(), CHUNKS, first_layers(1), batch=2)
    base_NTC, own_NTC = log_probabilities_by_hand(first_layers(1)), log_probabilities_by_hand(other_model())
    pairs = [(base_NTC[n, t - 1], own_NTC[n, t - 1]) for n in range(N) for t in range(FIRST, T)]
    kld = [float(np.sum(np.exp(base_C) * (base_C - own_C))) for base_C, own_C in pairs]
    nll, base_nll = (np.mean(negative_log_likelihoods(log_probs)) for log_probs in (own_NTC, base_NTC))
    assert figures.tokens == len(pairs)
    assert figures.ppl == pytest.approx(np.exp(nll), rel=1e-5)
    assert figures.base_ppl == pytest.approx(np.exp(base_nll), rel=1e-5)
    assert figures.ln_ppl_ratio == pytest.approx(nll - base_nll, rel=1e-4)
    assert figures.kld_mean == pytest.approx(np.mean(kld), rel=1e-4)
    assert figures.kld_p999 == pytest.approx(np.quantile(kld, 0.999), rel=1e-4)
    same = [np.argmax(base_C) == np.argmax(own_C) for base_C, own_C in pairs]
    assert 0.2 < np.mean(same) < 0.95, "the models should agree on some tokens"
    assert figures.same_top1 == pytest.approx(100 * np.mean(same))


def test_a_model_does_not_differ_from_itself() -> None:
    figures = evaluate(first_layers(1), CHUNKS, first_layers(1), batch=2)
    assert (figures.kld_mean, figures.kld_p999, figures.same_top1) == (0.0, 0.0, 100.0)
    assert figures.ppl == pytest.approx(figures.base_ppl)
    assert figures.ln_ppl_ratio == pytest.approx(0.0, abs=1e-12)


def test_batches_do_not_change_figures_and_the_last_may_be_smaller() -> None:
    by_two, by_one = (figures_of(other_model(), CHUNKS[:3], first_layers(1), batch=batch) for batch in (2, 1))
    assert by_two == pytest.approx(by_one, rel=1e-4)


def test_waves_of_chunks_do_not_change_a_bit_of_the_figures() -> None:
    """Nor do waves that are no whole number of batches, a base that was kept, or one that is kept while evaluating."""
    kept: list[Array] = []
    expected = figures_of(other_model(), CHUNKS, first_layers(1), batch=2, keep=kept.append)
    for wave in (1, 3, 4, 100):
        assert figures_of(other_model(), CHUNKS, first_layers(1), batch=2, wave=wave) == expected
    again: list[Array] = []
    base = Predictions(np.concatenate(kept), first_layers(1).head.get_value())
    assert figures_of(other_model(), CHUNKS, base, batch=2, wave=4, keep=again.append) == expected
    evaluate(first_layers(1), CHUNKS, batch=2, wave=4, keep=again.append)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate([*kept, *kept]))


def test_the_token_after_the_next_is_predicted_at_the_scored_positions() -> None:
    model, tokens = small_model(), jnp.asarray(CHUNKS)
    hidden = quick_hidden(model, tokens)
    log_probs = log_softmax(np.asarray(quick_draft_logits(model, tokens, hidden)))
    nll = [-log_probs[n, t, CHUNKS[n, t + 2]] for n in range(N) for t in range(FIRST - 1, T - 2)]
    assert len(nll) == N * (SCORED - 1)
    figures = evaluate(model, CHUNKS, batch=2)
    assert figures.mtp_ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert figures.tokens == N * SCORED and figures.base_ppl is None


def test_progress_is_told_of_every_batch_of_every_block() -> None:
    told = []

    def progress(steps: Any, name: str) -> Any:
        told.append((len(steps), name))
        return steps

    evaluate(first_layers(1), CHUNKS, batch=2, progress=progress)
    # One dense block and the comparison, of two batches.
    assert told == [(4, "evaluating")]


@pytest.mark.parametrize(("length", "scored"), [(512, 255), (64, 31), (7, 3), (4, 1)])
def test_the_tokens_behind_the_middle_one_are_scored(length: int, scored: int) -> None:
    """llama.cpp's protocol: of 512 tokens, those at 257 to 511, each predicted from the one before it."""
    random = np.random.RandomState(length)
    normed_BTD, head_CD = random.randn(1, length, 3).astype(np.float32), random.randn(5, 3).astype(np.float32)
    tokens = random.randint(5, size=(1, length))
    every = log_softmax(normed_BTD @ head_CD.T)[0]
    log_probs = head_log_probabilities(normed_BTD, head_CD)
    assert log_probs.shape == (1, scored, 5)
    np.testing.assert_allclose(log_probs[0], every[length - 1 - scored : length - 1], rtol=1e-4, atol=1e-5)
    nll = compare(log_probs, log_probs, tokens).nll
    expected = [-every[t - 1, tokens[0, t]] for t in range(length - scored, length)]
    np.testing.assert_allclose(nll[0], expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0.01, 1.0, 8.0]))
def test_divergence_is_never_negative_and_zero_only_between_equals(seed: int, spread: float) -> None:
    random = np.random.RandomState(seed)
    base, own = (log_softmax(spread * random.randn(2, SCORED, C)).astype(np.float32) for _ in range(2))
    tokens = random.randint(C, size=(2, T))
    scores = compare(base, own, tokens)
    wide = base.astype(np.float64)
    np.testing.assert_allclose(scores.kld, np.sum(np.exp(wide) * (wide - own), axis=-1), rtol=1e-3, atol=2e-6)
    assert np.all(np.asarray(scores.kld) > 0)
    assert not np.any(compare(base, base, tokens).kld)
    np.testing.assert_array_equal(scores.same_top1, np.argmax(base, axis=-1) == np.argmax(own, axis=-1))
    np.testing.assert_array_equal(scores.nll, compare(own, own, tokens).nll)


def test_the_tiny_checkpoint_has_hugging_face_s_perplexity(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokens = chunks(tokenizer.encode(TEXT), 64, bos_token_id=tokenizer.bos_token_id)
    assert tokens.shape == (5, 64)
    figures = evaluate(load_model(open_checkpoint(tiny)), tokens, batch=5)
    assert figures.tokens == 5 * 31
    assert figures.ppl == pytest.approx(PERPLEXITY, rel=1e-4)
