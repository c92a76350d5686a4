"""Error feedback against its definition in NumPy and float64, and against plain rounding on tokens held out."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leaf_oracle import scales_of, to_numpy
from moejax.calibrate import BlockStatistics, Inputs, Statistics, calibrate
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.errors import InputError
from moejax.evaluate.text import chunks, default_calibration_text
from moejax.formats import ExpertWeights, GroupFormat, IntFormat, ScaleKind, SignedIntFormat, TernaryFormat, dense
from moejax.formats.grouped import about_zero
from moejax.model import DeepseekV3, named_leaves
from moejax.tokenizer import load_tokenizer
from moejax.transforms import error_feedback as module
from moejax.transforms.error_feedback import ColumnOrder, Rounded, descend, feed_back, quantize_with_feedback
from moejax.transforms.hessian import damped, damping_for
from moejax.transforms.quantize import quantize
from moejax.transforms.rounding import round_weight

Array = NDArray[np.float64]
OUTPUTS, INPUTS, GROUP = 24, 128, 32
KINDS: list[ScaleKind] = ["bf16", "e8"]


def problem(seed: int, tokens: int = 400) -> tuple[Array, Array]:
    """A weight (O, I), and the Hessian (I, I) of correlated inputs of very different sizes."""
    random = np.random.RandomState(seed)
    x_TI = random.normal(size=(tokens, INPUTS)) @ random.normal(size=(INPUTS, INPUTS)) / INPUTS**0.5
    x_TI = x_TI * np.exp(random.normal(size=INPUTS))
    return random.normal(size=(OUTPUTS, INPUTS)), x_TI.T @ x_TI / tokens


def cost(weight_OI: Array, rounded_OI: Array, hessian_II: Array) -> float:
    """sum_o (w_o - q_o) H (w_o - q_o)^T."""
    error_OI = np.asarray(weight_OI, np.float64) - rounded_OI
    return float(np.sum((error_OI @ hessian_II) * error_OI))


def run_feed_back(
    weight_OI: Array, hessian_II: Array, levels: int, kind: ScaleKind = "bf16", order: ColumnOrder = "diagonal"
) -> Rounded:
    w, h = jnp.asarray(weight_OI.T, jnp.float32), jnp.asarray(hessian_II, jnp.float32)
    return _feed_back(w, h, about_zero(levels), GROUP, kind, order)


_feed_back = jax.jit(feed_back, static_argnums=(3, 4, 5))
_descend = jax.jit(descend, static_argnames=("sweeps", "scale_kind"))


def weight_of(rounded: Rounded) -> Array:
    return np.asarray(rounded.weight_IO(), np.float64).T


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize(("kind", "by"), [("bf16", "diagonal"), ("e8", "diagonal"), ("bf16", "natural")])
def test_every_column_is_rounded_to_the_level_nearest_to_its_target(
    levels: int, kind: ScaleKind, by: ColumnOrder
) -> None:
    """Column by column from the last: w_i + sum_(j>i) D_j U_ij / U_ii, with H = U^T U and the errors D found so far."""
    weight_OI, hessian_II = problem(levels)
    hessian_II += 0.05 * np.diag(np.diag(hessian_II))
    found = run_feed_back(weight_OI, hessian_II, levels, kind, by)
    assert_can_be_stored(found.scale_NO, kind)
    steps_OI, scale_ON = np.asarray(found.steps_IO, np.float64).T, np.asarray(found.scale_NO, np.float64).T
    scale_OI, middle = np.repeat(scale_ON, GROUP, axis=1), (levels - 1) / 2
    assert set(np.unique(steps_OI)) <= {code - middle for code in range(levels)}

    diagonal = np.diag(hessian_II)
    groups = sorted(range(INPUTS // GROUP), key=lambda n: diagonal[n * GROUP : (n + 1) * GROUP].sum())
    order = [i for n in groups for i in sorted(range(n * GROUP, (n + 1) * GROUP), key=lambda i: diagonal[i])]
    order = order if by == "diagonal" else list(range(INPUTS))
    upper = np.linalg.cholesky(hessian_II[np.ix_(order, order)]).T
    error_OI = (weight_OI - steps_OI * scale_OI)[:, order]
    differing: int = 0
    for i in reversed(range(INPUTS)):
        target_O = weight_OI[:, order[i]] + error_OI[:, i + 1 :] @ upper[i, i + 1 :] / upper[i, i]
        code_O = np.clip(np.round(target_O / scale_OI[:, order[i]] + middle), 0, levels - 1)
        differing += int(np.count_nonzero(code_O - middle != steps_OI[:, order[i]]))
    # Float32 decides a few ties otherwise.
    assert differing <= 0.002 * steps_OI.size


def test_the_order_of_columns_counts_unless_they_stand_in_it() -> None:
    weight_OI, hessian_II = problem(20)
    mixed, sorted_ = hessian_II, hessian_II[np.ix_(*2 * [np.argsort(np.diag(hessian_II))])]
    for hessian, alike in ((mixed, False), (sorted_, True)):
        arguments = jnp.asarray(weight_OI, jnp.float32), jnp.asarray(hessian, jnp.float32), IntFormat(2, GROUP)
        packed = [module.quantize_with_feedback(*arguments, column_order=by) for by in ("diagonal", "natural")]
        assert np.array_equal(packed[0].words, packed[1].words) is alike


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_shorter_last_group_is_rounded_like_the_others(levels: int) -> None:
    """It takes and gives feedback; where its inputs are uncorrelated with the others', it is rounded as if alone."""
    weight_OI, hessian_II = (own[..., :112] for own in problem(levels))
    hessian_II = hessian_II[:112]
    w, h = jnp.asarray(weight_OI, jnp.float32), jnp.asarray(hessian_II, jnp.float32)
    to = TernaryFormat(GROUP) if levels == 3 else IntFormat(levels.bit_length() - 1, GROUP)
    finer = replace(to, group_size=16)
    costs = [
        cost(weight_OI, to_numpy(packed), hessian_II)
        for packed in (
            module.quantize_with_feedback(w, h, finer),
            module.quantize_with_feedback(w, h, to),
            quantize(w, jnp.diagonal(h), to),
        )
    ]
    assert costs[0] < costs[1] < 0.8 * costs[2]
    h = h.at[:96, 96:].set(0).at[96:, :96].set(0)
    packed = to_numpy(module.quantize_with_feedback(w, h, to, damping=0.0))
    for own in (slice(0, 96), slice(96, 112)):
        alone = module.quantize_with_feedback(w[:, own], h[own, own], to, damping=0.0)
        np.testing.assert_array_equal(packed[:, own], to_numpy(alone))


