"""Every operation on every backend equals the dense product in float64, computed from the formats' equations."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import FloatArray, random_leaf, to_numpy
from moejax import kernels
from moejax.formats import Leaf, gather_experts
from moejax.kernels import multiply_tpu, xla
from moejax.kernels.hadamard_matrix import hadamard_matrix, hadamard_order

# Bounds on |error| / (|x| |w|^T): in bfloat16 a weight and a result are rounded by 2^-9 each; in float32 it is the sum
# that rounds.
TOLERANCE = {"bfloat16": 2.0**-8, "float32": 2e-6, "float64": 1e-14}

GROUPED_INTS = [f"int{bits}g{(32, 64, 128)[bits % 3]}[40,512]" for bits in range(1, 9)]
MATRICES = [
    *GROUPED_INTS,
    "int5g32[40,512]",
    "int5g64[40,512]",
    "int3g64[40,256]",  # too short for the Pallas kernel
    "int2g64[24,2048]",  # words fill whole lanes
    "int7g128[24,4096]",
    "int5g32e8[40,512]",
    "int2g128e8[24,2048]",
    "sint4g32f16[40,512]",
    "sint8g128[40,512]",
    "ternaryg64e8[40,512]",
    "ternaryg128[40,512]",
    "ternaryg32[24,160]",  # no padding
    "int3g128[40,192]",  # a shorter last group
    "int8g128[40,192]",
    "int5g64e8[24,75]",  # and padded words
    "ternaryg128[24,201]",
    "ternaryg128e8[24,2048]",
    "ternaryg64[24,2560]",  # words fill whole lanes
    "fp8b128x128[200,136]",
    "fp8b32x32[64,96]",
    "f32[40,96]",
    "bf16[40,96]",
]
BATCHES = [
    "int4g32[3,40,128]",
    "int4g32[3,16,128]",  # all outputs are one tile
    "ternaryg128e8[3,16,128]",
    "int4g64[3,40,100]",
    "ternaryg64[3,40,128]",
    "int4g64e8[3,40,128]",
    "fp8b32x32[3,40,96]",
    "f32[3,40,96]",
    "bf16[3,40,96]",
]
FEW = [
    "int3g32[40,512]",
    "ternaryg128[40,512]",
    "fp8b128x128[200,136]",
    "bf16[40,96]",
    "int4g32[3,40,128]",
    "int3g64e8[40,512]",
    "sint4g32f16[40,512]",
]


def implementations(operation: str) -> list[str]:
    """The backends, only the first of those that share the operation."""
    names = {getattr(backend, operation): name for name, backend in reversed(kernels.BACKENDS.items())}
    return list(names.values())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop over them runs, and none divides its matrix."""
    monkeypatch.setattr(xla, "TILE_BYTES", 4 * 512 * 16)
    monkeypatch.setattr(multiply_tpu, "MAX_OUTPUT_TILE", 16)
    monkeypatch.setattr(multiply_tpu, "MAX_ROW_BLOCK", 24)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@cache
def jitted(operation: Callable[..., jax.Array], **static: str | bool) -> Callable[..., jax.Array]:
    """Compiled once for all tests of this file, whose tiles are the same."""
    return jax.jit(partial(operation, **static))


def random_rows(*shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(jnp.dtype(dtype)))


def assert_close(y: jax.Array, x: jax.Array, w: FloatArray, equation: str) -> None:
    """y equals the contraction of x and w by `equation`, as exactly as x.dtype allows."""
    assert y.dtype == x.dtype
    wide_x = np.asarray(x, np.float64)
    error = np.abs(np.asarray(y, np.float64) - np.einsum(equation, wide_x, w))
    bound = TOLERANCE[x.dtype.name] * np.einsum(equation, np.abs(wide_x), np.abs(w))
    assert error.shape == y.shape
    assert np.all(error <= bound), f"{np.max(error / bound)} times the tolerance"


