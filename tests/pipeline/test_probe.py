import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.evaluate.divergence import evaluate
from moejax.model import DeepseekV3, named_leaves
from moejax.pipeline.compress import Prepared
from moejax.pipeline.working_copy import dense_block


def test_nothing_changed_is_no_divergence(prepared: Prepared) -> None:
    probe = prepared.trial.probe
    embedding = prepared.model.embed.get_value().astype(jnp.float32)
    for index, block in enumerate(probe.blocks):
        assert abs(probe.divergence_of_block(index, block)) < 1e-6
    assert abs(probe.divergence_of_embedding(embedding)) < 1e-6
    assert abs(probe.divergence_of_head(probe.head)) < 1e-6
    assert abs(probe.divergence_of_model(probe.blocks, embedding, probe.head)) < 1e-6


@pytest.mark.parametrize(
    "name", ["layers.0.mlp.down", "layers.1.mlp.experts.up", "layers.2.self_attn.o", "embed", "head"]
)
def test_one_change_diverges_as_evaluation_measures(prepared: Prepared, name: str) -> None:
    probe = prepared.trial.probe
    model = with_noise(prepared.model, [name])
    own = named_leaves(model)[name]
    if name == "embed":
        divergence = probe.divergence_of_embedding(own.astype(jnp.float32))
    elif name == "head":
        divergence = probe.divergence_of_head(own.astype(jnp.float32))
    else:
        index = int(name.split(".")[1])
        divergence = probe.divergence_of_block(index, dense_block(model.layers[index]))
    assert divergence == pytest.approx(evaluated(prepared, model), rel=0.01)
    assert divergence > 1e-3


def test_many_changes_diverge_as_evaluation_measures(prepared: Prepared) -> None:
    model = with_noise(prepared.model, ["embed", "head", "layers.0.self_attn.v_b", "layers.2.mlp.shared.down"])
    embedding, head = (named_leaves(model)[name].astype(jnp.float32) for name in ("embed", "head"))
    blocks = [dense_block(layer) for layer in model.layers]
    divergence = prepared.trial.probe.divergence_of_model(blocks, embedding, head)
    assert divergence == pytest.approx(evaluated(prepared, model), rel=0.01)


def with_noise(model: DeepseekV3, names: list[str]) -> DeepseekV3:
    """The model with some weights off by about a quarter."""
    leaves = named_leaves(model)
    for name in names:
        leaves[name] = jax.tree.map(noisy, leaves[name])
    return DeepseekV3(model.config, leaves.__getitem__)


def noisy(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array
    values = np.asarray(array, np.float32)
    noise = np.random.RandomState(0).randn(*values.shape) * values.std() / 4
    return jnp.asarray(values + noise, array.dtype)


def evaluated(prepared: Prepared, model: DeepseekV3) -> float:
    evaluation = evaluate(model, np.asarray(prepared.trial.probe.tokens_BT), prepared.model)
    assert evaluation.kld_mean is not None
    return evaluation.kld_mean
