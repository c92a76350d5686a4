"""What a job may keep in memory beside the block that it is at, and what that block takes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moejax.calibrate.products import input_name
from moejax.checkpoint.shelf import remove_left, shelf_beside
from moejax.formats import payload_bytes
from moejax.ledger import Ledger
from moejax.machine import accelerator_memory
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import WITHIN, Keep, as_it_is
from moejax.model.moe import MoE
from moejax.model.sliced import MOST_STATES, experts_in_slice
from moejax.model.weights import IN_BLOCK
from moejax.planning import Method
from moejax.sharding import ALONE, Crew
from moejax.transforms.error_feedback import rows_together
from moejax.transforms.fit_block import experts_fitted_together
from moejax.transforms.rounder import MOST_NUMBERS, experts_together, few_experts

# Shares of what is left beside a block: statistics of all blocks, rounded weights, states within a block with several
# slices, and states and experts' Hessians, which go to the disk where they are more.
_STATISTICS, _ROUNDED, _WITHIN, _SHELF = 0.2, 0.2, 0.3, 0.2

# What libraries, compilers and allocators take while a job runs, beyond what the process holds at its start.
_PROGRAMS = 750_000_000
# Arrays of as many numbers that searching scales, or feeding errors back, has beside a matrix.
_SEARCH = 6
# The chunks that go through a block together.
BATCH = 8


@dataclass(frozen=True)
class Room:
    """Bytes that may be kept: of statistics and of rounded weights between walks, and of states within a block. `kept`
    puts states away between blocks."""

    statistics: int = 0
    rounded: int = 0
    within: int = WITHIN
    kept: Keep = as_it_is

    def runs_within(self, states: int) -> int:
        """How many runs of so many bytes of states may wait within a block for its next slice: what their experts take,
        once more while runs are put together, and what these put out; the rest is put away."""
        return max(1, self.within // (3 * states))


# Statistics and rounded weights are made again, states stay where they are.
NO_ROOM = Room()


@contextmanager
def room_in(
    ledger: Ledger,
    model: DeepseekV3,
    tokens: int,
    method: Method,
    output: Path,
    keeps_rounded: bool = True,
    most_bytes: int = 0,
    crew: Crew = ALONE,
) -> Iterator[Room]:
    """Of a process that may hold so much, and calibrates an abstract model on chunks of so many tokens, as a method
    asks, to write so many bytes at most. What does not fit lies in a folder beside `output`, which is removed behind.
    Where rounded weights are not kept, states within a block have their share. The processes of a crew, which rounds
    experts, have one room.

    Raises InputError where not even the work on one block fits.
    """
    needed = working_bytes(model, tokens, method, most_bytes, crew.local_devices)
    crew.agree({"number of experts at a time": str(_experts_at_a_time(model.config))})
    left = ledger.left - needed
    if left < 0:
        on = f", on {BATCH} chunks of {tokens} tokens," if tokens else ""
        ledger.refuse(f"a block of the model{on} cannot be worked on", needed)
    if crew.is_first:
        remove_left(output)
    left = crew.least(left)
    with shelf_beside(output, int(_SHELF * left)) as shelf:
        rounded, within = (_ROUNDED, _WITHIN) if keeps_rounded else (0.0, _ROUNDED + _WITHIN)
        beside_experts = crew.least(min(left, accelerator_memory() or left))
        yield Room(int(_STATISTICS * left), int(rounded * left), int(within * beside_experts), shelf.put)


def working_bytes(
    model: DeepseekV3,
    tokens: int,
    method: Method,
    most_bytes: int = 0,
    rounding_devices: int = 1,
) -> int:
    """What measuring, trying and writing one block of an abstract model, or embedding or head, take at most: weights as
    they are read and dense, and once more where probes change them or a matrix is rounded; a batch of states; a block's
    Hessians; its share of what is written, and once more while experts of a format are put together; what rounding a
    group of experts takes, on every device but one that does so in this process's memory. Where the method asks for it,
    going back through a block; and fitting its outputs beside what becomes of it."""
    blocks = [*model.layers, *(own.block for own in model.mtp)]
    outer = max(payload_bytes(own.get_value()) for own in (model.embed, model.head))
    of_block = max(_block_bytes(block, tokens) for block in blocks)
    hessian = max(map(_hessian_bytes, blocks)) if method.error_feedback else 0
    written = max(map(_numbers, blocks)) / _numbers(model) * most_bytes
    writing = max(map(_rounding_bytes, blocks)) + int(2 * written)
    at_once = (rounding_devices - 1) * max(map(_group_bytes, blocks))
    rounding = max(of_block, writing, 2 * outer + _searching_bytes(model.head.get_value().size)) + hessian + at_once
    # Of a sequence its logits, what they become, and their gradient.
    predictions = outer + 3 * 4 * tokens * model.config.vocab_size
    going_back = max(predictions, *(_gradient_bytes(own, tokens) for own in model.layers)) if method.row_feedback else 0
    fitting = max(_fit_bytes(own, tokens) for own in model.layers) + int(written) + hessian if method.output_fit else 0
    return _PROGRAMS + max(rounding, going_back, fitting)


def _numbers(part: DeepseekV3 | Block) -> int:
    return sum(math.prod(own.shape) for own in named_leaves(part).values())


def _rounding_bytes(block: Block) -> int:
    """What is read of a block while its experts are rounded, and what rounding one of them takes."""
    leaves, c = named_leaves(block), block.config
    trunk = payload_bytes({name: own for name, own in leaves.items() if IN_BLOCK[name].role != "routed experts"})
    if not isinstance(block.mlp, MoE):
        return trunk
    assert block.mlp.experts is not None
    share = min(1.0, 2 * experts_in_slice(c) / block.mlp.num_experts)
    searching = _searching_bytes(c.hidden_size * c.moe_intermediate_size)
    return trunk + int(share * payload_bytes(named_leaves(block.mlp.experts))) + searching


def _gradient_bytes(block: Block, tokens: int) -> int:
    """What going back through a block takes: its weights, whole; of a batch a dozen states, the rows of its experts and
    what attention keeps; one expert's matrix, dense; and the outer products of two gradients, and of a batch's."""
    c, of_batch = block.config, BATCH * tokens
    per_token = c.num_experts_per_tok if isinstance(block.mlp, MoE) else 0
    rows = per_token * (4 * c.hidden_size + 8 * c.moe_intermediate_size)
    attention = 4 * c.num_attention_heads * tokens
    states = 12 * c.hidden_size + 4 * max(c.intermediate_size, c.hidden_size) + rows + attention
    dense = max(math.prod(own.shape[-2:]) for own in named_leaves(block).values())
    return payload_bytes(block) + 4 * (of_batch * states + 2 * dense + 6 * c.hidden_size**2)


def _fit_bytes(block: Block, tokens: int) -> int:
    """What fitting what gives hidden states takes: the trunk as it is read; a weight, dense, five times over, and sums
    over tokens that its fit is of, a batch's, and what solving makes of them; of experts together the sums, a batch's,
    and weights as many times; a batch's states and the rows of its experts."""
    leaves, c, of_batch = named_leaves(block), block.config, BATCH * tokens
    trunk = {name: own for name, own in leaves.items() if IN_BLOCK[name].role != "routed experts"}
    wide = [own.shape for name, own in trunk.items() if IN_BLOCK[name].gives_hidden]
    of_one = max(4 * (3 * inputs**2 + 5 * outputs * inputs) for outputs, inputs in wide)
    of_experts, per_token = 0, 2 * c.intermediate_size
    if isinstance(block.mlp, MoE):
        each = 4 * c.moe_intermediate_size * (c.moe_intermediate_size + c.hidden_size)
        of_experts = 4 * min(block.mlp.num_experts, experts_fitted_together(c)) * each
        per_token = c.num_experts_per_tok * (3 * c.hidden_size + 4 * c.moe_intermediate_size)
    return payload_bytes(trunk) + max(of_one, of_experts) + 4 * of_batch * (6 * c.hidden_size + per_token)


