import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import in_float32, random_leaf, scales_of, shapes_and_dtypes, to_numpy
from moejax.errors import InputError
from moejax.formats import (
    GroupedCodes,
    GroupedInt,
    IntFormat,
    Levels,
    ScaleKind,
    SignedIntFormat,
    TernaryFormat,
    abstract_leaf,
    parse_format,
    payload_bytes,
)
from moejax.formats.group_format import encode

AnyFormat = IntFormat | TernaryFormat
WIDTHS = range(1, 9)
group_sizes = st.sampled_from([32, 64, 128, 256])
scale_kinds = st.sampled_from(["bf16", "e8"])
group_formats = (
    st.builds(IntFormat, st.integers(1, 8), group_sizes, scale_kinds)
    | st.builds(SignedIntFormat, st.sampled_from([4, 8]), st.sampled_from([32, 128]), st.sampled_from(["bf16", "f16"]))
    | st.builds(TernaryFormat, group_sizes, scale_kinds)
)
SIGNED: list[AnyFormat] = [SignedIntFormat(4, 32, "f16"), SignedIntFormat(8, 32, "f16"), SignedIntFormat(4, 32)]
jitted_encode = jax.jit(encode, static_argnames="to")


def every_format(group_size: int, scale_kind: ScaleKind = "bf16") -> list[AnyFormat]:
    return [*(IntFormat(bits, group_size, scale_kind) for bits in WIDTHS), TernaryFormat(group_size, scale_kind)]


@pytest.mark.parametrize(
    ("name", "group_format"),
    [
        ("int2g128", IntFormat(2, 128)),
        ("int2g128e8", IntFormat(2, 128, "e8")),
        ("sint4g32", SignedIntFormat(4, 32)),
        ("sint8g128f16", SignedIntFormat(8, 128, "f16")),
        ("ternaryg32", TernaryFormat(32)),
        ("ternaryg32e8", TernaryFormat(32, "e8")),
    ],
)
def test_names(name: str, group_format: AnyFormat) -> None:
    assert group_format.name == name
    assert parse_format(name) == group_format


@given(group_formats)
def test_names_are_parsed(group_format: AnyFormat) -> None:
    assert parse_format(group_format.name) == group_format


def test_levels_and_bits() -> None:
    assert [(own.name, int(own.levels.highest) + 1) for own in every_format(64)] == [
        *((f"int{bits}g64", 2**bits) for bits in WIDTHS),
        ("ternaryg64", 3),
    ]
    assert all(2**own.bits == pytest.approx(int(own.levels.highest) + 1) for own in every_format(64))
    assert all(own.levels.zero == own.levels.highest / 2 for own in every_format(64))
    assert (SignedIntFormat(4, 32).levels, SignedIntFormat(8, 128).levels) == (Levels(15, 8), Levels(255, 128))


@pytest.mark.parametrize(
    "name",
    [
        "ternary",
        "ternaryg48",
        "ternary3g64",
        "ternaryg",
        "int9g64",
        "intg64",
        "int4g64 ",
        "int4g64e",
        "int4g64e4",
        "e8",
        "int4g64f16",
        "sint4g64",
        "sint4g256",
        "sint5g32",
        "sint4g32e8",
        "ternaryg32f16",
        "fp8b128x128",
        "",
    ],
)
def test_refuses_unknown_names(name: str) -> None:
    with pytest.raises(
        InputError, match=f"unknown format '{name}'.*such as int3g64.*such as sint4g32.*such as ternaryg128"
    ):
        parse_format(name)


