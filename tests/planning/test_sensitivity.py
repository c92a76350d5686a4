"""How sensitive DeepSeek-V3 is to each of its weights, as was published; and files that say nothing of it."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from moejax.checkpoint.json_file import read_json_object
from moejax.errors import InputError
from moejax.model import Config, Layout, config_from_hf
from moejax.planning.sensitivity import Sensitivity, sensitivity_from_json
from moejax.resources import config_path

FILE = config_path("sensitivity", "deepseek_v3")
RAW = read_json_object(FILE)
PUBLISHED = sensitivity_from_json(RAW, str(FILE))


def config_of(name: str, **changes: Any) -> Config:
    return config_from_hf(json.loads(config_path("models", name).read_text()) | changes)


V3 = config_of("deepseek_v3")


def of_v3(name: str) -> float:
    return PUBLISHED.of(name, V3)


def weights(config: Config) -> list[str]:
    """What a plan may round: matrices that are no router."""
    shapes = Layout(config).shapes()
    return [name for name, shape in shapes.items() if len(shape) > 1 and not name.endswith("router")]


def floor() -> float:
    return min(min(own.values()) if isinstance(own, dict) else own for own in RAW["kl"].values())


def test_the_head_is_the_most_sensitive_and_the_embedding_the_next() -> None:
    found = {name: of_v3(name) for name in weights(V3)}
    first, second, *others = sorted(found, key=lambda name: -found[name])
    assert (first, second) == ("head", "embed")
    assert found["head"] == pytest.approx(RAW["kl"]["head"] - floor())
    assert found["head"] > 5 * found["embed"] > 5 * max(found[name] for name in others)
    assert min(found.values()) >= 0


@pytest.mark.parametrize("kind", ["self_attn.kv_a", "self_attn.o", "mlp.down", "mlp.experts.down", "mlp.experts.up"])
def test_half_of_a_value_s_distance_from_its_kind_s_mean_is_believed(kind: str) -> None:
    measured = {int(layer): value - floor() for layer, value in RAW["kl"][kind].items()}
    mean = sum(measured.values()) / len(measured)
    for layer, value in measured.items():
        assert of_v3(f"layers.{layer}.{kind}") == pytest.approx((value + mean) / 2)


@pytest.mark.parametrize(
    ("group", "layer"),
    [
        (("self_attn.q_a", "self_attn.q_b"), 7),
        (("self_attn.k_b", "self_attn.v_b"), 0),
        (("mlp.shared.gate", "mlp.shared.up", "mlp.shared.down"), 60),
    ],
)
def test_what_was_measured_together_is_shared(group: tuple[str, ...], layer: int) -> None:
    measured = [value - floor() for value in RAW["kl"][group[0]].values()]
    own = RAW["kl"][group[0]][str(layer)] - floor()
    shares = [of_v3(f"layers.{layer}.{kind}") for kind in group]
    assert len(set(shares)) == 1
    assert sum(shares) == pytest.approx((own + np.mean(measured)) / 2)


def test_stand_ins_for_what_was_not_measured() -> None:
    moonlight = config_of("moonlight_16b_a3b")
    assert moonlight.q_lora_rank is None
    both = [PUBLISHED.of(f"layers.5.self_attn.{name}", moonlight) for name in ("q_a", "q_b")]
    assert PUBLISHED.of("layers.5.self_attn.q", moonlight) == pytest.approx(sum(both))
    assert of_v3("mtp.0.eh_proj") == of_v3("layers.60.self_attn.o")


@pytest.mark.parametrize("own", ["self_attn.o", "self_attn.k_b", "mlp.experts.gate", "mlp.shared.up"])
def test_mtp_blocks_count_like_the_last_layer(own: str) -> None:
    assert of_v3(f"mtp.0.block.{own}") == of_v3(f"layers.60.{own}") == PUBLISHED.of(f"mtp.4.block.{own}", V3)


def test_other_models_take_the_same_relative_depth() -> None:
    half = config_of("deepseek_v3", num_hidden_layers=30)
    for layer in (4, 17, 29):
        place = (layer + 0.5) / 30 * 61 - 0.5
        low, share = int(place), place - int(place)
        around = [of_v3(f"layers.{low + n}.self_attn.o") if low + n < 61 else 0.0 for n in (0, 1)]
        expected = (1 - share) * around[0] + share * around[1]
        assert PUBLISHED.of(f"layers.{layer}.self_attn.o", half) == pytest.approx(expected)
    # Deeper than any layer that was measured, and shallower, the nearest holds.
    deep = config_of("deepseek_v3", num_hidden_layers=610)
    assert PUBLISHED.of("layers.609.self_attn.o", deep) == of_v3("layers.60.self_attn.o")
    assert PUBLISHED.of("layers.0.self_attn.o", deep) == of_v3("layers.0.self_attn.o")
    assert PUBLISHED.of("layers.0.mlp.experts.up", deep) == of_v3("layers.3.mlp.experts.up")


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "moonlight_16b_a3b"])
def test_every_weight_of_published_models_has_one(name: str) -> None:
    config = config_of(name)
    found = [PUBLISHED.of(weight, config) for weight in weights(config)]
    assert np.all(np.isfinite(found)) and min(found) >= 0


def test_layers_may_stand_in_any_order() -> None:
    shuffled = {kind: dict(reversed(own.items())) if isinstance(own, dict) else own for kind, own in RAW["kl"].items()}
    found = sensitivity_from_json(RAW | {"kl": shuffled}, "here.json")
    assert [found.of(name, V3) for name in weights(V3)] == pytest.approx([of_v3(name) for name in weights(V3)])
    assert isinstance(found, Sensitivity) and found.source == RAW["source"]


def damaged(**kinds: Any) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(RAW)
    raw["kl"] |= kinds
    return raw


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"kl": RAW["kl"]},
        {"source": "us"},
        {"source": "us", "kl": [1.0]},
        {"source": "us", "kl": {}},
        {"source": "us", "kl": {"head": 1.0}},
        damaged(head=None),
        damaged(head="much"),
        damaged(head=[0.1]),
        damaged(embed={}),
        damaged(**{"self_attn.o": {"first": 0.1}}),
        damaged(**{"self_attn.o": {"0": None}}),
        damaged(**{"self_attn.o": {"0": "much"}}),
        damaged(**{"self_attn.o": [0.1]}),
        damaged(head=float("nan")),
        damaged(**{"self_attn.o": {"0": float("inf")}}),
    ],
    ids=lambda raw: str(raw)[-30:],
)
def test_what_is_no_measurement_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^here.json cannot be read: .* in it; KL by kind of weight is needed$"):
        sensitivity_from_json(raw, "here.json")