def _group_bytes(block: Block) -> int:
    """What rounding a group of a block's experts takes: their weights and Hessians, and a search."""
    if not isinstance(block.mlp, MoE):
        return 0
    c = block.config
    wide, down = (c.moe_intermediate_size, c.hidden_size), (c.hidden_size, c.moe_intermediate_size)
    together = [few_experts((c.n_routed_experts, *own)) for own in (wide, down)]
    of_matrix = [4 * own[1] * sum(own) for own in (wide, down)]
    return max(
        count * (each + _searching_bytes(math.prod(wide))) for count, each in zip(together, of_matrix, strict=True)
    )


def _experts_at_a_time(config: Config) -> list[int]:
    """In a slice, and rounded together: accelerators' memories may tell processes other numbers."""
    every, wide = config.n_routed_experts, (config.moe_intermediate_size, config.hidden_size)
    together = [experts_together((every, *own)) for own in (wide, wide[::-1])]
    return [experts_in_slice(config), *together, *map(rows_together, wide)]


def _block_bytes(block: Block, tokens: int) -> int:
    config = block.config
    trunk = {name: leaf for name, leaf in named_leaves(block).items() if IN_BLOCK[name].role != "routed experts"}
    dense, states = 4 * sum(leaf.size for leaf in trunk.values()), 4 * BATCH * tokens * config.hidden_size
    searching = max(_searching_bytes(leaf.size) for name, leaf in trunk.items() if IN_BLOCK[name].may_be_rounded)
    size = payload_bytes(trunk) + dense
    before = size + max(dense, searching) + 4 * states
    if not isinstance(block.mlp, MoE):
        return before
    assert block.mlp.experts is not None
    experts = named_leaves(block.mlp.experts)
    share = experts_in_slice(config) / block.mlp.num_experts
    numbers = sum(math.prod(own.shape) for own in experts.values())
    rows = min(4 * MOST_STATES, config.num_experts_per_tok * states)
    # Read, and the next one too; dense, changed, and once more on the way from one to the next: as measured on
    # DeepSeek-V3's shapes.
    within = share * (2 * payload_bytes(experts) + (3 + 2 / 3) * 4 * numbers)
    one = math.prod(experts["gate"].shape[1:])
    return max(before, size + int(within) + _searching_bytes(one) + 8 * rows + 6 * states)


def _searching_bytes(numbers: int) -> int:
    """What looking for the scales of a matrix, or feeding its errors back, takes."""
    return 4 * _SEARCH * min(MOST_NUMBERS, numbers)


def _hessian_bytes(block: Block) -> int:
    """Of every input: those of all tokens, of a batch, of tokens held out, and what rounding makes of them."""
    leaves, c = named_leaves(block), block.config
    inputs = [leaf.shape[-1] for name, leaf in leaves.items() if IN_BLOCK[name].is_matrix and input_name(name) == name]
    of_experts = [c.hidden_size, c.moe_intermediate_size] if isinstance(block.mlp, MoE) else []
    return 4 * 4 * sum(own**2 for own in (*inputs, *of_experts))
