"""What every block of the small model sees in CHUNKS, and sums over it in NumPy and float64, token by token."""

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from leaf_oracle import to_numpy
from moejax.calibrate import BlockStatistics, ExpertStatistics, Statistics, calibrate
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps
from moejax.model.moe import MoE, Routing
from moejax.model.rope import Angles
from small_models import CHUNKS, CONFIG, small_model

Array = NDArray[Any]

SIZES = {"E": CONFIG.n_routed_experts, "D": CONFIG.hidden_size, "F": CONFIG.moe_intermediate_size}
BLOCKS = ["layers.0", "layers.1", "layers.2", "mtp.0"]
MOE_BLOCKS = BLOCKS[1:]


class Seen(NamedTuple):
    """A block, the inputs of its weights by name over all chunks, and where its tokens went."""

    block: Block
    inputs: dict[str, Array]
    routing: Routing | None


@jax.jit
def observe(block: Block, x_BTD: jax.Array, by: Angles) -> tuple[jax.Array, Taps, Routing | None]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, taps=taps)
    taps.pop("mlp.experts", None)
    return y_BTD, taps, block.mlp.route(taps["mlp.router"]) if isinstance(block.mlp, MoE) else None


@cache
def seen() -> tuple[dict[str, Seen], Array]:
    """What every block of the small model sees in CHUNKS, and the final norm's output."""
    model, tokens_BT = small_model(), jnp.asarray(CHUNKS)
    x_BTD, blocks = model.embedded(tokens_BT), {}
    by = model.angles(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
    for i, layer in enumerate(model.layers):
        x_BTD, taps, routing = observe(layer, x_BTD, by)
        blocks[f"layers.{i}"] = Seen(layer, as_numpy(taps), routing)
    normed_BTD = np.asarray(model.normed(x_BTD), np.float64)
    blocks["mtp.0"] = seen_by_mtp(model, normed_BTD, by)
    return blocks, normed_BTD


def seen_by_mtp(model: DeepseekV3, normed_BTD: Array, by: Angles) -> Seen:
    """The same of the MTP block, which takes each next token's embedding beside the hidden state, both normed.

    The last token has no next one; it is run nevertheless, for the sake of the shape, and cut off what was seen.
    """
    mtp = model.mtp[0]
    leaves = {name: to_numpy(leaf) for name, leaf in named_leaves(mtp).items() if not name.startswith("block.")}
    following_BTD = to_numpy(model.embed.get_value())[np.roll(CHUNKS, -1, axis=1)]
    both = rms_norm(following_BTD, leaves["enorm"]), rms_norm(normed_BTD, leaves["hnorm"])
    eh_input = np.concatenate(both, axis=-1)
    _, taps, routing = observe(mtp.block, jnp.asarray(eh_input @ leaves["eh_proj"].T, jnp.float32), by)
    inputs = {
        name: x.reshape(*CHUNKS.shape, -1)[:, :-1] for name, x in (as_numpy(taps) | {"eh_proj": eh_input}).items()
    }
    assert routing is not None
    cut = (own.reshape(*CHUNKS.shape, -1)[:, :-1].reshape(-1, own.shape[-1]) for own in routing)
    return Seen(mtp.block, inputs, Routing(*cut))


def rms_norm(x: Array, gain: Array) -> Array:
    return gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)


def as_numpy(taps: Taps) -> dict[str, Array]:
    return {name: np.asarray(x, np.float64) for name, x in taps.items()}


@cache
def statistics_with_hessians() -> Statistics:
    """Of `small_model` on CHUNKS, in two batches."""
    return calibrate(small_model(), CHUNKS, batch=2, hessians=True)


def measured(name: str) -> BlockStatistics:
    return statistics_with_hessians().blocks[BLOCKS.index(name)]


def expert_sums(seen_by: Seen) -> dict[str, Array]:
    """Everything in ExpertStatistics, one token and expert at a time."""
    assert seen_by.routing is not None
    experts = matrices_by_expert(seen_by.block)
    fields = [field.name for field in dataclasses.fields(ExpertStatistics)]
    sums = {name: np.zeros([SIZES[axis] for axis in name.rsplit("_")[-1]]) for name in fields if "_" in name}
    experts_TK, weights_TK = map(np.asarray, seen_by.routing)
    inputs_TD = seen_by.inputs["mlp.router"].reshape(-1, SIZES["D"])
    for x_D, chosen_K, weights_K in zip(inputs_TD, experts_TK, weights_TK, strict=True):
        for e, g in zip(chosen_K, weights_K.astype(np.float64), strict=True):
            gate, up, down = experts[e]
            a_F, u_F = gate @ x_D, up @ x_D
            hidden_F = silu(a_F) * u_F
            f_D = down @ hidden_F
            norm = np.linalg.norm(f_D)
            slope_F = (silu(a_F + 1e-5) - silu(a_F - 1e-5)) / 2e-5
            sums["count_E"][e] += 1
            sums["weight_E"][e] += g
            sums["weighted_norm_E"][e] += g * norm
            sums["norm2_E"][e] += norm**2
            sums["gate2_E"][e] += g**2
            sums["x2_ED"][e] += (g * x_D) ** 2
            sums["hidden2_EF"][e] += (g * hidden_F) ** 2
            sums["gate_slope2_EF"][e] += (g * slope_F * u_F) ** 2
            sums["up_slope2_EF"][e] += (g * silu(a_F)) ** 2
            sums["peak_E"][e] = max(sums["peak_E"][e], np.abs(f_D).max())
            for field, x in (("x_EDD", x_D), ("hidden_EFF", hidden_F)):
                sums[field][e] += g**2 * np.outer(x, x)
    of_layer = {"count": "count_E", "gate2": "gate2_E", "x2_D": "x2_ED", "hidden2_F": "hidden2_EF"}
    of_layer |= {"x_DD": "x_EDD", "hidden_FF": "hidden_EFF"}
    return (
        sums | {name: sums[own].sum(axis=0) for name, own in of_layer.items()} | {"tokens": np.asarray(len(inputs_TD))}
    )


def matrices_by_expert(block: Block) -> list[tuple[Array, ...]]:
    """Gate, up and down of every expert of an original block, whose experts lie in one bucket in order."""
    leaves = named_leaves(block)
    return [*zip(*(to_numpy(leaves[f"mlp.experts.{name}"].buckets[0]) for name in ("gate", "up", "down")), strict=True)]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
