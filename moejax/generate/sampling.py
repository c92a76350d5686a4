"""How the next token is drawn from a model's logits."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.errors import InputError


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p", "min_p"], meta_fields=[])
@dataclass(frozen=True)
class Sampling:
    """What tokens are drawn from: p = softmax(logits / temperature), restricted in transformers' order.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: keep this many of the likeliest tokens; 0 keeps all.
      top_p: of p renormalized over those, keep the fewest likeliest whose sum reaches this; 1 keeps all.
      min_p: keep tokens of at least this share of the likeliest one's probability; 0 keeps all.
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    min_p: float | jax.Array = 0.0


GREEDY = Sampling()


class Draw(NamedTuple):
    """How the next tokens are drawn, and a key for each sequence, (B,)."""

    sampling: Sampling
    keys_B: jax.Array


def check_sampling(sampling: Sampling) -> None:
    """Raise InputError for values that no distribution has."""
    limits = {
        "temperature": (0 <= sampling.temperature < math.inf, "0 or a positive number"),
        "top_k": (sampling.top_k >= 0, "0 (all tokens) or a positive integer"),
        "top_p": (0 < sampling.top_p <= 1, "a number above 0, at most 1"),
        "min_p": (0 <= sampling.min_p <= 1, "a number from 0 to 1"),
    }
    for name, (holds, wanted) in limits.items():
        if not holds:
            raise InputError(f"{name} is {getattr(sampling, name)}; {wanted} is needed")


def sample(logits_BC: jax.Array, draw: Draw) -> jax.Array:
    """The next token of each sequence, int32 (B,), each drawn with its own key."""
    drawn_B = jax.lax.cond(
        jnp.asarray(draw.sampling.temperature) > 0,
        lambda: jax.vmap(partial(_draw, sampling=draw.sampling))(logits_BC, draw.keys_B),
        lambda: jnp.argmax(logits_BC, axis=-1),
    )
    return drawn_B.astype(jnp.int32)


def _draw(logits_C: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    order_C = jnp.argsort(logits_C, descending=True)
    scaled_C = logits_C[order_C] / sampling.temperature
    rank_C = jnp.arange(scaled_C.size)
    kept_C = jnp.where((rank_C < sampling.top_k) | (sampling.top_k == 0), scaled_C, -jnp.inf)
    probability_C = jax.nn.softmax(kept_C)
    before_C = jnp.cumsum(probability_C) - probability_C
    is_kept_C = (before_C < sampling.top_p) & (probability_C >= sampling.min_p * probability_C[0])
    # Sums of rounded probabilities must not cut what is asked for as a whole.
    is_kept_C |= (sampling.top_p == 1) & (probability_C >= sampling.min_p * probability_C[0])
    return order_C[jax.random.categorical(key, jnp.where(is_kept_C, kept_C, -jnp.inf))]