@pytest.mark.parametrize("inputs", [512, 200])
def test_derivatives_are_those_of_every_backend(inputs: int) -> None:
    """Forwards, backwards and of second order, whether or not a kernel takes the rows; and no rows at all."""
    w, x = random_leaf(f"int4g128[8,{inputs}]"), random_rows(3, inputs, dtype="float32")

    def loss(x: jax.Array, backend: str | None) -> jax.Array:
        return jnp.sum(jnp.sin(kernels.matmul(x, w, backend=backend)))

    def second(x: jax.Array, backend: str | None) -> jax.Array:
        return jax.jvp(partial(jax.grad(loss), backend=backend), (x,), (x,))[1]

    for derivative in (jax.grad(loss), jax.jacfwd(loss), second):
        expected = derivative(x, "reference")
        for backend in (None, "xla", "pallas_tpu"):
            np.testing.assert_allclose(derivative(x, backend), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert kernels.matmul(x[:0], w).shape == (0, 8)


@pytest.mark.parametrize("backend", implementations("matmul"))
class TestMatmul:
    """y[..., b, o] = sum_i w[b, o, i] * x[..., b, i]."""

    def check(self, spec: str, rows: int, dtype: str, backend: str) -> None:
        w = random_leaf(spec)
        *batch, _, inputs = w.shape
        x = random_rows(rows, *batch, inputs, dtype=dtype)
        y = jitted(kernels.matmul, backend=backend)(x, w)
        assert_close(y, x, to_numpy(w), "rbi,boi->rbo" if batch else "ri,oi->ro")

    @pytest.mark.parametrize("spec", [*MATRICES, *BATCHES])
    def test_every_format(self, spec: str, backend: str) -> None:
        self.check(spec, 7, "float32", backend)

    @pytest.mark.parametrize("spec", FEW)
    @pytest.mark.parametrize("rows", [1, 64])
    def test_rows(self, spec: str, rows: int, backend: str) -> None:
        self.check(spec, rows, "float32", backend)

    @pytest.mark.parametrize("spec", FEW)
    def test_bfloat16(self, spec: str, backend: str) -> None:
        self.check(spec, 7, "bfloat16", backend)

    @pytest.mark.parametrize("spec", FEW)
    def test_float64(self, spec: str, backend: str, x64: None) -> None:
        self.check(spec, 7, "float64", backend)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("inputs", range(320, 640, 32))
    def test_every_rest_of_a_unit_of_trits(self, inputs: int, dtype: str, backend: str) -> None:
        self.check(f"ternaryg32[24,{inputs}]", 7, dtype, backend)

    @pytest.mark.parametrize("leading", [(), (2, 3)])
    def test_leading_axes(self, leading: tuple[int, ...], backend: str) -> None:
        w = random_leaf("int3g32[40,512]")
        x = random_rows(*leading, 512, dtype="float32")
        y = jitted(kernels.matmul, backend=backend)(x, w)
        assert_close(y, x, to_numpy(w), "...i,oi->...o")


@pytest.mark.parametrize("backend", implementations("matmul_transposed"))
class TestMatmulTransposed:
    """y[..., b, i] = sum_o w[b, o, i] * x[..., b, o]."""

    def check(self, spec: str, rows: int, dtype: str, backend: str) -> None:
        w = random_leaf(spec)
        *batch, outputs, _ = w.shape
        x = random_rows(rows, *batch, outputs, dtype=dtype)
        y = jitted(kernels.matmul_transposed, backend=backend)(x, w)
        assert_close(y, x, to_numpy(w), "rbo,boi->rbi" if batch else "ro,oi->ri")

    @pytest.mark.parametrize("spec", [*MATRICES, *BATCHES])
    def test_every_format(self, spec: str, backend: str) -> None:
        self.check(spec, 7, "float32", backend)

    @pytest.mark.parametrize("spec", FEW)
    @pytest.mark.parametrize("rows", [1, 64])
    def test_rows(self, spec: str, rows: int, backend: str) -> None:
        self.check(spec, rows, "float32", backend)

    @pytest.mark.parametrize("spec", FEW)
    def test_bfloat16(self, spec: str, backend: str) -> None:
        self.check(spec, 7, "bfloat16", backend)

    @pytest.mark.parametrize("spec", FEW)
    def test_float64(self, spec: str, backend: str, x64: None) -> None:
        self.check(spec, 7, "float64", backend)


@pytest.mark.parametrize("backend", implementations("expert_matmul"))
class TestExpertMatmul:
    """y[r, o] = sum_i w[e(r), o, i] * x[r, i], rows sorted by expert."""

    FORMATS = ("int3g32", "int2g128", "fp8b128x128", "int3g32", "bf16", "ternaryg64")

    def check(
        self,
        rows_E: list[int],
        dtype: str,
        backend: str,
        shape: str = "[40,512]",
        formats: Sequence[str] = FORMATS,
    ) -> None:
        """Experts without rows get weights that are not a number: nothing of them may reach the result."""
        experts = [random_leaf(name + shape, seed) for seed, name in enumerate(formats)]
        expert_R = np.repeat(np.arange(len(experts)), rows_E)
        w_ROI = np.stack([to_numpy(experts[e]) for e in expert_R])
        x = random_rows(len(expert_R), w_ROI.shape[-1], dtype=dtype)
        w = gather_experts([e if rows else poisoned(e) for e, rows in zip(experts, rows_E, strict=True)])
        y = jitted(kernels.expert_matmul, backend=backend)(x, w, jnp.asarray(rows_E))
        assert_close(y, x, w_ROI, "ri,roi->ro")

    @pytest.mark.parametrize(
        "rows_E",
        [
            [3, 1, 4, 1, 5, 9],
            [10, 0, 0, 4, 0, 9],
            [0, 0, 23, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 1],
            [0, 8, 1, 1, 1, 12],
        ],
    )
    def test_routing(self, rows_E: list[int], backend: str) -> None:
        self.check(rows_E, "float32", backend)

    def test_bfloat16(self, backend: str) -> None:
        self.check([3, 0, 4, 1, 5, 9], "bfloat16", backend)

    def test_float64(self, backend: str, x64: None) -> None:
        self.check([3, 0, 4, 1, 5, 9], "float64", backend)

    def test_one_tile(self, backend: str) -> None:
        self.check([3, 0, 4, 1, 5, 9], "float32", backend, shape="[8,128]")

    def test_derivatives_by_rows(self, backend: str) -> None:
        """The product is linear in them: a . multiply(b) is b . (its transpose of a). More in `test_expert_rows`."""
        w = gather_experts([random_leaf(f"{name}[16,512]") for name in ("int2g128", "ternaryg128")])
        x, by, rows_E = random_rows(3, 512, dtype="float32"), random_rows(3, 16, dtype="float32"), jnp.asarray([2, 1])
        y, back = jax.vjp(partial(kernels.expert_matmul, w=w, rows_E=rows_E, backend=backend), x)
        (found,) = back(by)
        np.testing.assert_allclose(jnp.sum(x * found), jnp.sum(y * by), rtol=1e-4)

    def test_scales_of_eight_bits(self, backend: str) -> None:
        formats = ("int3g32e8", "bf16", "int3g32", "ternaryg64e8", "int3g32e8")
        self.check([3, 0, 4, 1, 5], "float32", backend, formats=formats)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["ternaryg64", "ternaryg128e8"])
    def test_ternary(self, name: str, dtype: str, backend: str) -> None:
        """So many experts that a TPU would store a word of all side by side; more than one block of rows for some."""
        self.check([1, 0, 30, 1, 0, 2, 0, 1], dtype, backend, shape="[128,512]", formats=[name] * 8)
        self.check([1, 0, 0, 0], dtype, backend, shape="[40,2048]", formats=[name] * 4)

    def test_ternary_beside_integers(self, backend: str) -> None:
        formats = ["ternaryg64", "int2g128", "ternaryg128e8", "int5g32", "ternaryg64"]
        self.check([3, 2, 4, 1, 5], "bfloat16", backend, shape="[48,1536]", formats=formats)


