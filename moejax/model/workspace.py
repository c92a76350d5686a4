"""What memory a model's parts and compiled steps take, from shapes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moejax.formats import ExpertWeights, payload_bytes
from moejax.model.deepseek_v3 import Block

# What allocators lose, libraries set aside and compilers take beside all that is counted: 130 MB were measured on two
# cores, of a checkpoint of 4 GB.
_MARGIN_BYTES, _MARGIN_SHARE = 200_000_000, 0.03


def with_margin(size: int) -> int:
    """Counted bytes, and what cannot be counted beside them."""
    return math.ceil(size * (1 + _MARGIN_SHARE)) + _MARGIN_BYTES


def largest_of_each_kind(blocks: Sequence[Block]) -> list[Block]:
    """A dense block and one with experts, as far as there are any."""
    by_kind = {type(block.mlp): block for block in sorted(blocks, key=payload_bytes)}
    return list(by_kind.values())


def reading_bytes(part: Any) -> int:
    """A part that is read from a checkpoint, and the largest matrix that it is read from beside it."""
    leaves = jax.tree.leaves(part, is_leaf=lambda leaf: isinstance(leaf, ExpertWeights))
    largest = max(payload_bytes(own) // (own.num_experts if isinstance(own, ExpertWeights) else 1) for own in leaves)
    return payload_bytes(part) + largest


def step_bytes(step: Callable[..., Any], *arguments: Any, **static: Any) -> int:
    """What a jitted step takes beside its arguments: its workspace, and results that are not written over them."""
    compiled = step.lower(*arguments, **static).compile()  # type: ignore[attr-defined]
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
