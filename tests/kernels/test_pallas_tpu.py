import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from leaf_oracle import random_leaf, to_numpy
from moejax.formats import ExpertWeights, GroupedCodes, abstract_leaf, gather_experts
from moejax.kernels import expert_matmul, kernel_of, matmul_transposed, multiply_tpu, pallas_tpu

TRUE_SHAPES = [(2048, 7168), (7168, 2048), (1536, 7168), (24576, 1536), (7168, 16384), (18432, 7168), (7168, 18432)]


def rows(inputs: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    return jnp.zeros((3, inputs), dtype)


def has_kernel(spec: str) -> bool:
    w = abstract_leaf(spec)
    x = jax.ShapeDtypeStruct((3, *w.shape[:-2], w.shape[-1]), jnp.bfloat16)
    return "pallas_call" in str(jax.make_jaxpr(pallas_tpu.matmul)(x, w))


@pytest.mark.parametrize("suffix", ["", "e8"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_takes_true_shapes(bits: int, group_size: int, suffix: str) -> None:
    for outputs, inputs in TRUE_SHAPES:
        assert pallas_tpu.takes(jnp.bfloat16, abstract_leaf(f"int{bits}g{group_size}{suffix}[{outputs},{inputs}]"))


@pytest.mark.parametrize("suffix", ["", "e8"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_takes_true_ternary_shapes(group_size: int, suffix: str) -> None:
    for outputs, inputs in TRUE_SHAPES:
        assert pallas_tpu.takes(jnp.bfloat16, abstract_leaf(f"ternaryg{group_size}{suffix}[{outputs},{inputs}]"))


@pytest.mark.parametrize(("bits", "multiple"), [(1, 512), (2, 256), (3, 512), (4, 128), (6, 256), (7, 512), (8, 64)])
def test_takes_multiples_of(bits: int, multiple: int) -> None:
    assert has_kernel(f"int{bits}g32[16,{multiple}]")
    assert not has_kernel(f"int{bits}g32[16,{multiple + multiple // 2}]")


@pytest.mark.parametrize(
    "spec",
    [
        "int4g32[16,32768]",
        "int8g128[16,192]",
        "fp8b128x128[16,128]",
        "bf16[16,128]",
        "ternaryg64[16,672]",  # a shorter last group
        "ternaryg64[16,32768]",
    ],
)
def test_leaves_others_to_xla(spec: str) -> None:
    assert not has_kernel(spec)


def test_leaves_other_dtypes_to_xla() -> None:
    w = abstract_leaf("int4g32[16,128]")
    assert pallas_tpu.takes(jnp.float32, w)
    assert not pallas_tpu.takes(jnp.float16, w)


def test_the_first_of_a_platforms_list_that_takes_a_weight_multiplies_it() -> None:
    taken, ternary = abstract_leaf("int2g128[4,16,256]"), abstract_leaf("ternaryg128[4,16,256]")
    left = abstract_leaf("fp8b128x128[4,16,256]")
    slots = jnp.zeros(8, jnp.int32)
    experts = ExpertWeights((taken, left, ternary), slots, slots)
    assert kernel_of(experts, jnp.bfloat16, "tpu") == {"pallas_tpu": [taken, ternary], "xla": [left]}
    assert kernel_of(experts, jnp.bfloat16, "cpu") == {"xla": [taken, left, ternary]}
    matrix = abstract_leaf("int2g128[16,256]")
    assert set(kernel_of(matrix, jnp.bfloat16, "tpu")) == {"pallas_tpu"}
    assert set(kernel_of(taken, jnp.bfloat16, "tpu")) == {"pallas_tpu"}  # a matrix for each of four heads
    assert set(kernel_of(matrix, jnp.float16, "tpu")) == {"xla"}


@pytest.mark.parametrize("names", [["int2g128"], ["int2g128", "ternaryg128", "bf16"], ["ternaryg128"], ["bf16"]])
def test_programs_for_tpu_have_a_kernel_for_every_bucket_that_has_one(names: list[str]) -> None:
    experts = gather_experts([random_leaf(f"{name}[16,256]") for name in names])
    rows_E = jnp.ones(len(names), jnp.int32)
    traced = str(jax.make_jaxpr(expert_matmul)(rows(256)[: len(names)], experts, rows_E))
    assert traced.count("pallas_call[") == sum(name != "bf16" for name in names)


def test_words_fetched_ahead_have_come_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight experts a TPU stores a word of all side by side, and the kernel fetches them itself; here each copy is
    put off until it is waited for. Tiles of 256 outputs would not divide a matrix."""
    monkeypatch.setattr(multiply_tpu, "MAX_OUTPUT_TILE", 256)
    w = random_leaf("ternaryg32[8,384,352]")
    assert isinstance(w, GroupedCodes)
    own_B, index_B = jnp.arange(6, dtype=jnp.int32), jnp.asarray([1, 1, 5, 0, 7, 0], jnp.int32)
    x_BTI = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 352)), jnp.float32)
    y_BTO = jnp.zeros((6, 2, 384), jnp.float32)
    late = pltpu.InterpretParams(dma_execution_mode="on_wait")
    found = multiply_tpu.multiply(x_BTI, w, own_B, index_B, 5, y_BTO, late)
    expected = np.einsum("bti,boi->bto", np.asarray(x_BTI, np.float64), to_numpy(w)[index_B])
    np.testing.assert_allclose(found[:5], expected[:5], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found[5], 0)


@pytest.mark.parametrize(("outputs", "count"), [(512, 1), (520, 0)])
def test_matrices_of_one_tile_are_multiplied_from_the_other_side(outputs: int, count: int) -> None:
    w, x = abstract_leaf(f"int4g32[2,{outputs},128]"), jax.ShapeDtypeStruct((3, 2, outputs), jnp.bfloat16)
    assert str(jax.make_jaxpr(matmul_transposed)(x, w)).count("pallas_call[") == count