def assert_can_be_stored(scale_NO: jax.Array, kind: ScaleKind) -> None:
    """Codes suit scales that are read back as they are."""
    if kind == "bf16":
        np.testing.assert_array_equal(scale_NO, scale_NO.astype(jnp.bfloat16).astype(jnp.float32))
    else:
        assert np.all(np.isin(np.asarray(scale_NO, np.float64), scales_of(np.arange(256, dtype=np.uint8))))


@pytest.mark.parametrize("bits", [4, 8])
def test_signed_integers_gain_by_feedback_too(bits: int) -> None:
    weight_OI, hessian_II = problem(bits)
    to = SignedIntFormat(bits, 32, "f16")
    w, h = jnp.asarray(weight_OI, jnp.float32), jnp.asarray(hessian_II, jnp.float32)
    fed_back, alone = quantize_with_feedback(w, h, to), quantize(w, jnp.diagonal(h), to)
    left, most = (cost(weight_OI, to_numpy(own), hessian_II) for own in (fed_back, alone))
    assert left < 0.9 * most
    steps = np.asarray(fed_back.codes()) - 2 ** (bits - 1)
    assert -(2 ** (bits - 1)) <= steps.min() < -(2 ** (bits - 2)) and steps.max() < 2 ** (bits - 1)


@pytest.mark.parametrize("levels", [2, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sweep_lowers_the_error(levels: int, kind: ScaleKind) -> None:
    weight_OI, hessian_II = problem(levels + 10)
    start = run_feed_back(weight_OI, damped_of(hessian_II), levels, kind)
    w, h = jnp.asarray(weight_OI.T, jnp.float32), jnp.asarray(damped_of(hessian_II), jnp.float32)
    descended = [_descend(w, h, start, about_zero(levels), sweeps=sweeps, scale_kind=kind) for sweeps in range(4)]
    assert_can_be_stored(descended[3].scale_NO, kind)
    costs = [cost(weight_OI, weight_of(found), np.asarray(h, np.float64)) for found in descended]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))
    assert costs[3] < 0.97 * costs[0]


