"""Rounding against its definition in NumPy and float64: codes, errors, brute force over scales, known optima."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from numpy.typing import NDArray

from leaf_oracle import scales_of, to_numpy
from moejax.formats import GroupedCodes, GroupFormat, IntFormat, Levels, ScaleKind, SignedIntFormat, TernaryFormat
from moejax.formats.group_format import encode
from moejax.formats.grouped import about_zero
from moejax.transforms import quantize as own
from moejax.transforms.quantize import quantization_errors, quantize, search_scales

Array = NDArray[Any]

LEVELS = [2, 3, 4, 8, 16, 32, 64, 128, 256]
KINDS: list[ScaleKind] = ["bf16", "e8"]
# One shape for almost all tests: a compilation takes longer than a test.
OUTPUTS, INPUTS, GROUP_SIZE = 6, 128, 64

weights = st_np.arrays(np.float32, (OUTPUTS, INPUTS), elements=st.floats(-8, 8, width=16, allow_subnormal=False))
second_moments = st_np.arrays(np.float32, INPUTS, elements=st.floats(0.0625, 16, width=16))
magnitudes = st.sampled_from([1e-5, 1.0, 3e4])


def normal_weight(seed: int, outputs: int = OUTPUTS) -> Array:
    return np.random.RandomState(seed).randn(outputs, INPUTS).astype(np.float32)


def log_normal_moment(seed: int) -> Array:
    return np.exp(np.random.RandomState(seed).randn(INPUTS)).astype(np.float32)


def format_of(levels: int, kind: ScaleKind = "bf16") -> GroupFormat:
    if levels == 3:
        return TernaryFormat(GROUP_SIZE, kind)
    return IntFormat(levels.bit_length() - 1, GROUP_SIZE, kind)


def levels_of(numbers: Sequence[int]) -> Levels:
    """Those of every number, together."""
    each = zip(*map(about_zero, numbers), strict=True)
    return Levels(*(jnp.asarray(own, jnp.float32) for own in each))


def quantized(weight: Array, moment: Array, levels: int, kind: ScaleKind = "bf16") -> GroupedCodes:
    return quantize(jnp.asarray(weight), jnp.asarray(moment), format_of(levels, kind))


def searched_error(weight: Array, moment: Array, levels: int, kind: ScaleKind = "bf16") -> Array:
    return np.asarray(search_scales(jnp.asarray(weight), jnp.asarray(moment), about_zero(levels), GROUP_SIZE, kind)[1])


def group_errors(weight: Array, rounded: Array, moment: Array) -> Array:
    """sum_i h_i (w_oi - q_oi)^2 of every group, (O, G)."""
    error = moment.astype(np.float64) * (weight.astype(np.float64) - rounded) ** 2
    return error.reshape(*weight.shape[:-1], -1, GROUP_SIZE).sum(axis=-1)


def stored(scale: Array, kind: ScaleKind) -> Array:
    """The nearest scale that can be stored, the larger of two that are."""
    if kind == "bf16":
        return scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    values = scales_of(np.arange(256, dtype=np.uint8))
    above = np.searchsorted(values, np.clip(scale, 0, values[-1])).clip(1)
    return np.where(values[above] - scale <= scale - values[above - 1], values[above], values[above - 1])


def errors_under(scale_OG: Array, weight: Array, moment: Array, levels: int, kind: ScaleKind = "bf16") -> Array:
    """The errors of rounding to the nearest level under given scales as they are stored."""
    scale = np.repeat(stored(scale_OG, kind), GROUP_SIZE, axis=-1)
    steps = np.arange(levels) - (levels - 1) / 2
    divided = np.divide(weight, scale, out=np.zeros(weight.shape), where=scale != 0)
    index = np.clip(np.round(divided - steps[0]), 0, levels - 1).astype(int)
    return group_errors(weight, steps[index] * scale, moment)


def absmax_scale(weight: Array, levels: int) -> Array:
    """The scale at which a group's largest weight meets the outermost level, (O, G)."""
    return np.abs(weight).reshape(len(weight), -1, GROUP_SIZE).max(axis=-1) / ((levels - 1) / 2)


