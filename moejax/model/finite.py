"""Numbers that are not finite: seen behind every block, and traced to the matrix that put them out first."""

from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.formats import reshape_outputs
from moejax.kernels import matmul
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Taps, named_leaves
from moejax.model.moe import ExpertRun
from moejax.model.rope import Angles

_ORDER = ("eh_proj", "q", "q_a", "q_b", "kv_a", "k_b", "v_b", "o", "router", "experts", "gate", "up", "down")
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


def require_finite_block(name: str, block: Block, x_BTD: jax.Array, by: Angles, y_BTD: jax.Array) -> None:
    """Raise InputError unless y, which block `name` made of x, is all finite: a sentence with the matrix, and of
    which expert, that made of finite numbers what is not. Traced ones pass."""
    if _is_known_not_to_be(y_BTD):
        _refuse(name, block, _block_taps(block, x_BTD, by))


def require_finite_mtp(
    name: str, mtp: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles, y_BTD: jax.Array
) -> None:
    """`require_finite_block` for an MTP block, which made y of h and the next tokens' embeddings."""
    if _is_known_not_to_be(y_BTD):
        _refuse(name, mtp, _mtp_taps(mtp, h_BTD, next_BTD, by))


def refuse_head() -> NoReturn:
    """Raise the InputError for logits that are not finite behind blocks that are."""
    raise InputError(f"the output of the head is not finite; {_NEEDED}")


def _is_known_not_to_be(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and not all_finite(x)


@jax.jit
def _block_taps(block: Block, x_BTD: jax.Array, by: Angles) -> Taps:
    taps: Taps = {}
    block(x_BTD, by, taps=taps)
    return taps


@jax.jit
def _mtp_taps(mtp: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles) -> Taps:
    taps: Taps = {}
    mtp(h_BTD, next_BTD, by, taps)
    return taps


def _refuse(name: str, module: Block | MtpBlock, taps: Taps) -> NoReturn:
    steps = list(_steps(module, taps))
    for step in steps:
        if all_finite(step.taken) and not all_finite(step.output):
            raise InputError(f"{name}: {_sentence(f'the output of {step.name}', step.output)}")
    for step in steps:  # a norm or attention made it
        if not all_finite(step.taken):
            raise InputError(f"{name}: {_sentence(f'the input of {step.name}', step.taken)}")
    raise InputError(f"{name}: its output is not finite, though those of its matrices are; {_NEEDED}")


def _sentence(what: str, found: jax.Array) -> str:
    numbers = np.abs(np.asarray(found, np.float64))
    if np.isnan(numbers).any():
        return f"{what} is not a number; {_NEEDED}"
    return f"{what} reaches {numbers.max():.3g}, too much to be squared and summed in float32; {_NEEDED}"


class _Step(NamedTuple):
    """A matrix, what it took and what it put out."""

    name: str
    taken: jax.Array
    output: jax.Array


def _steps(module: Block | MtpBlock, taps: Taps) -> Iterator[_Step]:
    """In the order in which they are computed; what is compiled gives taps in that of their names."""
    leaves = named_leaves(module)
    for name in sorted(taps, key=lambda name: _ORDER.index(name.rpartition(".")[2])):
        x = taps[name]
        if isinstance(x, ExpertRun):
            yield from _expert_steps(name, x)
        else:
            leaf = leaves[name]
            yield _Step(
                name, x, matmul(x, leaf if leaf.ndim == 2 else reshape_outputs(leaf, leaf.size // leaf.shape[-1]))
            )


def _expert_steps(name: str, run: ExpertRun) -> Iterator[_Step]:
    """By projection and expert; of gate and up together it is their product, which `down` takes."""
    both_R2F = jnp.concatenate([run.gate_RF, run.up_RF], axis=-1)
    projections = {
        "gate": (run.x_RD, run.gate_RF),
        "up": (run.x_RD, run.up_RF),
        "gate and up": (both_R2F, run.hidden_RF),
        "down": (run.hidden_RF, run.y_RD),
    }
    expert_R = np.asarray(run.expert_R)
    for projection, (taken, output) in projections.items():
        for e in np.unique(expert_R):
            yield _Step(f"{name}.{projection} of expert {e}", taken[expert_R == e], output[expert_R == e])
