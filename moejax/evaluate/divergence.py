"""Perplexity, and how far a model's predictions are from its original's.

The protocol is llama.cpp's (`llama-perplexity`), so that figures compare: of every chunk of T tokens, those at T/2+1 to
T-1 are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import Leaf
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import head_logits
from moejax.model.steps import embed, run_blocks
from moejax.progress import Progress, silent


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
    model), nats; same_top1, percent.
    """

    tokens: int
    ppl: float
    base_ppl: float | None = None
    ln_ppl_ratio: float | None = None
    kld_mean: float | None = None
    kld_p999: float | None = None
    same_top1: float | None = None


def evaluate(
    model: DeepseekV3,
    chunks: np.ndarray,
    base: DeepseekV3 | Sequence[jax.Array] | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    batch: int = 8,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of `model` on token chunks (N, T), and its divergence from `base`: the original, or its
    `log_probabilities` of every batch where they are used again."""
    scores, base_nll = [], []
    for n in progress(range(-(-len(chunks) // batch)), "evaluating"):
        tokens = jnp.asarray(chunks[n * batch : (n + 1) * batch])
        log_probs = log_probabilities(model, tokens, dtype)
        if base is None:
            reference = log_probs
        else:
            reference = log_probabilities(base, tokens, dtype) if isinstance(base, DeepseekV3) else base[n]
        scores.append(jax.device_get(compare(reference, log_probs, tokens)))
        base_nll.append(np.asarray(_nll(reference, tokens)))
    nll, kld, same = (np.concatenate([np.ravel(batch[i]) for batch in scores]) for i in range(3))
    ppl = float(np.exp(np.mean(nll, dtype=np.float64)))
    if base is None:
        return Evaluation(nll.size, ppl)
    base_mean = np.mean(np.concatenate([np.ravel(part) for part in base_nll]), dtype=np.float64)
    return Evaluation(
        tokens=nll.size,
        ppl=ppl,
        base_ppl=float(np.exp(base_mean)),
        ln_ppl_ratio=float(np.log(ppl) - base_mean),
        kld_mean=float(np.mean(kld, dtype=np.float64)),
        kld_p999=float(np.quantile(kld, 0.999)),
        same_top1=100 * float(np.mean(same)),
    )


def log_probabilities(model: DeepseekV3, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """log p(token at t | tokens before) for the scored t = T/2+1 to T-1, (B, T/2-1, C) in float32."""
    x_BTD, by = embed(model, tokens_BT, dtype)
    normed_BTD = model.normed(run_blocks(model.layers, x_BTD, by))
    return head_log_probabilities(normed_BTD, model.head.get_value())


@jax.jit
def head_log_probabilities(normed_BTD: jax.Array, head: Leaf) -> jax.Array:
    """`log_probabilities` from the final norm's output."""
    scored = slice(normed_BTD.shape[1] // 2, normed_BTD.shape[1] - 1)
    return jax.nn.log_softmax(head_logits(normed_BTD[:, scored], head).astype(jnp.float32), axis=-1)


@jax.jit
def compare(base: jax.Array, log_probs: jax.Array, tokens_BT: jax.Array) -> TokenScores:
    """Scores from two models' log-probabilities (B, T/2-1, C)."""
    kld = jnp.sum(jnp.exp(base) * (base - log_probs), axis=-1)
    same = jnp.argmax(base, axis=-1) == jnp.argmax(log_probs, axis=-1)
    return TokenScores(_nll(log_probs, tokens_BT), kld, same)


@jax.jit
def _nll(log_probs: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    targets = tokens_BT[:, tokens_BT.shape[1] // 2 + 1 :]
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