@given(weights, second_moments, st.sampled_from(LEVELS), magnitudes, st.sampled_from(KINDS))
def test_no_group_is_worse_than_with_its_absmax_scale(
    weight: Array, moment: Array, levels: int, magnitude: float, kind: ScaleKind
) -> None:
    weight = weight * np.float32(magnitude)
    found = group_errors(weight, to_numpy(quantized(weight, moment, levels, kind)), moment)
    plain = errors_under(absmax_scale(weight, levels), weight, moment, levels, kind)
    rounding = 1e-10 * group_errors(weight, np.zeros(weight.shape), moment)
    assert np.all(found <= 1.0001 * plain + rounding)


@given(weights, second_moments, st.sampled_from(LEVELS), magnitudes, st.sampled_from(KINDS))
def test_the_search_s_error_is_the_packed_result_s(
    weight: Array, moment: Array, levels: int, magnitude: float, kind: ScaleKind
) -> None:
    weight = weight * np.float32(magnitude)
    packed = quantized(weight, moment, levels, kind)
    assert (packed.format_name, packed.shape) == (format_of(levels, kind).name, weight.shape)
    assert packed.levels == Levels(levels - 1, (levels - 1) / 2)
    found, searched = group_errors(weight, to_numpy(packed), moment), searched_error(weight, moment, levels, kind)
    rounding = 1e-10 * group_errors(weight, np.zeros(weight.shape), moment)
    np.testing.assert_array_less(np.abs(searched - found), 1e-4 * found + rounding + 1e-30)


@given(weights, second_moments, st.sampled_from([4, 8]), st.sampled_from(["bf16", "f16"]))
def test_signed_integers_are_no_worse_than_with_their_absmax_scale(
    weight: Array, moment: Array, bits: int, kind: ScaleKind
) -> None:
    """With which the largest weight of a group meets the highest level, and the lowest is not used."""
    to = SignedIntFormat(bits, 32, kind)
    packed = quantize(jnp.asarray(weight), jnp.asarray(moment), to)
    scale = np.abs(weight).reshape(OUTPUTS, -1, 32).max(axis=-1) / (2 ** (bits - 1) - 1)
    plain = encode(jnp.asarray(weight), jnp.asarray(scale), to)
    found, most = ((moment * (weight - to_numpy(own)) ** 2).reshape(-1, 32).sum(axis=1) for own in (packed, plain))
    assert np.all(found <= 1.0001 * most + 1e-10 * (moment * weight**2).reshape(-1, 32).sum(axis=1))


