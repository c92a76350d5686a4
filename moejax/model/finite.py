"""Numbers that are not finite: seen behind every block, and traced to the matrix that put them out first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.formats import reshape_outputs
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Taps, Weight, named_leaves
from moejax.model.moe import ExpertRun, Experts, MoE, Routing
from moejax.model.rope import Angles
from moejax.model.sliced import SlicedBlock, SlicedMtp, entered, pieces
from moejax.sharding import gathered, matmul

_ORDER = ("eh_proj", "q", "q_a", "q_b", "kv_a", "k_b", "v_b", "o", "router", "gate", "up", "down")
_NEEDED = "a checkpoint whose weights are sound is needed"


def finite_rows(x: jax.Array) -> jax.Array:
    """Whether each row of x (..., D) has a finite sum of squares in float32, as the next norm needs it: (...)."""
    return jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    """Whether all rows of x are finite, as `finite_rows` has it."""
    return jnp.all(finite_rows(x))


def require_finite(name: str, x: jax.Array) -> None:
    """Raise InputError unless the rows of x (..., D), the output of `name`, are all finite; traced ones pass."""
    if _is_known_not_to_be(x):
        raise InputError(_sentence(f"the output of {name}", x))


def require_finite_block(name: str, block: SlicedBlock, x_BTD: jax.Array, by: Angles, y_BTD: jax.Array) -> None:
    """Raise InputError unless y, which block `name` made of x, is all finite: a sentence with the matrix, and of
    which expert, that made of finite numbers what is not. Traced ones pass."""
    if _is_known_not_to_be(y_BTD):
        _refuse(name, lambda: _block_steps("", block, x_BTD, by))


def require_finite_mtp(
    name: str, mtp: SlicedMtp, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles, y_BTD: jax.Array
) -> None:
    """`require_finite_block` for an MTP block, which made y of h and the next tokens' embeddings."""
    if _is_known_not_to_be(y_BTD):
        _refuse(name, lambda: _mtp_steps(mtp, h_BTD, next_BTD, by))


def refuse_head() -> NoReturn:
    """Raise the InputError for logits that are not finite behind blocks that are."""
    raise InputError(f"the output of the head is not finite; {_NEEDED}")


def _is_known_not_to_be(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and not all_finite(x)


class _Step(NamedTuple):
    """A matrix, what it took and what it put out."""

    name: str
    taken: jax.Array
    output: jax.Array


def _refuse(name: str, steps: Callable[[], Iterator[_Step]]) -> NoReturn:
    for step in steps():
        if all_finite(step.taken) and not all_finite(step.output):
            raise InputError(f"{name}: {_sentence(f'the output of {step.name}', step.output)}")
    for step in steps():  # a norm or attention made it
        if not all_finite(step.taken):
            raise InputError(f"{name}: {_sentence(f'the input of {step.name}', step.taken)}")
    raise InputError(f"{name}: its output is not finite, though those of its matrices are; {_NEEDED}")


def _sentence(what: str, found: jax.Array) -> str:
    numbers = np.abs(np.asarray(_whole(found), np.float64))
    if np.isnan(numbers).any():
        return f"{what} is not a number; {_NEEDED}"
    return f"{what} reaches {numbers.max():.3g}, too much to be squared and summed in float32; {_NEEDED}"


def _mtp_steps(mtp: SlicedMtp, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles) -> Iterator[_Step]:
    joined_BTD, taps = _mtp_taps(mtp.outer, h_BTD, next_BTD)
    yield from _matrix_steps("", named_leaves(mtp.outer), taps)
    yield from _block_steps("block.", mtp.block, joined_BTD, by)


def _block_steps(prefix: str, block: SlicedBlock, x_BTD: jax.Array, by: Angles) -> Iterator[_Step]:
    """In the order in which they are computed; what is compiled gives taps in that of their names."""
    inside, taps = _block_taps(block.trunk, x_BTD, by)
    leaves = named_leaves(block.trunk)
    shared = {name: x for name, x in taps.items() if name.startswith("mlp.shared")}
    yield from _matrix_steps(prefix, leaves, {name: x for name, x in taps.items() if name not in shared})
    for members, experts in block.slices():
        for start, rows in pieces(inside.routing, members, x_BTD.shape[-1]):
            run = _run(experts, members[0], start, inside.normed_TD, inside.routing, rows=rows)
            yield from _expert_steps(f"{prefix}mlp.experts", members, run)
    yield from _matrix_steps(prefix, leaves, shared)


def _matrix_steps(prefix: str, leaves: Mapping[str, Weight], taps: Taps) -> Iterator[_Step]:
    for name in sorted(taps, key=lambda name: _ORDER.index(name.rpartition(".")[2])):
        x, leaf = taps[name], leaves[name]
        y = matmul(x, leaf if leaf.ndim == 2 else reshape_outputs(leaf, leaf.size // leaf.shape[-1]))
        yield _Step(f"{prefix}{name}", x, y)


def _expert_steps(name: str, members: Sequence[int], run: ExpertRun) -> Iterator[_Step]:
    """By projection and expert; of gate and up together it is their product, which `down` takes."""
    both_R2F = jnp.concatenate([run.gate_RF, run.up_RF], axis=-1)
    projections = {
        "gate": (run.x_RD, run.gate_RF),
        "up": (run.x_RD, run.up_RF),
        "gate and up": (both_R2F, run.hidden_RF),
        "down": (run.hidden_RF, run.y_RD),
    }
    expert_R = np.asarray(_whole(run.expert_R))
    for projection, (taken, output) in projections.items():
        for k, e in enumerate(members):
            if np.any(expert_R == k):
                yield _Step(f"{name}.{projection} of expert {e}", taken[expert_R == k], output[expert_R == k])


# What lies on several devices in parts cannot be looked at.
_whole = jax.jit(gathered)


@jax.jit
def _block_taps(trunk: Block, x_BTD: jax.Array, by: Angles) -> tuple[Any, Taps]:
    taps: Taps = {}
    if isinstance(trunk.mlp, MoE):
        return entered(trunk, x_BTD, by, taps), taps
    return trunk(x_BTD, by, taps=taps), taps


@jax.jit
def _mtp_taps(outer: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array) -> tuple[jax.Array, Taps]:
    taps: Taps = {}
    return outer.joined(h_BTD, next_BTD, taps), taps


@partial(jax.jit, static_argnames="rows")
def _run(experts: Experts, first: int, start: int, normed_TD: jax.Array, routing: Routing, rows: int) -> ExpertRun:
    return experts.run(normed_TD, routing, rows, first, start)
