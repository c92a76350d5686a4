"""Blocks whose outputs are fitted: they come nearer to the original's, in the formats that they had."""

from dataclasses import replace
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from moejax.formats import ExpertWeights, format_name
from moejax.model import DeepseekV3
from moejax.model.hidden_states import HiddenStates
from moejax.model.sliced import SlicedBlock
from moejax.model.source import ModelSource, walk
from moejax.planning import Method, Plan
from moejax.transforms import fit_block
from moejax.transforms.compress import Collected, calibrate_and_compress
from moejax.transforms.output_fit import fitted
from sequential_plan import PLAN as SEQUENTIAL
from small_models import CONFIG, small_model

CHUNKS: NDArray[np.int32] = np.random.RandomState(3).randint(CONFIG.vocab_size, size=(8, 32)).astype(np.int32)
# A random model's tokens tell nothing of others, so those held out are some that are fitted to.
HELD_OUT = CHUNKS[:4]
# The embedding, the shared expert and, of the last layer, attention's outputs are rounded too.
PLAN = replace(
    SEQUENTIAL,
    embed="int2g128",
    blocks=(
        SEQUENTIAL.blocks[0],
        replace(SEQUENTIAL.blocks[1], formats={"self_attn.o": "int2g128", "mlp.shared.down": "ternaryg128"}),
        replace(SEQUENTIAL.blocks[2], formats={"self_attn.o": "int2g128"}),
        SEQUENTIAL.blocks[3],
    ),
)
FITTED, WITHOUT = Method(error_feedback=True, output_fit=True), Method(error_feedback=True)


def leaves_of(plan: Plan, method: Method) -> dict[str, Any]:
    parts = Collected()
    calibrate_and_compress(ModelSource(small_model()), replace(plan, method=method), CHUNKS, HELD_OUT, parts, batch=4)
    return parts.leaves


@pytest.fixture(scope="module")
def leaves() -> dict[str, Any]:
    return leaves_of(PLAN, FITTED)


@pytest.fixture(scope="module")
def unfitted() -> dict[str, Any]:
    return leaves_of(PLAN, WITHOUT)


class Behind(HiddenStates):
    """The states behind every block, one array each."""

    def __init__(self) -> None:
        super().__init__(CONFIG, [jnp.asarray(CHUNKS)], jnp.float32)
        self.every: list[np.ndarray] = []

    def block(self, index: int, block: SlicedBlock) -> None:
        super().block(index, block)
        self.every.append(np.asarray(self.states[0], np.float64))


def behind(model: DeepseekV3) -> list[np.ndarray]:
    step = Behind()
    walk(ModelSource(model), step)
    return step.every


def errors(leaves: dict[str, Any]) -> list[float]:
    """By block, the mean square of what its output lacks of the original's, on what was calibrated on."""
    per_token = [CONFIG.num_experts_per_tok, 3, 3, 3]
    found = behind(DeepseekV3(CONFIG, leaves.__getitem__, per_token))
    return [float(np.mean((own - other) ** 2)) for own, other in zip(found, behind(small_model()), strict=True)]


def formats(leaf: Any) -> Any:
    if isinstance(leaf, ExpertWeights):
        return [format_name(bucket) for bucket in leaf.buckets], leaf.bucket_E.tolist(), leaf.index_E.tolist()
    return format_name(leaf), leaf.shape


def test_every_block_lacks_less(leaves: dict[str, Any], unfitted: dict[str, Any]) -> None:
    """The last one too, of which attention's output alone is rounded: it makes up for those before it."""
    for own, without in zip(errors(leaves), errors(unfitted), strict=True):
        assert own < 0.97 * without


def test_only_what_gives_hidden_states_and_was_rounded_changes(
    leaves: dict[str, Any], unfitted: dict[str, Any]
) -> None:
    assert leaves.keys() == unfitted.keys()
    assert {name: formats(leaf) for name, leaf in leaves.items()} == {
        name: formats(leaf) for name, leaf in unfitted.items()
    }
    changed = {
        "layers.0.mlp.down",
        "layers.1.self_attn.o",
        "layers.1.mlp.shared.down",
        "layers.1.mlp.experts.down",
        "layers.2.self_attn.o",
    }
    kept = {name: leaf for name, leaf in leaves.items() if name not in changed}
    chex.assert_trees_all_equal(kept, {name: unfitted[name] for name in kept})
    for name in changed:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal({name: leaves[name]}, {name: unfitted[name]})


def test_slices_of_experts_change_nothing(leaves: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    each = 4 * CONFIG.moe_intermediate_size * (CONFIG.moe_intermediate_size + CONFIG.hidden_size)
    monkeypatch.setattr(fit_block, "_BYTES_TOGETHER", 3 * each)
    name = "layers.1.mlp.experts.down"
    chex.assert_trees_all_equal({name: leaves_of(PLAN, FITTED)[name]}, {name: leaves[name]})


def test_a_fit_that_does_not_hold_on_chunks_held_out_is_left(
    unfitted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which weights are fitted to, by mistake, lies far from what is wanted."""
    monkeypatch.setattr(fit_block, "fitted", lambda weight, rounded, *given: 3 * fitted(weight, rounded, *given))
    monkeypatch.setattr(fit_block, "_fitted_expert", lambda weight, *given: -weight)
    chex.assert_trees_all_equal(leaves_of(PLAN, FITTED), unfitted)
