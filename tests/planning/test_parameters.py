"""Parameters of published models, as their publishers count them, and of a small one counted by hand."""

import json
from typing import Any

import jax
import pytest

from model_cases import BASE
from moejax.checkpoint.abstract import abstract_original
from moejax.model import config_from_hf
from moejax.planning.parameters import Parameters, count_parameters
from moejax.resources import config_path
from small_models import small_model


def published(name: str, **changes: Any) -> Parameters:
    raw = json.loads(config_path("models", name).read_text())
    return count_parameters(abstract_original(raw | changes))


def billions(count: int) -> float:
    return round(count / 1e9, 1)


def test_deepseek_v3() -> None:
    parameters = published("deepseek_v3")
    assert (billions(parameters.total), billions(parameters.active)) == (671.0, 36.6)
    assert parameters.with_mtp == parameters.total + parameters.mtp > parameters.total


def test_deepseek_v3_with_three_quarters_of_its_experts() -> None:
    """arXiv:2509.25689 prunes it to these; a token activates as many as before, and a smaller router chooses them."""
    whole, pruned = published("deepseek_v3"), published("deepseek_v3", n_routed_experts=192)
    assert (billions(pruned.total), billions(pruned.with_mtp)) == (507.5, 516.3)
    assert whole.active - pruned.active == 58 * 64 * (7168 + 1)


@pytest.mark.parametrize(
    ("name", "total", "active", "digits"), [("kimi_k2", 1026.4, 31.7, 1), ("moonlight_16b_a3b", 15.96, 2.58, 2)]
)
def test_other_published_models(name: str, total: float, active: float, digits: int) -> None:
    parameters = published(name)
    assert (round(parameters.total / 1e9, digits), round(parameters.active / 1e9, digits)) == (total, active)
    assert parameters.mtp == 0


def test_a_small_model_counted_by_hand() -> None:
    raw = BASE | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    d, f, experts, k, heads, kv, q = 64, 88, 16, 3, 4, 32, 72
    attention = d * q + q + q * heads * (24 + 16) + d * (kv + 16) + kv + kv * heads * (24 + 56) + heads * 56 * d
    block = attention + 2 * d
    expert = 3 * d * f
    dense, outside = 3 * d * 104, d * experts + experts + expert
    total = 2 * 97 * d + d + 2 * block + dense + outside + experts * expert
    parameters = count_parameters(abstract_original(raw))
    assert parameters.total == total
    assert parameters.mtp == block + outside + experts * expert + 3 * d + 2 * d * d
    assert parameters.active == total - 97 * d - (experts - k) * expert
    assert config_from_hf(raw).n_shared_experts == 1


def test_a_concrete_model_counts_as_its_shapes_do() -> None:
    model = small_model()
    assert count_parameters(model) == count_parameters(jax.eval_shape(lambda m: m, model))
