"""A decoder block whose routed experts are asked for a few at a time, and the way through it.

    entered = enter(trunk, x)                  attention, the router, the shared experts
    routed = onto(experts, entered, routed)    for every slice of the experts, in their order
    y = leave(entered, routed)

The trunk is the block without its routed experts, which are nearly all of it: 11.3 of DeepSeek-V3's 11.5 GB. What is
summed, and in which order, does not depend on the slices.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import GroupedCodes, select_experts
from moejax.machine import accelerator_memory
from moejax.model.config import Config
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Taps, named_leaves, prefixed
from moejax.model.moe import Experts, MoE, Routing, wide_dtype
from moejax.model.rope import Angles
from moejax.model.steps import run_block
from moejax.sharding import data_parts, is_meshed

# Numbers in a slice of experts, at most: half a gigabyte in float32. All experts of a small model are one slice. On an
# accelerator a slice takes that share of its memory in float32, if that is more.
MOST_NUMBERS = 1 << 27
_SHARE_ACCELERATED = 1 / 16

# Numbers in the hidden states that go through a slice together, at most.
MOST_STATES = 1 << 25

# What gives experts by their numbers, as many as are asked for and in that order.
ExpertsOf = Callable[[Sequence[int]], Experts]


@dataclass(frozen=True)
class SlicedBlock:
    """trunk: a block without its routed experts; a dense block, whole. num_experts: 0 in a dense block. per_slice: how
    many experts are asked for together. is_read: whether that takes reading, so that a slice is asked for while the one
    before is at work."""

    trunk: Block
    experts_of: ExpertsOf
    num_experts: int
    per_slice: int
    is_read: bool = False

    @property
    def config(self) -> Config:
        return self.trunk.config

    @property
    def is_moe(self) -> bool:
        return isinstance(self.trunk.mlp, MoE)

    @property
    def experts_per_token(self) -> int:
        return self.trunk.experts_per_token

    @property
    def ranges(self) -> list[range]:
        """Which experts every slice has."""
        return slices_of(self.num_experts, self.per_slice)

    def slices(self) -> Iterator[tuple[range, Experts]]:
        """The routed experts, slice by slice. None is kept here, but where they are read the next one is on its way."""
        if not self.is_read or len(self.ranges) == 1:
            for members in self.ranges:
                yield members, self.experts_of(members)
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.experts_of, self.ranges[0])
            for members, following in zip(self.ranges, [*self.ranges[1:], None], strict=True):
                experts = ahead.result()
                if following is not None:
                    ahead = reader.submit(self.experts_of, following)
                else:
                    del ahead
                yield members, experts
                del experts

    def whole(self) -> Block:
        """The block with all its experts."""
        if not self.is_moe:
            return self.trunk
        return with_experts(self.trunk, self.experts_of(range(self.num_experts)))


@dataclass(frozen=True)
class SlicedMtp:
    """An MTP block around a `SlicedBlock`; `outer.block` is that one's trunk."""

    outer: MtpBlock
    block: SlicedBlock

    @property
    def config(self) -> Config:
        return self.outer.config

    def whole(self) -> MtpBlock:
        """The block with all its experts."""
        return around(self.outer, self.block.whole())


def sliced(block: Block) -> SlicedBlock:
    """A block that is in memory. Packed experts are one slice: they are few bytes, and lie in buckets of which every
    other cut would be compiled by itself. On a mesh all are: its processes need not have equal memories."""
    if not isinstance(block.mlp, MoE):
        return SlicedBlock(block, _no_experts, 0, 1)
    experts = block.mlp.experts
    assert experts is not None
    buckets = [bucket for own in named_leaves(experts).values() for bucket in own.buckets]
    is_packed = any(isinstance(own, GroupedCodes) for own in buckets)
    per_slice = experts.num_experts if is_packed or is_meshed() else experts_in_slice(block.config)
    return SlicedBlock(trunk_of(block), partial(some_of, experts), experts.num_experts, per_slice)


def sliced_mtp(mtp: MtpBlock) -> SlicedMtp:
    """An MTP block that is in memory."""
    block = sliced(mtp.block)
    return SlicedMtp(around(mtp, block.trunk), block)


def trunk_of(block: Block) -> Block:
    """A block with experts without them."""
    return Block(block.config, named_leaves(block).__getitem__, True, block.experts_per_token, has_experts=False)


def with_experts(trunk: Block, experts: Experts) -> Block:
    """The trunk's block."""
    leaves = named_leaves(trunk) | prefixed("mlp.experts", named_leaves(experts))
    return Block(trunk.config, leaves.__getitem__, True, trunk.experts_per_token)


def around(mtp: MtpBlock, block: Block) -> MtpBlock:
    """The MTP block with another decoder block, or trunk, in it."""
    own = {name: leaf for name, leaf in named_leaves(mtp).items() if not name.startswith("block.")}
    leaves, is_moe = own | prefixed("block", named_leaves(block)), isinstance(block.mlp, MoE)
    has_experts = isinstance(block.mlp, MoE) and block.mlp.experts is not None
    return MtpBlock(block.config, leaves.__getitem__, is_moe, block.experts_per_token, has_experts=has_experts)


