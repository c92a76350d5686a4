"""What pruning costs a layer against the same in NumPy and float64, every expert run on every token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from leaf_oracle import to_numpy
from moejax.model import named_leaves
from moejax.model.moe import MoE, Routing
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import PruningError, lost, pruning_error, rerouted
from small_models import CONFIG, small_model

Array = NDArray[Any]

E, G = CONFIG.n_routed_experts, CONFIG.n_group
X_TD = np.random.RandomState(0).randn(40, CONFIG.hidden_size)
# At most two of a group's four.
PRUNED: tuple[list[int], ...] = ([], [3], [0, 1, 10], [0, 2, 5, 6, 8, 11])


def moe_layer(bias_mean: float = 0.0) -> MoE:
    mlp = small_model().layers[1].mlp
    assert isinstance(mlp, MoE)
    leaves = named_leaves(mlp)
    return MoE(CONFIG, (leaves | {"bias": leaves["bias"] + bias_mean}).__getitem__)


@jax.jit
def routed(moe: MoE, x_TD: jax.Array, routing: Routing) -> jax.Array:
    assert moe.experts is not None
    return moe.experts(x_TD, routing)[0]


def error_of(moe: MoE, x_TD: jax.Array, pruned_E: jax.Array) -> PruningError:
    own = moe.route(x_TD)
    others = lost(own, pruned_E), rerouted(moe, x_TD, pruned_E)
    return pruning_error(own, pruned_E, *(routed(moe, x_TD, routing) for routing in (own, *others)))


def mask(pruned: list[int]) -> jax.Array:
    return jnp.zeros(E, bool).at[jnp.asarray(pruned, int)].set(True)


def gates_by_hand(moe: MoE, pruned: list[int]) -> Array:
    """Every expert's gate weight for every token when none can choose the pruned experts, (T, E)."""
    router_ED, bias_E, group_E = (np.asarray(named_leaves(moe)[name]) for name in ("router", "bias", "group_id"))
    score_TE = 1 / (1 + np.exp(-X_TD @ router_ED.astype(np.float64).T))
    choice_TE = score_TE + bias_E
    choice_TE[:, pruned] = -np.inf
    of_group = [np.sort(choice_TE[:, group_E == group])[:, -2:].sum(axis=1) for group in range(G)]
    best_TG = np.argsort(np.stack(of_group, axis=1))[:, -CONFIG.topk_group :]
    choice_TE[~np.any(group_E == best_TG[:, :, None], axis=1)] = -np.inf
    chosen_TK = np.argsort(choice_TE)[:, -moe.experts_per_token :]
    gate_TE = np.zeros_like(score_TE)
    np.put_along_axis(gate_TE, chosen_TK, np.take_along_axis(score_TE, chosen_TK, axis=1), axis=1)
    return CONFIG.routed_scaling_factor * gate_TE / gate_TE.sum(axis=1, keepdims=True)


def outputs_by_hand(moe: MoE) -> Array:
    """Every expert's output for every token, (T, E, D)."""
    leaves = named_leaves(moe)
    gate, up, down = (to_numpy(leaves[f"experts.{name}"].buckets[0]) for name in ("gate", "up", "down"))
    a_TEF, u_TEF = (np.einsum("td,efd->tef", X_TD, weight) for weight in (gate, up))
    return np.einsum("tef,edf->ted", a_TEF / (1 + np.exp(-a_TEF)) * u_TEF, down)


def error_by_hand(moe: MoE, pruned: list[int]) -> PruningError:
    f_TED, gate_TE = outputs_by_hand(moe), gates_by_hand(moe, [])
    kept_TE = gate_TE * np.isin(np.arange(E), pruned, invert=True)
    whole, rerouted, dropped = (
        np.einsum("te,ted->td", own_TE, f_TED) for own_TE in (gate_TE, gates_by_hand(moe, pruned), kept_TE)
    )
    return PruningError(
        *(((y_TD - whole) ** 2).mean() / (whole**2).mean() for y_TD in (rerouted, dropped)),
        *(1 - (kept_TE**power).sum() / (gate_TE**power).sum() for power in (2, 1)),
    )


@pytest.mark.parametrize("bias_mean", [0.0, -1.5])
@pytest.mark.parametrize("pruned", PRUNED)
def test_the_error_is_that_of_a_layer_in_numpy(pruned: list[int], bias_mean: float) -> None:
    with jax.enable_x64(True):
        moe = moe_layer(bias_mean)
        found = error_of(moe, jnp.asarray(X_TD), mask(pruned))
        np.testing.assert_allclose(found, error_by_hand(moe, pruned), rtol=1e-9, atol=1e-12)
        assert all((own > 1e-3) == bool(pruned) for own in found)


def test_without_anyone_or_of_a_silent_layer_everything_is_known() -> None:
    x_TD = jnp.asarray(X_TD, jnp.float32)
    everyone = error_of(moe_layer(), x_TD, jnp.ones(E, bool))
    np.testing.assert_allclose(everyone[1:], 1, rtol=1e-6)
    silent = error_of(adjust(moe_layer(), CONFIG.num_experts_per_tok, 0.0), x_TD, mask([0, 1]))
    np.testing.assert_array_equal(silent, 0)


def compilations(jitted: Any) -> int:
    return jitted._cache_size()


def test_one_compilation_serves_every_choice_of_experts() -> None:
    x_TD, before = jnp.asarray(X_TD[:7], jnp.float32), compilations(pruning_error)
    errors = [error_of(moe_layer(), x_TD, mask(pruned)) for pruned in PRUNED]
    assert compilations(pruning_error) == before + 1
    assert errors[0].dropped == 0 < errors[-1].dropped
