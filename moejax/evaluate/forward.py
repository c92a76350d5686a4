"""Chunks through a model, all of them through one block before the next one is asked for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels import take
from moejax.model.deepseek_v3 import Block
from moejax.model.finite import require_finite, require_finite_block, require_finite_mtp
from moejax.model.parts import Parts
from moejax.model.rope import Rotation, rotation
from moejax.model.steps import run_block, run_mtp, run_norm

Tick = Callable[[], object]


class FinalStates(NamedTuple):
    """What the head takes, batch by batch, in the host's memory.

    scored: of the positions t = T/2 to T-2, whose logits predict token t+1, (B, T-1 - T/2, D).
    drafted: the first MTP block's of those t for which token t+2 is in the chunk, t = T/2 to T-3; empty if not asked.
    """

    scored: list[np.ndarray]
    drafted: list[np.ndarray]


def final_states(
    parts: Parts, batches: Sequence[np.ndarray], dtype: jax.typing.DTypeLike, draft: bool, tick: Tick
) -> FinalStates:
    """Run token batches (B, T), which are of one length, through the model and, if `draft`, its first MTP block.

    No more than one part of the model is asked for at a time. `tick` is called before every batch of every block.

    Raises InputError, naming the matrix, at the first block whose output is not finite.
    """
    config, length = parts.config, batches[0].shape[1]
    embedded = _embedded(parts, batches, dtype)
    states = list(embedded)
    if not draft:
        del embedded
    by = rotation(config, jnp.arange(length), jnp.promote_types(dtype, jnp.float32))
    for index in range(config.num_hidden_layers):
        _run_in_place(f"layers.{index}", parts.block(index), states, by, tick)
    norm = parts.norm()
    for n, x_BTD in enumerate(states):
        states[n] = np.asarray(run_norm(x_BTD, norm, eps=config.rms_norm_eps))
    scored = [x_BTD[:, length // 2 : length - 1].copy() for x_BTD in states]
    drafted = _drafted(parts, states, embedded, by, tick) if draft else []
    return FinalStates(scored, drafted)


def _embedded(parts: Parts, batches: Sequence[np.ndarray], dtype: jax.typing.DTypeLike) -> list[np.ndarray]:
    embedding, embedded = parts.embedding(), []
    for tokens_BT in batches:
        x_BTD = take(embedding, jnp.asarray(tokens_BT), dtype)
        require_finite("embed", x_BTD)
        embedded.append(np.asarray(x_BTD))
    return embedded


def _run_in_place(name: str, block: Block, states: list[np.ndarray], by: Rotation, tick: Tick) -> None:
    for n, state_BTD in enumerate(states):
        tick()
        x_BTD = jnp.asarray(state_BTD)
        y_BTD = run_block(block, x_BTD, by)
        require_finite_block(name, block, x_BTD, by, y_BTD)
        states[n] = np.asarray(y_BTD)


def _drafted(
    parts: Parts, normed: Sequence[np.ndarray], embedded: Sequence[np.ndarray], by: Rotation, tick: Tick
) -> list[np.ndarray]:
    """`FinalStates.drafted`: position t takes the model's state of t and the embedding of token t+1."""
    mtp, length = parts.mtp(0), normed[0].shape[1]
    by = jax.tree.map(lambda angle_TR: angle_TR[:-1], by)
    drafted = []
    for h_BTD, e_BTD in zip(normed, embedded, strict=True):
        tick()
        taken = jnp.asarray(h_BTD[:, :-1]), jnp.asarray(e_BTD[:, 1:])
        y_BTD = run_mtp(mtp, *taken, by)
        require_finite_mtp("mtp.0", mtp, *taken, by, y_BTD)
        drafted.append(np.asarray(y_BTD)[:, length // 2 : length - 2].copy())
    return drafted