@pytest.mark.parametrize("levels", [2, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_last_group_is_rounded_by_itself(levels: int, kind: ScaleKind) -> None:
    weight, moment = normal_weight(levels)[:, :101], log_normal_moment(levels)[:101]
    packed = quantized(weight, moment, levels, kind)
    assert packed.shape == weight.shape and packed.scale.shape == (OUTPUTS, 2)
    apart = [quantized(weight[:, own], moment[own], levels, kind) for own in (slice(0, 64), slice(64, 101))]
    np.testing.assert_array_equal(to_numpy(packed), np.concatenate([to_numpy(own) for own in apart], axis=1))


@pytest.mark.parametrize(("levels", "seed"), [(2, 1), (3, 0), (4, 2), (8, 3), (16, 4)])
@pytest.mark.parametrize("tails", ["normal", "heavy", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_one_percent_of_brute_force(levels: int, seed: int, tails: str, kind: ScaleKind) -> None:
    """Over all groups together; above 16 single levels decide, and only a finer grid would find the best scale."""
    random = np.random.RandomState(seed)
    shape = (64, INPUTS)
    drawn = {"normal": random.randn(*shape), "heavy": random.standard_t(3, shape), "flat": random.rand(*shape) - 0.5}
    weight = drawn[tails].astype(np.float32)
    moment = log_normal_moment(0)
    best = np.min(
        [
            errors_under(share * absmax_scale(weight, levels), weight, moment, levels, kind)
            for share in np.linspace(0.05, 1.1, 700)
        ],
        axis=0,
    )
    assert searched_error(weight, moment, levels, kind).sum() <= 1.01 * best.sum()


@pytest.mark.parametrize(("levels", "known"), [(2, 0.3634), (3, 0.1902), (4, 0.1188), (8, 0.03744), (16, 0.01154)])
def test_gaussian_weights_err_as_with_the_best_even_levels(levels: int, known: float) -> None:
    """Max (1960), table II: the least mean squared error of evenly spaced levels on N(0, 1)."""
    weight = np.random.RandomState(0).randn(8, 4096).astype(np.float32)
    error = search_scales(weight, np.ones(4096), about_zero(levels), group_size=4096)[1].sum() / np.sum(weight**2)
    assert error == pytest.approx(known, rel=0.02)


def test_more_levels_err_less() -> None:
    """In proportion at least; three lie between two and four, as ternary does between 1 and 2 bits."""
    weight, moment = normal_weight(1), log_normal_moment(1)
    errors = [searched_error(weight, moment, levels).sum() for levels in LEVELS]
    for (fewer, before), (more, error) in pairwise(zip(LEVELS, errors, strict=True)):
        assert error < fewer / more * before


@pytest.mark.parametrize(("levels", "share"), [(2, 0.01), (3, 0.01), (4, 0.01), (8, 0.02), (16, 0.06), (256, 0.2)])
def test_what_scales_of_eight_bits_cost(levels: int, share: float) -> None:
    """At few levels, where they save most, next to nothing; never less than scales of bfloat16."""
    weight, moment = normal_weight(11, outputs=64), log_normal_moment(11)
    wide, narrow = (searched_error(weight, moment, levels, kind).sum() for kind in KINDS)
    assert wide <= narrow <= (1 + share) * wide


def test_the_scale_suits_the_inputs_that_count() -> None:
    weight, moment = normal_weight(2), np.ones(INPUTS, np.float32)
    weight[:, :32] *= 0.1
    moment[:32] = 1000
    alike, weighted = (to_numpy(quantized(weight, own, 4)) for own in (np.ones(INPUTS), moment))
    assert np.sum((weight - weighted)[:, :32] ** 2) < 0.1 * np.sum((weight - alike)[:, :32] ** 2)


def test_only_proportions_of_second_moments_matter() -> None:
    weight, moment = normal_weight(3), log_normal_moment(3)
    scales = [
        search_scales(jnp.asarray(weight), jnp.asarray(moment * 2.0**n), about_zero(8), GROUP_SIZE)[0]
        for n in (-40, 0, 40)
    ]
    np.testing.assert_array_equal(scales[0], scales[1])
    np.testing.assert_array_equal(scales[2], scales[1])


def test_inputs_never_seen_count_alike_or_a_little() -> None:
    weight = normal_weight(4) * 0.02
    unseen = to_numpy(quantized(weight, np.zeros(INPUTS), 256))
    np.testing.assert_array_equal(unseen, to_numpy(quantized(weight, np.ones(INPUTS), 256)))
    half = np.repeat(np.asarray([1.0, 0.0], np.float32), GROUP_SIZE)
    rounded = to_numpy(quantized(weight, half, 16))
    assert np.sum((weight - rounded)[:, GROUP_SIZE:] ** 2) < 0.02 * np.sum(weight[:, GROUP_SIZE:] ** 2)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("value", [1.0, -0.3, 1e-4])
@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 2.0**-8), ("e8", 2.0**-4)])
def test_weights_that_are_all_alike_err_by_the_scale_s_rounding_alone(
    levels: int, value: float, kind: ScaleKind, tolerance: float
) -> None:
    rounded = to_numpy(quantized(np.full((OUTPUTS, INPUTS), value, np.float32), np.ones(INPUTS), levels, kind))
    assert np.all(np.abs(rounded - value) <= tolerance * abs(value))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_zeros_is_exact_and_spares_its_neighbours(levels: int, kind: ScaleKind) -> None:
    weight = normal_weight(5)
    expected = to_numpy(quantized(weight, np.ones(INPUTS), levels, kind))
    weight[:, :GROUP_SIZE] = 0
    rounded = to_numpy(quantized(weight, np.ones(INPUTS), levels, kind))
    assert not rounded[:, :GROUP_SIZE].any()
    np.testing.assert_array_equal(rounded[:, GROUP_SIZE:], expected[:, GROUP_SIZE:])


@pytest.mark.parametrize("levels", [2, 3, 4, 256])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-20, 1e12, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_huge_and_tiny_weights_stay_finite(levels: int, magnitude: float, kind: ScaleKind) -> None:
    weight = normal_weight(6) * np.float32(magnitude)
    rounded = to_numpy(quantized(weight, np.ones(INPUTS), levels, kind))
    assert np.all(np.isfinite(rounded))
    assert np.all(np.abs(rounded - weight) < 5 * magnitude)


@given(
    st.integers(0, 1000),
    st_np.arrays(np.float32, OUTPUTS, elements=st.floats(0, 16, width=16)),
    st.sampled_from(KINDS),
)
def test_errors_of_traced_levels_are_those_of_one_after_the_other(
    seed: int, output_weight: Array, kind: ScaleKind
) -> None:
    weight, moment = normal_weight(seed), log_normal_moment(seed)
    errors_F = quantization_errors(weight, moment, output_weight, levels_of(LEVELS), GROUP_SIZE, kind)
    for levels, error in zip(LEVELS, np.asarray(errors_F), strict=True):
        error_OG = group_errors(weight, to_numpy(quantized(weight, moment, levels, kind)), moment)
        assert error == pytest.approx(output_weight.astype(np.float64) @ error_OG.sum(axis=1), rel=1e-4)


def test_a_batch_of_matrices_is_each_of_them_alone() -> None:
    weight = np.random.RandomState(7).randn(3, OUTPUTS, INPUTS).astype(np.float32)
    moment = np.stack([log_normal_moment(e) for e in range(3)])
    packed = quantized(weight, moment, 8)
    output_weight = np.random.RandomState(8).rand(3, OUTPUTS)
    errors_FE = quantization_errors(weight, moment, output_weight, levels_of([4, 8]), GROUP_SIZE)
    assert errors_FE.shape == (2, 3)
    for e in range(3):
        alone = quantized(weight[e], moment[e], 8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, e=e: a[e], packed), alone)
        error = output_weight[e] @ group_errors(weight[e], to_numpy(alone), moment[e]).sum(axis=1)
        assert errors_FE[1, e] == pytest.approx(error, rel=1e-4)


