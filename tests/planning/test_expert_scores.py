"""Routing statistics: what was published for DeepSeek-V3, and files that are none."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.checkpoint.json_file import read_json_object
from moejax.errors import InputError
from moejax.model import config_from_hf
from moejax.planning.expert_scores import ExpertScores, equal_scores, expert_scores_from_json
from moejax.resources import config_path
from small_models import CONFIG

V3 = config_from_hf(json.loads(config_path("models", "deepseek_v3").read_text()))
EXPERTS = CONFIG.n_routed_experts


@pytest.fixture(scope="module")
def published() -> ExpertScores:
    file = config_path("expert_scores", "deepseek_v3")
    return expert_scores_from_json(read_json_object(file), V3, str(file))


def raw_scores() -> dict[str, Any]:
    """Of the small model, whose layers 1 and 2 have experts."""
    own: dict[str, Any] = {"scores": [float(e + 1) for e in range(EXPERTS)], "activations": [*range(EXPERTS)]}
    return {"layer_1": own, "layer_2": {"scores": own["scores"][::-1], "activations": own["activations"][::-1]}}


def test_every_layer_of_deepseek_v3_chose_eight_experts_for_the_same_tokens(published: ExpertScores) -> None:
    assert set(published.count) == set(published.gate_mass) == set(range(3, 62))
    assert {float(count.sum()) for count in published.count.values()} == {12843488.0}
    assert 12843488 % 8 == 0
    assert published.source is not None and "DeepSeek-V3-0324" in published.source


@pytest.mark.parametrize(("kept", "share"), [(192, 0.9155), (160, 0.8437), (128, 0.7534)])
def test_what_the_experts_that_stay_hold_of_the_gate_mass(published: ExpertScores, kept: int, share: float) -> None:
    shares = {block: np.sort(published.gate_share(block))[-kept:].sum() for block in range(3, 61)}
    assert np.mean([*shares.values()]) == pytest.approx(share, abs=5e-5)
    if kept == 192:
        worst = min(shares, key=lambda block: shares[block])
        assert (worst, round(float(shares[worst]), 4)) == (56, 0.8861)


def test_the_mtp_block_takes_the_last_layer_s(published: ExpertScores) -> None:
    assert V3.num_nextn_predict_layers == 1
    np.testing.assert_array_equal(published.gate_mass[61], published.gate_mass[60])
    np.testing.assert_array_equal(published.count[61], published.count[60])


def test_shares_sum_to_one(published: ExpertScores) -> None:
    for block in published.count:
        for share_E in (published.importance(block), published.gate_share(block), published.choice_share(block)):
            assert share_E.shape == (256,) and np.all(share_E >= 0)
            assert share_E.sum() == pytest.approx(1)


counts = st.lists(st.tuples(st.integers(0, 1000), st.just(0.0) | st.floats(1e-6, 1)), min_size=1, max_size=20)


@given(counts.filter(lambda own: any(n * g > 0 for n, g in own)))
def test_importance_is_a_share_of_squared_gate_weights(own: list[tuple[int, float]]) -> None:
    count_E, mean_E = (np.asarray(part, np.float64) for part in zip(*own, strict=True))
    scores = ExpertScores({5: count_E * mean_E}, {5: count_E}, None)
    energy = [n * g**2 for n, g in own]
    np.testing.assert_allclose(scores.importance(5), np.asarray(energy) / sum(energy), atol=1e-12)
    np.testing.assert_allclose(scores.gate_share(5), count_E * mean_E / sum(n * g for n, g in own), atol=1e-12)
    np.testing.assert_allclose(scores.choice_share(5), count_E / sum(n for n, _ in own), atol=1e-12)


def test_where_nothing_was_measured_all_experts_are_alike() -> None:
    scores = equal_scores(CONFIG)
    assert set(scores.count) == {1, 2, 3} and scores.source is None
    for block in scores.count:
        for share_E in (scores.importance(block), scores.gate_share(block), scores.choice_share(block)):
            np.testing.assert_allclose(share_E, 1 / EXPERTS)


def test_a_file_of_the_small_model() -> None:
    scores = expert_scores_from_json(raw_scores(), CONFIG, "here.json")
    assert scores.source == "here.json"
    np.testing.assert_array_equal(scores.gate_mass[1], 1 + np.arange(EXPERTS))
    np.testing.assert_array_equal(scores.count[2], np.arange(EXPERTS)[::-1])
    np.testing.assert_array_equal(scores.count[3], scores.count[2])
    assert expert_scores_from_json(raw_scores() | {"source": "us"}, CONFIG, "here.json").source == "us"
    without_mtp = replace(CONFIG, num_nextn_predict_layers=0)
    assert set(expert_scores_from_json(raw_scores(), without_mtp, "here.json").count) == {1, 2}


OWN = raw_scores()["layer_1"]
ZEROS = [0] * EXPERTS


def having(value: Any) -> list[Any]:
    return [*OWN["scores"][:-1], value]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([], "must be an object with the lists 'scores' and 'activations' and nothing else"),
        ("scores", "must be an object"),
        (None, "must be an object"),
        ({"scores": OWN["scores"]}, "must be an object"),
        (OWN | {"norms": ZEROS}, "must be an object"),
        (OWN | {"scores": OWN["scores"][1:]}, "scores has 11 values; one for each of the model's 12 experts is needed"),
        (OWN | {"activations": [*ZEROS, 1]}, "activations has 13 values; one for each"),
        (OWN | {"activations": 12}, "activations has no list; one for each of the model's 12"),
        (OWN | {"scores": "123456789012"}, "scores has no list"),
        (OWN | {"scores": {"0": 1.0}}, "scores has no list"),
        (OWN | {"scores": having(float("nan"))}, "scores holds nan; finite numbers from 0 are needed"),
        (OWN | {"scores": having(float("inf"))}, "scores holds inf; finite numbers from 0"),
        (OWN | {"scores": having(-1)}, "scores holds -1; finite numbers from 0"),
        (OWN | {"scores": having("1")}, "scores holds '1'; finite numbers from 0"),
        (OWN | {"scores": having(None)}, "scores holds None; finite numbers"),
        (OWN | {"scores": having(True)}, "scores holds True; finite numbers"),
        (OWN | {"scores": having([1])}, r"scores holds \[1\]; finite numbers"),
        (OWN | {"scores": having(10**400)}, "scores holds 10+; finite numbers"),
        (OWN | {"scores": having(1e300)}, r"scores holds 1e\+300; finite numbers"),
        (OWN | {"scores": ZEROS}, "no expert was ever chosen; scores of at least one token are needed"),
        (OWN | {"activations": ZEROS}, "no expert was ever chosen"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_a_layer_that_cannot_be_read_is_named(layer: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^here.json: layer_2:? ?{message}"):
        expert_scores_from_json(raw_scores() | {"layer_2": layer}, CONFIG, "here.json")


def test_missing_and_unknown_layers_are_named() -> None:
    raw = raw_scores()
    del raw["layer_2"]
    with pytest.raises(InputError, match=r"^here.json: layer_2 is missing; the model has experts in layers 1 to 2$"):
        expert_scores_from_json(raw, CONFIG, "here.json")
    for name in ("layer_0", "layer_3", "Layer_1", "scores"):
        message = f"^here.json: '{name}' is no layer with experts; those are layer_1 to layer_2$"
        with pytest.raises(InputError, match=message):
            expert_scores_from_json(raw_scores() | {name: OWN}, CONFIG, "here.json")


def test_scores_of_another_model_are_refused(published: ExpertScores) -> None:
    raw = read_json_object(config_path("expert_scores", "deepseek_v3"))
    with pytest.raises(InputError, match="'layer_10' is no layer with experts; those are layer_1 to layer_2"):
        expert_scores_from_json(raw | raw_scores(), CONFIG, "here.json")
