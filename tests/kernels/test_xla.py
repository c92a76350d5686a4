from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf
from moejax.formats import ExpertWeights, Leaf, abstract_experts, abstract_leaf, gather_experts
from moejax.kernels import xla

FORMATS = ["int4g64", "int3g32", "int2g128e8", "ternaryg128", "fp8b128x128", "bf16"]
FIVE_TILES = 5 * xla.TILE_BYTES


def abstract(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def temporary_bytes(operation: Callable[..., jax.Array], *args: object) -> int:
    """What the compiled operation takes beside its arguments and its result."""
    memory = jax.jit(operation).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_unpacks_a_matrix_in_tiles(name: str) -> None:
    w = abstract_leaf(f"{name}[2048,7168]")
    assert temporary_bytes(xla.matmul, abstract(1, 7168), w) < FIVE_TILES
    assert temporary_bytes(xla.matmul_transposed, abstract(1, 2048), w) < FIVE_TILES
    assert temporary_bytes(lambda w, i: xla.take(w, i, jnp.float32), w, abstract(8, dtype=jnp.int32)) < FIVE_TILES


@pytest.mark.parametrize("name", FORMATS)
def test_unpacks_a_batch_in_tiles(name: str) -> None:
    w = abstract_leaf(f"{name}[128,128,512]")
    assert temporary_bytes(xla.matmul, abstract(1, 128, 512), w) < FIVE_TILES
    assert temporary_bytes(xla.matmul_transposed, abstract(1, 128, 128), w) < FIVE_TILES


@pytest.mark.parametrize("formats", [*([name] for name in FORMATS), FORMATS])
def test_unpacks_experts_in_tiles(formats: list[str]) -> None:
    spec = "+".join(f"{name}[{16 // len(formats)},2048,7168]" for name in formats)
    w = abstract_experts(spec)
    args = abstract(8, 7168), w, abstract(w.num_experts, dtype=jnp.int32)
    assert temporary_bytes(xla.expert_matmul, *args) < FIVE_TILES


def test_experts_need_no_ragged_dot() -> None:
    """On CPU it computes every expert for every row."""
    x, rows_E = abstract(8, 7168), abstract(16, dtype=jnp.int32)
    assert "ragged_dot" in str(jax.make_jaxpr(jax.lax.ragged_dot)(x, abstract(16, 7168, 2048), rows_E))
    for name in FORMATS:
        w = abstract_experts(f"{name}[16,2048,7168]")
        assert "ragged_dot" not in str(jax.make_jaxpr(xla.expert_matmul)(x, w, rows_E))


def test_routing_does_not_recompile() -> None:
    traces = []

    @jax.jit
    def multiply(x: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
        traces.append(rows_E)
        return xla.expert_matmul(x, w, rows_E)

    experts: list[Leaf] = [random_leaf(f"int{bits}g32[8,64]") for bits in (2, 4, 2, 8)]
    w = gather_experts(experts)
    for rows in ([2, 1, 2, 1], [6, 0, 0, 0], [0, 0, 0, 6]):
        multiply(jnp.ones((6, 64)), w, jnp.asarray(rows, np.int32))
    assert len(traces) == 1