def compilations(jitted: Any) -> int:
    return jitted._cache_size()


@pytest.mark.parametrize("kind", KINDS)
def test_one_compilation_serves_every_number_of_levels(kind: ScaleKind) -> None:
    weight, moment = normal_weight(9, outputs=7), log_normal_moment(9)
    before = compilations(search_scales)
    for levels in LEVELS:
        searched_error(weight, moment, levels, kind)
    assert compilations(search_scales) == before + 1
    before = compilations(quantization_errors)
    for chosen in ([2, 3, 4], [8, 16, 256]):
        quantization_errors(weight, moment, np.ones(7), levels_of(chosen), GROUP_SIZE, kind)
    assert compilations(quantization_errors) == before + 1


def test_weights_in_bfloat16_are_searched_in_float32() -> None:
    weight = jnp.asarray(normal_weight(10), jnp.bfloat16)
    moment = jnp.asarray(log_normal_moment(10))
    packed = quantize(weight, moment, IntFormat(4, GROUP_SIZE))
    wide = quantize(weight.astype(jnp.float32), moment, IntFormat(4, GROUP_SIZE))
    jax.tree.map(np.testing.assert_array_equal, packed, wide)


@pytest.mark.parametrize("shape", [(OUTPUTS, INPUTS), (3, OUTPUTS // 3, INPUTS)])
def test_many_rows_are_searched_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = normal_weight(5).reshape(shape), log_normal_moment(6)
    whole = quantized(weight, moment, 8)
    monkeypatch.setattr(own, "MOST_WEIGHTS", 4 * INPUTS + 1)
    searched: list[int] = []
    search = own.search_scales

    def counted(rows: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
        searched.append(len(rows))
        return search(rows, *others)

    monkeypatch.setattr(own, "search_scales", counted)
    parts = quantized(weight, moment, 8)
    assert searched == [3, 3]
    assert parts.shape == whole.shape
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("outputs", [48, 50, 7])
def test_rows_that_caches_hold_are_searched_at_a_time(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = jnp.asarray(normal_weight(11, outputs=outputs)), jnp.asarray(log_normal_moment(11))
    whole = search_scales(weight, moment, about_zero(5), GROUP_SIZE)
    monkeypatch.setattr(own, "_CACHED", 1)
    monkeypatch.setattr(own, "_TOGETHER", 16 * INPUTS)
    jax.clear_caches()
    for found, expected in zip(search_scales(weight, moment, about_zero(5), GROUP_SIZE), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.clear_caches()