def damped_of(hessian_II: Array, damping: float = 0.03) -> Array:
    return np.asarray(damped(jnp.asarray(hessian_II, jnp.float32), damping), np.float64)


def test_inputs_that_do_not_correlate_are_rounded_to_the_nearest_level() -> None:
    weight_OI, _ = problem(1)
    found = run_feed_back(weight_OI, np.eye(INPUTS), 4)
    scale_OI = np.repeat(np.asarray(found.scale_NO, np.float64).T, GROUP, axis=1)
    codes = np.clip(np.round(np.float32(weight_OI) / scale_OI + 1.5), 0, 3) - 1.5
    assert np.mean(codes != np.asarray(found.steps_IO).T) < 0.002


@pytest.mark.parametrize("kind", KINDS)
def test_every_width_is_one_compilation(kind: ScaleKind) -> None:
    weight_OI, hessian_II = problem(3)
    compiled: Any = module.round_rows
    formats: list[GroupFormat] = [IntFormat(1, GROUP, kind), TernaryFormat(GROUP, kind), IntFormat(3, GROUP, kind)]
    before = compiled._cache_size()
    errors = [error_of(weight_OI, hessian_II, to) for to in formats]
    assert compiled._cache_size() == before + 1
    assert errors == sorted(errors, reverse=True)


