"""What memory a model's parts and compiled steps take, from shapes."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from moejax.formats import ExpertWeights, payload_bytes
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import Experts, MoE
from moejax.model.rope import Angles
from moejax.model.sliced import Entered, SlicedBlock, add_piece, enter, leave, most_rows, sliced, some_of
from moejax.model.steps import run_block
from moejax.sharding import data_parts

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


def reading_bytes_of_block(block: Block) -> int:
    """`reading_bytes` of an abstract block of which a slice of the experts is there at a time."""
    own = sliced(block)
    return reading_bytes(own.trunk) + (reading_bytes(_largest_slice(block)) if own.is_moe else 0)


def sliced_step_bytes(block: Block, x_BTD: jax.Array, by: Angles) -> int:
    """What states x (B, T, D) take on their way through an abstract block, slice by slice, beside x and the block:
    workspace, results, and what is within the block."""
    own = sliced(block)
    if not own.is_moe or data_parts() > 1:
        return step_bytes(run_block, block, x_BTD, by)
    inside, routed_TD = _within(own, x_BTD, by)
    rows = most_rows(inside.routing, x_BTD.shape[-1])
    given = (inside.normed_TD, inside.routing, routed_TD)
    waiting = payload_bytes([inside, routed_TD])
    return max(
        step_bytes(enter, own.trunk, x_BTD, by),
        waiting + step_bytes(add_piece, _largest_slice(block), 0, 0, *given, rows=rows),
        waiting + step_bytes(leave, inside, routed_TD),
    )


def waiting_bytes(block: Block, x_BTD: jax.Array, by: Angles) -> int:
    """What of states x (B, T, D) waits within an abstract block for its next slice while other states go through this
    one; nothing where there is one slice."""
    own = sliced(block)
    return payload_bytes(_within(own, x_BTD, by)) if len(own.ranges) > 1 else 0


def _within(block: SlicedBlock, x_BTD: jax.Array, by: Angles) -> tuple[Entered, jax.Array]:
    inside = jax.eval_shape(enter, block.trunk, x_BTD, by)
    return inside, jax.eval_shape(lambda own: own.nothing_TD, inside)


def _largest_slice(block: Block) -> Experts:
    assert isinstance(block.mlp, MoE)
    return jax.eval_shape(partial(some_of, members=sliced(block).ranges[0]), block.mlp.experts)


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