@given(group_formats, st.sampled_from([(), (3,)]), st.integers(1, 5), st.integers(1, 600))
def test_abstract_shapes_and_bytes_are_the_concrete_ones(
    group_format: AnyFormat, batch: tuple[int, ...], outputs: int, inputs: int
) -> None:
    shape, groups = (*batch, outputs, inputs), -(-inputs // group_format.group_size)
    abstract = group_format.abstract(shape)
    encoded = jax.eval_shape(
        lambda weight, scale: encode(weight, scale, group_format), jnp.ones(shape), jnp.ones((*shape[:-1], groups))
    )
    assert encoded.shape == abstract.shape == shape
    assert shapes_and_dtypes(encoded) == shapes_and_dtypes(abstract)
    assert payload_bytes(encoded) == payload_bytes(abstract)


@pytest.mark.parametrize(("scale_kind", "scale_bytes"), [("bf16", 2), ("e8", 1)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bytes_are_exact(group_size: int, scale_kind: ScaleKind, scale_bytes: int) -> None:
    outputs, inputs = 6, 384
    for group_format in every_format(group_size, scale_kind):
        packed = 4 * 20 if isinstance(group_format, TernaryFormat) else inputs * group_format.bits // 8
        expected = outputs * packed + scale_bytes * outputs * inputs // group_size
        assert payload_bytes(group_format.abstract((outputs, inputs))) == expected
        # 352 is a multiple of 32 but not of the larger groups.
        packed = 4 * 18 if isinstance(group_format, TernaryFormat) else 352 * group_format.bits // 8
        expected = outputs * packed + scale_bytes * outputs * math.ceil(352 / group_size)
        assert payload_bytes(group_format.abstract((outputs, 352))) == expected


@given(
    st.sampled_from([*every_format(32), *every_format(64), *every_format(64, "e8"), *SIGNED]),
    st.floats(0.01, 10),
    st.integers(0, 2**32 - 1),
)
def test_encode_chooses_the_nearest_level(group_format: AnyFormat, spread: float, seed: int) -> None:
    """No other code under the stored scale is closer, for weights within the levels and beyond them."""
    rng, group_size = np.random.default_rng(seed), group_format.group_size
    weight = np.asarray(rng.normal(size=(4, 128)), np.float32)
    scale = np.asarray(rng.uniform(0.5, 2, size=(4, 128 // group_size)) * spread, np.float32)
    leaf = jitted_encode(jnp.asarray(weight), jnp.asarray(scale), group_format)
    scale_OI = np.repeat(scales_of(leaf.scale), group_size, axis=1)
    highest, zero = group_format.levels
    levels = (np.arange(int(highest) + 1) - float(zero)) * scale_OI[..., None]
    nearest = np.min(np.abs(levels - weight[..., None]), axis=-1)
    np.testing.assert_array_less(np.abs(to_numpy(leaf) - weight), nearest + 1e-4 * scale_OI)


@pytest.mark.parametrize("group_format", [*every_format(32), *every_format(32, "e8"), *SIGNED])
def test_encode_returns_what_it_was_given(group_format: AnyFormat) -> None:
    """A weight on the levels keeps its code, also when bfloat16 has moved it: by a quarter of a step at most. The last
    group of a row is shorter."""
    leaf = random_leaf(f"{group_format.name}[8,239]")
    assert isinstance(leaf, GroupedCodes)
    for dtype in (jnp.float32, jnp.bfloat16):
        again = jitted_encode(in_float32(leaf).astype(dtype), leaf.decoded_scale(jnp.float32), group_format)
        np.testing.assert_array_equal(again.codes(), leaf.codes())
        np.testing.assert_array_equal(again.scale, leaf.scale)


@pytest.mark.parametrize("group_format", [IntFormat(3, 32), TernaryFormat(32), IntFormat(3, 32, "e8")])
def test_encode_of_zeros(group_format: AnyFormat) -> None:
    leaf = jitted_encode(jnp.zeros((2, 64)), jnp.zeros((2, 2)), group_format)
    np.testing.assert_array_equal(in_float32(leaf), 0)


@pytest.mark.parametrize("name", ["sint4g32f16[5,96]", "sint8g32f16[5,96]", "sint4g128[5,256]", "sint8g128[5,256]"])
def test_others_integers_are_held_weight_for_weight(name: str) -> None:
    """What GGUF's Q4_0 and Q8_0 and compressed-tensors' symmetric integers say a weight is, from their own numbers:
    (q - 8) d with q in [0, 15], q d with q in [-128, 127], scales of either sign, in float16 or bfloat16."""
    rng, spec = np.random.default_rng(1), abstract_leaf(name)
    assert isinstance(spec, GroupedInt)
    most = 2 ** (spec.bits - 1)
    signed = rng.integers(-most, most, spec.shape)
    dtype = np.float16 if spec.scale_kind == "f16" else jnp.bfloat16
    scale = np.asarray(rng.normal(size=spec.scale.shape) / 100, dtype)
    stored = scale.view(np.uint16) if spec.scale_kind == "f16" else scale
    to = parse_format(spec.format_name)
    assert isinstance(to, SignedIntFormat)
    held = to.leaf(to.pack(jnp.asarray(signed + most, jnp.uint32)), jnp.asarray(stored), spec.inputs)
    expected = signed * np.repeat(scale.astype(np.float64), spec.group_size, axis=1)
    np.testing.assert_array_equal(np.asarray(in_float32(held), np.float64), expected)
    again = jitted_encode(in_float32(held), held.decoded_scale(jnp.float32), to)
    jax.tree.map(np.testing.assert_array_equal, again, held)