@pytest.mark.parametrize("backend", implementations("product"))
class TestProduct:
    """einsum(equation, a, b), in at least float32."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_attention_scores(self, dtype: str, backend: str) -> None:
        a, b = random_rows(2 * 3 * 4, 96, dtype=dtype), random_rows(2 * 5, 96, dtype=dtype)
        multiply = jitted(kernels.product, backend=backend, equation="bthl,bsl->bhts")
        y = multiply(a=a.reshape(2, 3, 4, 96), b=b.reshape(2, 5, 96))
        assert y.dtype == jnp.float32
        wide = (np.asarray(part, np.float64) for part in (a.reshape(2, 3, 4, 96), b.reshape(2, 5, 96)))
        np.testing.assert_allclose(y, np.einsum("bthl,bsl->bhts", *wide), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", implementations("hadamard"))
class TestHadamard:
    """y[..., j] = sum_i x[..., i] H[i, j] / sqrt(b), or of H^T."""

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("shape", [(3, 256), (2, 3, 48), (5, 88), (28,), (4, 1536), (3, 6), (2, 1)])
    def test_sizes(self, shape: tuple[int, ...], inverse: bool, backend: str) -> None:
        self.check(shape, "float32", backend, inverse)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_dtypes(self, dtype: str, backend: str, x64: None) -> None:
        self.check((3, 2, 224), dtype, backend, inverse=False)
        self.check((3, 2, 224), dtype, backend, inverse=True)

    def test_the_inverse_undoes_it(self, backend: str) -> None:
        x = random_rows(3, 144, dtype="float32")
        y = jitted(kernels.hadamard, backend=backend)(x)
        np.testing.assert_allclose(jitted(kernels.hadamard, backend=backend, inverse=True)(y), x, rtol=0, atol=1e-5)

    def check(self, shape: tuple[int, ...], dtype: str, backend: str, inverse: bool) -> None:
        x, n = random_rows(*shape, dtype=dtype), shape[-1]
        y = jitted(kernels.hadamard, backend=backend, inverse=inverse)(x)
        matrix = hadamard_matrix(n).astype(np.float64) / hadamard_order(n) ** 0.5
        assert_close(y, x, matrix if inverse else matrix.T, "...i,oi->...o")


@pytest.mark.parametrize("backend", implementations("take"))
class TestTake:
    """y[..., i] = w[index[...], i]."""

    @pytest.mark.parametrize("spec", MATRICES)
    def test_every_format(self, spec: str, backend: str) -> None:
        self.check(spec, "float32", backend)

    @pytest.mark.parametrize("spec", [spec for spec in FEW if spec not in BATCHES])
    def test_bfloat16(self, spec: str, backend: str) -> None:
        self.check(spec, "bfloat16", backend)

    @pytest.mark.parametrize("spec", [spec for spec in FEW if spec not in BATCHES])
    def test_float64(self, spec: str, backend: str, x64: None) -> None:
        self.check(spec, "float64", backend)

    def check(self, spec: str, dtype: str, backend: str) -> None:
        w = random_leaf(spec)
        index = np.random.default_rng(1).integers(0, w.shape[0], (2, 5))
        index[0, :2] = 0, w.shape[0] - 1
        y = jitted(kernels.take, backend=backend, dtype=dtype)(w, index)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), to_numpy(w)[index], rtol=TOLERANCE[dtype])


def poisoned(leaf: Leaf) -> Leaf:
    """The leaf with every float in it not a number."""
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, leaf)
