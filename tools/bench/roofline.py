"""What a step must read on one chip, what its kernels move, and the tokens a second that this allows at most.

Counted from the kernels' grids and blocks (`moejax/kernels/multiply_tpu.py`), not from a compiler's estimates: a tile
of packed weights is moved once for all rows of its matrix, a block of rows once for every tile of outputs, results
once. Of experts those are counted that rows go to: K for one token, and of more tokens as many as are expected where
every expert is as likely, E (1 - (1 - K/E)^tokens). Of the cache every token attends to the whole context. Exchanges
between chips, norms and activations within a layer are left out: tokens a second are bounded from above.

Bandwidth and bfloat16 operations of a chip: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from moejax.formats import ExpertWeights, Leaf, payload_bytes
from moejax.kernels import multiply_tpu
from moejax.model import DeepseekV3, named_leaves
from moejax.model.latent_cache import bytes_per_token
from moejax.sharding.rules import is_cut


class Chip(NamedTuple):
    """Bytes and bfloat16 operations a second."""

    bandwidth: float
    operations: float


CHIPS = {"v5e": Chip(819e9, 197e12), "v5p": Chip(2765e9, 459e12), "v6e": Chip(1638e9, 918e12)}
ITEM = jnp.dtype(jnp.bfloat16).itemsize


@dataclass(frozen=True)
class Moved:
    """By one chip in a step: bytes of weights and cache that must be read, bytes moved, operations."""

    needed: float = 0.0
    moved: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.needed + other.needed, self.moved + other.moved, self.operations + other.operations)

    def seconds(self, chip: Chip) -> float:
        return max(self.moved / chip.bandwidth, self.operations / chip.operations)


def step(model: DeepseekV3, batch: int, tokens: int, context: int, chips: int) -> Moved:
    """Of `decode_step` with so many tokens of each sequence, one chip of several."""
    per_layer = bytes_per_token(model.config, jnp.bfloat16) / model.config.num_hidden_layers
    cache = batch * context * per_layer * len(model.layers)
    total = Moved(cache, cache)
    for name, own in _multiplied(model):
        rows = batch if name == "head" else batch * tokens
        total += (
            _experts(own, rows, _per_token(model, name), chips)
            if isinstance(own, ExpertWeights)
            else _matrix(own, rows, chips)
        )
    return total


def _multiplied(model: DeepseekV3) -> Iterator[tuple[str, Leaf | ExpertWeights]]:
    """Every weight of the layers and the head; of the embedding no more than a row is read."""
    for name, own in named_leaves(model).items():
        if name.startswith(("layers.", "norm", "head")):
            yield name, own


def _per_token(model: DeepseekV3, name: str) -> int:
    return model.layers[int(name.split(".")[1])].experts_per_token


def _matrix(w: Leaf, rows: int, chips: int) -> Moved:
    """A matrix (O, I), one per head (H, O, I), or a vector, and the part of it that a chip has."""
    share = chips if w.ndim >= 2 and is_cut(w, chips) else 1
    needed = payload_bytes(w) / share
    if w.ndim < 2:
        return Moved(needed, needed)
    matrices, (outputs, inputs) = (w.shape[0] // share if w.ndim == 3 else 1), w.shape[-2:]
    own_outputs = outputs if w.ndim == 3 else outputs // share
    beside = matrices * _beside(own_outputs, inputs, rows)
    return Moved(needed, needed + beside, 2 * matrices * rows * own_outputs * inputs)


def _experts(w: ExpertWeights, tokens: int, per_token: int, chips: int) -> Moved:
    share = chips if is_cut(w, chips) else 1
    _, outputs, inputs = w.shape
    hit = w.num_experts * (1 - (1 - per_token / w.num_experts) ** tokens)
    needed = payload_bytes(w.buckets) / w.num_experts * hit / share
    rows = tokens * per_token
    return Moved(needed, needed + _beside(outputs // share, inputs, rows), 2 * rows * outputs // share * inputs)


def _beside(outputs: int, inputs: int, rows: int) -> float:
    """Bytes of rows, once for every tile of outputs, and of results."""
    tiles = -(-outputs // multiply_tpu.outputs_together(outputs, inputs, jnp.bfloat16))
    return rows * (tiles * inputs + outputs) * ITEM
