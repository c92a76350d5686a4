"""The damping chosen for a matrix is the one of least error on held-out tokens, found here in NumPy and float64."""

import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from leaf_oracle import to_numpy
from moejax.calibrate import ExpertStatistics, Inputs, Statistics, calibrate
from moejax.formats import ExpertWeights, IntFormat, Leaf
from moejax.model import named_leaves
from moejax.planning.plan import PROJECTIONS
from moejax.transforms import choose_damping as module
from moejax.transforms.choose_damping import MULTIPLES, choose_damping, has_few_tokens
from moejax.transforms.error_feedback import quantize_with_feedback
from moejax.transforms.hessian import DAMPING, DAMPING_PER_INPUT, damping_for
from moejax.transforms.rounding import to_float32
from seen_by_blocks import statistics_with_hessians
from small_models import CONFIG, small_model


@cache
def held_out() -> Statistics:
    tokens = np.random.RandomState(1).randint(CONFIG.vocab_size, size=(4, 14))
    return calibrate(small_model(), tokens.astype(np.int32), hessians=True)


@cache
def chosen() -> Statistics:
    return choose_damping(small_model(), statistics_with_hessians(), held_out())


def errors(leaf: Leaf, inputs: Inputs, held: Inputs) -> list[float]:
    """E|(W - Q) x|^2 over held-out tokens of a matrix, by multiple."""
    assert inputs.hessian is not None and held.hessian is not None
    hessian_II, found = np.asarray(held.hessian, np.float64), []
    for multiple in MULTIPLES:
        damping = multiple * damping_for(inputs.tokens, leaf.shape[-1])
        packed = quantize_with_feedback(to_float32(leaf), inputs.hessian, IntFormat(2, 128), damping)
        left_OI = (to_numpy(leaf) - to_numpy(packed)).reshape(-1, leaf.shape[-1])
        found.append(float(np.sum((left_OI @ hessian_II) * left_OI)))
    return found


@pytest.mark.parametrize("name", ["self_attn.q_a", "self_attn.k_b", "mlp.shared.down"])
def test_a_matrix_has_the_multiple_of_least_error(name: str) -> None:
    block, held = statistics_with_hessians().blocks[1], held_out().blocks[1]
    by_multiple = errors(named_leaves(small_model().layers[1])[name], block.inputs(name), held.inputs(name))
    multiple = float(chosen().blocks[1].damping[name])
    assert multiple == pytest.approx(MULTIPLES[int(np.argmin(by_multiple))])
    assert float(chosen().blocks[1].inputs(name).damping) == multiple


def experts_of(statistics: Statistics) -> ExpertStatistics:
    experts = statistics.blocks[1].experts
    assert experts is not None
    return experts


def test_the_experts_of_a_projection_share_the_best_for_those_with_most_tokens() -> None:
    own, held = experts_of(statistics_with_hessians()), experts_of(held_out())
    weights = named_leaves(small_model().layers[1])["mlp.experts.down"]
    assert isinstance(weights, ExpertWeights)
    most = np.argsort(-np.asarray(held.count_E), kind="stable")[:8]
    each = [errors(weights.expert(e), own.inputs("down", e), held.inputs("down", e)) for e in most]
    multiple = float(experts_of(chosen()).damping["down"])
    assert multiple == pytest.approx(MULTIPLES[int(np.argmin(np.log(each).mean(axis=0)))])
    assert float(experts_of(chosen()).inputs("down", 3).damping) == multiple


def test_of_a_matrix_with_many_rows_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 5)
    head, inputs, held = (
        small_model().head.get_value(),
        statistics_with_hessians().head_inputs(),
        held_out().head_inputs(),
    )
    rows = to_float32(head)[np.linspace(0, head.shape[0] - 1, 5).round().astype(int)]
    found = module.choose_damping_of_matrix(head, inputs, held)
    assert found == pytest.approx(MULTIPLES[int(np.argmin(errors(rows, inputs, held)))])


def test_every_matrix_but_the_router_has_one() -> None:
    for before, after in zip(statistics_with_hessians().blocks, chosen().blocks, strict=True):
        assert after.damping.keys() == before.input2.keys() - {"mlp.router"}
        assert after.experts is None or after.experts.damping.keys() == set(PROJECTIONS)
    assert float(chosen().head_inputs().damping) in np.asarray(MULTIPLES, np.float32)


def test_where_tokens_are_many_nothing_is_chosen() -> None:
    many = jax.tree.map(lambda sums: 1e4 * sums, statistics_with_hessians())
    many = choose_damping(small_model(), many, held_out())
    assert not any(block.damping or (block.experts and block.experts.damping) for block in many.blocks)
    assert many.head_damping is None


def test_tokens_are_few_where_those_of_one_weight_are() -> None:
    """At DAMPING a matrix of I inputs has DAMPING_PER_INPUT / DAMPING * I tokens; experts see K/E of them."""
    per_input = DAMPING_PER_INPUT / DAMPING
    widest = CONFIG.num_attention_heads * CONFIG.v_head_dim, 2 * CONFIG.hidden_size, CONFIG.intermediate_size
    enough = math.ceil(per_input * max(widest))
    share = CONFIG.num_experts_per_tok / CONFIG.n_routed_experts
    for_experts = math.ceil((per_input - 1) * CONFIG.moe_intermediate_size / share)
    for config, least in (
        (CONFIG, max(enough, for_experts)),
        (replace(CONFIG, num_experts_per_tok=CONFIG.n_routed_experts, num_nextn_predict_layers=0), enough),
    ):
        assert has_few_tokens(config, least - 1) and not has_few_tokens(config, least + 1)
