import jax
import jax.numpy as jnp
import pytest

from moejax.formats import abstract_leaf
from moejax.kernels import pallas_tpu

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
        assert pallas_tpu.takes(rows(inputs), abstract_leaf(f"int{bits}g{group_size}{suffix}[{outputs},{inputs}]"))


@pytest.mark.parametrize(("bits", "multiple"), [(1, 512), (2, 256), (3, 512), (4, 128), (6, 256), (7, 512), (8, 64)])
def test_takes_multiples_of(bits: int, multiple: int) -> None:
    assert has_kernel(f"int{bits}g32[16,{multiple}]")
    assert not has_kernel(f"int{bits}g32[16,{multiple + multiple // 2}]")


@pytest.mark.parametrize(
    "spec",
    [
        "int4g32[2,16,128]",
        "int4g32[16,32768]",
        "int8g128[16,192]",
        "fp8b128x128[16,128]",
        "bf16[16,128]",
        "ternaryg64[16,640]",
    ],
)
def test_leaves_others_to_xla(spec: str) -> None:
    assert not has_kernel(spec)


def test_leaves_other_dtypes_to_xla() -> None:
    w = abstract_leaf("int4g32[16,128]")
    assert pallas_tpu.takes(rows(128, jnp.float32), w)
    assert not pallas_tpu.takes(rows(128, jnp.float16), w)
