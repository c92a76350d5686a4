import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import random_leaf, shapes_and_dtypes
from moejax.errors import InputError
from moejax.formats import (
    GroupFormat,
    IntFormat,
    TernaryFormat,
    abstract_experts,
    abstract_leaf,
    describe,
    gather_experts,
)

SPECS = [
    "bf16[256,128]",
    "f32[7]",
    "f32[]",
    "i32[2,3]",
    "f64[5]",
    "fp8b128x128[3,576,7168]",
    "int7g32[2,8,64]",
    "ternaryg64[256,128]",
    "int7g32e8[2,8,64]",
    "ternaryg64e8[256,128]",
]

group_sizes = st.sampled_from([32, 64, 128, 256])
scale_kinds = st.sampled_from(["bf16", "e8"])
group_formats = st.builds(IntFormat, st.integers(1, 8), group_sizes, scale_kinds) | st.builds(
    TernaryFormat, group_sizes, scale_kinds
)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec: str) -> None:
    assert describe(abstract_leaf(spec)) == spec


@given(group_formats, st.integers(1, 4), st.integers(1, 600))
def test_round_trip_of_groups(group_format: GroupFormat, outputs: int, inputs: int) -> None:
    spec = f"{group_format.name}[{outputs},{inputs}]"
    assert describe(abstract_leaf(spec)) == spec


@pytest.mark.parametrize(
    "spec", ["bf16[6,64]", "fp8b32x32[48,40]", "int5g32[3,6,64]", "ternaryg32[3,6,64]", "int5g32e8[3,6,64]"]
)
def test_concrete_leaves_are_what_their_description_says(spec: str) -> None:
    leaf = random_leaf(spec)
    assert describe(leaf) == spec
    abstract = abstract_leaf(describe(leaf))
    assert shapes_and_dtypes(abstract) == shapes_and_dtypes(leaf)


def test_experts() -> None:
    weights = gather_experts([random_leaf(f"{name}[8,64]") for name in ("int3g32", "bf16", "int3g32")])
    assert describe(weights) == "bf16[1,8,64]+int3g32[2,8,64]"
    abstract = abstract_experts(describe(weights))
    assert abstract.shape == (3, 8, 64)
    assert shapes_and_dtypes(abstract) == shapes_and_dtypes(weights)


def test_experts_with_scales_of_another_kind_have_a_bucket_of_their_own() -> None:
    weights = gather_experts([random_leaf(f"{name}[8,64]") for name in ("int3g32e8", "int3g32", "int3g32e8")])
    assert describe(weights) == "int3g32[1,8,64]+int3g32e8[2,8,64]"
    assert shapes_and_dtypes(abstract_experts(describe(weights))) == shapes_and_dtypes(weights)


def test_refuses_more_buckets_than_there_are_formats() -> None:
    with pytest.raises(InputError, match=r"bf16\[1,2,3\]' describes no leaf"):
        abstract_experts("+".join(["bf16[1,2,3]"] * 10**5))


def test_a_shape_of_any_size_takes_no_memory() -> None:
    assert abstract_leaf("int4g64[999999999999999,64]").shape == (999_999_999_999_999, 64)


@pytest.mark.parametrize("spec", ["bf16[8,64]", "bf16[2,8,64]+int4g64[2,64,64]", "bf16[2,8,64]+int4g64[8,64]"])
def test_refuses_what_describes_no_experts(spec: str) -> None:
    with pytest.raises(InputError, match="describes no experts"):
        abstract_experts(spec)


def test_scales_of_partial_fp8_blocks() -> None:
    """The real model's kv_a_proj_with_mqa: 576 rows have 5 rows of blocks."""
    values, scale_inv = jax.tree.leaves(abstract_leaf("fp8b128x128[576,7168]"))
    assert (values.shape, values.dtype) == ((576, 7168), jnp.float8_e4m3fn)
    assert (scale_inv.shape, scale_inv.dtype) == ((5, 56), jnp.float32)


NO_LEAVES = ["bf16", "bf16[2", "bf16[2,]", "bf16[-1]", "[2,3]", "", "bf16[2]x", "int4g64[128]", "fp8b128x128[]"]

NO_LEAVES += ["bf16[" + "9" * 5000 + "]", "bf16[1" + ",1" * 8 + "]", "x" * 10**6, "bf16[٣]", "bf16[2]\n"]


@pytest.mark.parametrize("spec", NO_LEAVES, ids=lambda spec: spec[:20].encode("unicode_escape").decode())
def test_refuses_what_describes_no_leaf(spec: str) -> None:
    with pytest.raises(InputError, match="describes no leaf") as error:
        abstract_leaf(spec)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "name", ["int9g64", "int0g64", "int4g48", "int4", "uint4g64", "ternaryg48", "q4_k", "fp8b0x128", "fp8b100000x1"]
)
def test_refuses_unknown_formats(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown format '{name}'"):
        abstract_leaf(f"{name}[8,128]")