def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of two heads and 2 * 12 rows, in parts of 10 at most, which 24 does not divide by."""
    weight_OI, hessian_II = problem(4)
    weight, hessian = jnp.asarray(weight_OI.reshape(2, -1, INPUTS), jnp.float32), jnp.asarray(hessian_II, jnp.float32)
    whole = module.quantize_with_feedback(weight, hessian, IntFormat(3, GROUP))
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    parts = module.quantize_with_feedback(weight, hessian, IntFormat(3, GROUP))
    assert parts.shape == whole.shape == weight.shape
    same = np.asarray(dense(parts, jnp.dtype("float32"))) == np.asarray(dense(whole, jnp.dtype("float32")))
    assert same.mean() > 0.99  # other sizes of matrices are summed in another order


def error_of(weight_OI: Array, hessian_II: Array, to: GroupFormat) -> float:
    packed = module.quantize_with_feedback(
        jnp.asarray(weight_OI, jnp.float32), jnp.asarray(hessian_II, jnp.float32), to, jnp.float32(0.03)
    )
    assert packed.format_name == to.name
    return cost(weight_OI, np.asarray(dense(packed, jnp.dtype("float32")), np.float64), hessian_II)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 100),
    tokens=st.sampled_from([0, 1, 5, INPUTS // 2]),
    exponent=st.sampled_from([-15, 0, 12]),
    dead=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_singular_hessians_give_finite_weights(
    seed: int, tokens: int, exponent: int, dead: bool, kind: ScaleKind
) -> None:
    random = np.random.RandomState(seed)
    x_TI = random.normal(size=(tokens, INPUTS)) * 10.0**exponent
    x_TI[:, : INPUTS // 3] *= not dead
    weight = jnp.asarray(random.normal(size=(OUTPUTS, INPUTS)), jnp.float32)
    hessian = jnp.asarray(x_TI.T @ x_TI / max(tokens, 1), jnp.float32)
    packed = module.quantize_with_feedback(weight, hessian, IntFormat(2, GROUP, kind), damping_for(tokens, INPUTS))
    rounded = np.asarray(dense(packed, jnp.dtype("float32")))
    assert np.all(np.isfinite(rounded))
    assert np.abs(rounded).max() < 10 * np.abs(weight).max()


@pytest.mark.parametrize(("bits", "share"), [(1, 0.03), (2, 0.03), (4, 0.15)])
def test_what_scales_of_eight_bits_cost(bits: int, share: float) -> None:
    weight_OI, hessian_II = problem(7)
    wide, narrow = (error_of(weight_OI / 16, hessian_II, IntFormat(bits, GROUP, kind)) for kind in KINDS)
    assert narrow <= (1 + share) * wide


def test_another_order_of_columns_is_refused() -> None:
    with pytest.raises(InputError, match="column_order is 'random'; diagonal or natural is accepted"):
        module.quantize_with_feedback(jnp.ones((4, 96)), jnp.eye(96), IntFormat(2, 32), column_order="random")  # type: ignore[arg-type]


AMPLE, SHORT, HELD_OUT = slice(0, 24), slice(0, 2), slice(24, 36)


@cache
def two_layers() -> tuple[DeepseekV3, NDArray[np.int32]]:
    """The first two layers of the tiny checkpoint, dense and with experts, and chunks of Python sources."""
    checkpoint = open_checkpoint()
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint.path)
    config = replace(checkpoint.config, num_hidden_layers=2)
    tokens = tokenizer.encode(default_calibration_text(120_000).content)
    rows = chunks(tokens, bos_token_id=tokenizer.bos_token_id)
    spread = rows[np.linspace(0, len(rows) - 1, 36).astype(int)]
    return DeepseekV3(config, named_leaves(model).__getitem__), np.random.RandomState(0).permutation(spread)


@cache
def statistics(start: int, stop: int) -> Statistics:
    model, rows = two_layers()
    return calibrate(model, rows[start:stop], batch=2, hessians=True)


PROJECTIONS = [
    *(f"0.self_attn.{name}" for name in ("q_a", "q_b", "kv_a", "k_b", "v_b", "o")),
    *(f"0.mlp.{name}" for name in ("gate", "up", "down")),
    *(f"1.mlp.shared.{name}" for name in ("gate", "up", "down")),
    *(f"1.mlp.experts.{name}" for name in ("gate", "up", "down")),
]


@pytest.mark.parametrize("calibrated", [AMPLE, SHORT], ids=["ample", "half a token per input and expert"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_error_on_tokens_held_out_is_below_that_of_rounding(projection: str, calibrated: slice) -> None:
    block, name = projection.split(".", 1)
    own, held_out = (statistics(part.start, part.stop).blocks[int(block)] for part in (calibrated, HELD_OUT))
    weight, inputs, hessian_II = (
        of_expert(own, held_out, name) if ".experts." in name else of_weight(own, held_out, name)
    )
    to = IntFormat(2, 128)
    fed_back, rounded = round_weight(weight, inputs, to), quantize(weight, inputs.second_moment, to)
    width = weight.shape[-1]
    errors = [
        cost(np.asarray(weight).reshape(-1, width), np.asarray(dense(q, jnp.float32)).reshape(-1, width), hessian_II)
        for q in (fed_back, rounded)
    ]
    assert errors[0] < errors[1] * (0.9 if calibrated == AMPLE else 1.0)


def of_weight(own: BlockStatistics, held_out: BlockStatistics, name: str) -> tuple[jax.Array, Inputs, Array]:
    model, _ = two_layers()
    layer = 1 if "shared" in name else 0
    weight = dense(named_leaves(model)[f"layers.{layer}.{name}"], jnp.float32)
    return weight, own.inputs(name), np.asarray(held_out.input_hessian(name), np.float64)


def of_expert(own: BlockStatistics, held_out: BlockStatistics, name: str) -> tuple[jax.Array, Inputs, Array]:
    """The expert that the short calibration gave half a token per input dimension, or the next to it."""
    model, _ = two_layers()
    weights, projection = named_leaves(model)[f"layers.1.{name}"], name.rpartition(".")[2]
    few = statistics(SHORT.start, SHORT.stop).blocks[1].experts
    assert isinstance(weights, ExpertWeights) and own.experts and held_out.experts and few
    e = int(np.argmin(np.abs(np.asarray(few.count_E) - weights.shape[-1] / 2)))
    (products,) = held_out.experts.hidden_EFF if projection == "down" else held_out.experts.x_EDD
    assert products is not None
    return dense(weights.expert(e), jnp.float32), own.experts.inputs(projection, e), np.asarray(products[e], np.float64)
