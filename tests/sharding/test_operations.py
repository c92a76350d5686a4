"""A model over several devices puts out what it does on one, whatever of it is cut."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from leaf_oracle import random_leaf
from model_cases import random_tensors
from moejax import kernels, sharding
from moejax.errors import InputError
from moejax.formats import abstract_leaf, gather_experts
from moejax.model import DeepseekV3, config_from_hf, named_leaves
from moejax.model.latent_cache import LatentCache
from moejax.sharding import TENSOR, shardings
from small_models import RAW_CONFIG, model_of, small_model

WIDE = RAW_CONFIG | {"num_attention_heads": 8, "vocab_size": 96, "num_nextn_predict_layers": 0}
FORMATS = ("int1g32", "ternaryg32", "int2g32e8", "int3g32")
TOKENS = np.random.default_rng(0).integers(96, size=(2, 6)).astype(np.int32)


def mesh_of(devices: int) -> Mesh:
    return jax.make_mesh((devices,), (TENSOR,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@cache
def packed_model() -> DeepseekV3:
    """Small matrices of 4 bits, experts in buckets of several formats, four of twelve pruned."""
    config = config_from_hf(WIDE)

    def leaf(name: str, w: Any) -> Any:
        if name.endswith(("gate", "up", "down")) and ".experts." in name:
            _, outputs, inputs = w.shape
            return gather_experts([random_leaf(f"{FORMATS[e % 4]}[{outputs},{inputs}]", e) for e in range(12)])
        if w.ndim < 2 or name.endswith("router"):
            return w
        return random_leaf(f"int4g32[{','.join(map(str, w.shape))}]")

    original = named_leaves(model_of(WIDE, random_tensors(WIDE, seed=1)))
    return DeepseekV3(config, {name: leaf(name, w) for name, w in original.items()}.__getitem__)


@jax.jit
def extended(model: DeepseekV3, cache: list[LatentCache]) -> tuple[jax.Array, list[LatentCache]]:
    """Logits of a prompt, and of a token behind it."""
    start_B = jnp.zeros(2, jnp.int32)
    x_BTD, cache = model.extend(jnp.asarray(TOKENS[:, :5]), cache, start_B, jnp.float64)
    y_BTD, cache = model.extend(jnp.asarray(TOKENS[:, 5:]), cache, start_B + 5, jnp.float64)
    return model.logits(jnp.concatenate([x_BTD, y_BTD], axis=1)), cache


@pytest.mark.parametrize(("is_packed", "devices"), [(True, 8), (True, 5), (False, 8)])
def test_a_model_over_devices_equals_one(is_packed: bool, devices: int) -> None:
    model = packed_model() if is_packed else small_model(mtp=False)  # FP8 and bfloat16
    cache = model.empty_cache(2, 8, jnp.float64)
    alone, _ = extended(model, cache)
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        together, kept = extended(jax.device_put(model, shardings(model, mesh)), cache)
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-9 * np.abs(alone).max())
    assert all(own.rows.sharding.is_fully_replicated for own in kept)


def test_weights_are_cut_over_outputs_and_heads() -> None:
    model, mesh = packed_model(), mesh_of(8)
    placed = named_leaves(jax.device_put(model, shardings(model, mesh)))

    def part(a: jax.Array) -> tuple[int, ...]:
        return a.addressable_shards[0].data.shape

    attention = "layers.1.self_attn."
    assert part(placed["embed"].words) == (12, 8)
    assert part(placed[attention + "q_b"].scale)[0] == placed[attention + "q_b"].shape[0] // 8
    assert part(placed[attention + "k_b"].words)[0] == 1
    gate = placed["layers.1.mlp.experts.gate"]
    assert part(gate.buckets[0].words)[:2] == (3, 12)
    assert gate.bucket_E.sharding.is_fully_replicated
    assert placed["norm"].sharding.is_fully_replicated
    assert placed["layers.1.mlp.router"].sharding.is_fully_replicated  # 12 experts are not 8 equal parts


@pytest.mark.parametrize(("name", "kind"), [("model", AxisType.Auto), (TENSOR, AxisType.Explicit)])
def test_other_meshes_are_refused(name: str, kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), (name,), axis_types=(kind,))
    with pytest.raises(InputError, match=rf"^a mesh has the axes {name} \({kind.name}\); one named tensor is needed"):
        shardings(packed_model(), mesh)


def test_blocks_of_fp8_stay_whole() -> None:
    mesh = mesh_of(4)
    for outputs, parts in ((512, 4), (576, 1)):
        own = shardings({"w": abstract_leaf(f"fp8b128x128[{outputs},256]")}, mesh)["w"]
        assert own.values.shard_shape((outputs, 256)) == (outputs // parts, 256)
        assert own.scale_inv.shard_shape((-(-outputs // 128), 2))[0] == -(-outputs // 128) // parts


def test_rows_are_taken_from_the_device_that_has_them() -> None:
    w, index = random_leaf("int4g32[96,64]"), jnp.asarray([[0, 95], [11, 12]])
    expected = kernels.take(w, index, jnp.float64)
    with jax.set_mesh(mesh_of(8)):
        np.testing.assert_array_equal(jax.jit(sharding.take, static_argnums=2)(w, index, jnp.float64), expected)


def test_gathered_is_whole_on_every_device() -> None:
    x, w = jnp.ones((3, 64)), random_leaf("int4g32[96,64]")
    with jax.set_mesh(mesh_of(8)):
        cut = jax.jit(sharding.matmul)(x, w)
        whole = jax.jit(lambda x, w: sharding.gathered(sharding.matmul(x, w)))(x, w)
    assert cut.addressable_shards[0].data.shape == (3, 12)
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, kernels.matmul(x, w))
