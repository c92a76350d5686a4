import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.kernels.hadamard_matrix import hadamard_factors, hadamard_matrix, hadamard_order, hadamard_order_fits

PALEY = (12, 20, 28, 36, 44, 60)
# The sizes of DeepSeek-V3, DeepSeek-V2-Lite and Kimi-K2 that are rotated.
OF_MODELS = (7168, 1536, 512, 128, 2048, 18432, 1408, 2816)


def assert_hadamard(matrix: np.ndarray) -> None:
    """H H^T = n I, exactly, of +1 and -1."""
    wide = matrix.astype(np.int64)
    assert set(np.unique(wide)) <= {-1, 1}
    np.testing.assert_array_equal(wide @ wide.T, len(wide) * np.eye(len(wide), dtype=np.int64))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 256, *PALEY, *(order * 2**k for order in PALEY for k in (1, 3))])
def test_orders_that_fit(n: int) -> None:
    assert hadamard_order_fits(n)
    assert hadamard_matrix(n).shape == (n, n)
    assert_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize("n", OF_MODELS)
def test_sizes_of_models_fit_with_small_factors(n: int) -> None:
    """A Kronecker product of Hadamard matrices is one, so that the large matrix need not be made."""
    factors = hadamard_factors(n)
    assert math.prod(map(len, factors)) == n == hadamard_order(n)
    assert max(map(len, factors)) <= 64
    for factor in factors:
        assert_hadamard(factor)


def test_powers_of_two_are_sylvesters() -> None:
    for k in range(9):
        expected = reduce(np.kron, [np.array([[1, 1], [1, -1]])] * k, np.ones((1, 1), int))
        np.testing.assert_array_equal(hadamard_matrix(2**k), expected)


@pytest.mark.parametrize(
    ("n", "order"), [(6, 2), (10, 2), (52, 4), (104, 8), (2 * 27, 2), (12 * 27, 36), (3 * 28, 28), (16 * 63, 144)]
)
def test_other_even_numbers_are_blocks_along_the_diagonal(n: int, order: int) -> None:
    assert hadamard_order(n) == order and not hadamard_order_fits(n)
    block = hadamard_matrix(order)
    assert_hadamard(block)
    np.testing.assert_array_equal(hadamard_matrix(n), np.kron(np.eye(n // order, dtype=int), block))


@given(st.integers(1, 400))
def test_every_even_number_has_orthogonal_rows(half: int) -> None:
    n = 2 * half
    matrix = hadamard_matrix(n).astype(np.int64)
    np.testing.assert_array_equal(matrix @ matrix.T, hadamard_order(n) * np.eye(n, dtype=np.int64))
    assert n % hadamard_order(n) == 0


@pytest.mark.parametrize("n", [3, 7, 255, 7169])
def test_odd_numbers_are_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"{n} numbers cannot be rotated .* an even number, or 1, is accepted"):
        hadamard_factors(n)