def experts_in_slice(config: Config) -> int:
    """How many experts are asked for together: shapes alone decide, and an accelerator's memory."""
    each, own = 3 * config.hidden_size * config.moe_intermediate_size, accelerator_memory()
    most = MOST_NUMBERS if own is None else max(MOST_NUMBERS, int(_SHARE_ACCELERATED * own) // 4)
    return max(1, min(config.n_routed_experts, most // each))


def slices_of(num_experts: int, per_slice: int) -> list[range]:
    """Which experts every slice of a layer has."""
    starts = range(0, num_experts, per_slice)
    return [range(first, min(first + per_slice, num_experts)) for first in starts]


def some_of(experts: Experts, members: Sequence[int]) -> Experts:
    """Some of a layer's experts."""
    if list(members) == list(range(experts.num_experts)):
        return experts
    leaves = named_leaves(experts)
    return Experts(experts.config, lambda name: select_experts(leaves[name], members))


def _no_experts(members: Sequence[int]) -> Experts:
    raise AssertionError("a dense block has no experts")


class Entered(NamedTuple):
    """Hidden states within a block with experts.

    x_BTD: behind attention. normed_TD: what router and experts take. routing: where tokens go. shared_TD: what the
    shared experts put out.
    """

    x_BTD: jax.Array
    normed_TD: jax.Array
    routing: Routing
    shared_TD: jax.Array

    @property
    def nothing_TD(self) -> jax.Array:
        """The sum over no expert."""
        return jnp.zeros_like(self.normed_TD, wide_dtype(self.normed_TD))


def entered(trunk: Block, x_BTD: jax.Array, by: Angles, taps: Taps | None = None) -> Entered:
    """Up to the routed experts; `taps` receives every weight's input."""
    assert isinstance(trunk.mlp, MoE)
    x_BTD = trunk.attended(x_BTD, by, taps)
    normed_TD = trunk.normed(x_BTD).reshape(-1, x_BTD.shape[-1])
    mlp_taps: Taps | None = None if taps is None else {}
    routing, shared_TD = trunk.mlp.enter(normed_TD, taps=mlp_taps)
    if taps is not None:
        taps |= prefixed("mlp", mlp_taps)
    return Entered(x_BTD, normed_TD, routing, shared_TD)


enter = jax.jit(entered)


def there(inside: Entered) -> Entered:
    """The arrays themselves, where some have been put away."""
    return jax.tree.map(jnp.asarray, inside)


@jax.jit
def leave(entered: Entered, routed_TD: jax.Array) -> jax.Array:
    """The block's output (B, T, D)."""
    y_TD = routed_TD.astype(entered.shared_TD.dtype) + entered.shared_TD
    return entered.x_BTD + y_TD.reshape(entered.x_BTD.shape)


def onto(
    experts: Experts, members: Sequence[int], normed_TD: jax.Array, routing: Routing, routed_TD: jax.Array
) -> jax.Array:
    """The sum over experts so far (T, D), whose memory is taken over, and these, numbers `members` of the layer's."""
    for start, rows in pieces(routing, members, normed_TD.shape[-1]):
        routed_TD = add_piece(experts, members[0], start, normed_TD, routing, routed_TD, rows=rows)
    return routed_TD


@partial(jax.jit, static_argnames="rows", donate_argnames="routed_TD")
def add_piece(
    experts: Experts,
    first: int,
    start: int,
    normed_TD: jax.Array,
    routing: Routing,
    routed_TD: jax.Array,
    rows: int,
) -> jax.Array:
    return experts.run(normed_TD, routing, rows, first, start).onto(routed_TD)


def pieces(routing: Routing, members: Sequence[int], hidden_size: int) -> Iterator[tuple[int, int]]:
    """Where to start among the rows that the experts `members` are chosen for, and for how many to make room: sizes
    are few, because each is compiled, and no more than MOST_STATES numbers of hidden states. In a trace, for all."""
    if isinstance(routing.experts_TK, jax.core.Tracer):
        yield 0, routing.experts_TK.size
        return
    own = np.asarray(routing.experts_TK)
    count = np.count_nonzero((own >= members[0]) & (own <= members[-1]))
    rows = min(1 << max(0, int(count) - 1).bit_length(), most_rows(routing, hidden_size))
    yield from ((start, rows) for start in range(0, count, rows))


def most_rows(routing: Routing, hidden_size: int) -> int:
    """Of a piece, at most."""
    return min(int(routing.experts_TK.size), max(1, MOST_STATES // hidden_size))


def through(block: SlicedBlock, states: Iterable[jax.Array], by: Angles) -> Iterator[jax.Array]:
    """States x (B, T, D) through a decoder block: what `block.whole()` makes of each. Every slice is asked for once, or
    all together where the sequences are in parts: each has rows of other experts."""
    if not block.is_moe or data_parts() > 1:
        whole = block.whole()
        yield from (run_block(whole, x_BTD, by) for x_BTD in states)
        return
    if len(block.ranges) == 1:
        ((members, experts),) = block.slices()
        for x_BTD in states:
            inside = enter(block.trunk, x_BTD, by)
            yield leave(inside, onto(experts, members, inside.normed_TD, inside.routing, inside.nothing_TD))
        return
    insides = [enter(block.trunk, x_BTD, by) for x_BTD in states]
    sums = [inside.nothing_TD for inside in insides]
    for members, experts in block.slices():
        for n, inside in enumerate(insides):
            sums[n] = onto(experts, members, inside.normed_TD, inside.routing, sums[n])
        jax.block_until_ready(sums)  # before the next slice is read
    yield from map(leave, insides, sums)


def through_mtp(mtp: SlicedMtp, taken: Iterable[tuple[jax.Array, jax.Array]], by: Angles) -> Iterator[jax.Array]:
    """Hidden states and next tokens' embeddings (B, T, D) through an MTP block: what `mtp.whole()` makes of each."""
    for y_BTD in through(mtp.block, (join(mtp.outer, *own) for own in taken), by):
        yield unjoin(mtp.outer, y_BTD)


join = jax.jit(MtpBlock.joined)
unjoin = jax.jit(MtpBlock.normed)
