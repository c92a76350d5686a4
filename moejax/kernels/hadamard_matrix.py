"""Hadamard matrices as Kronecker products of small ones, computed and never tabulated.

H (n, n) of +1 and -1 is a Hadamard matrix if H H^T = n I. Powers of two are Sylvester's; 12, 20, 28, 36, 44 and 60 are
Paley's, from the quadratic residues of a prime (https://en.wikipedia.org/wiki/Paley_construction). A Kronecker product
of Hadamard matrices is one, which gives the sizes of models: 7168 = 28 * 256, 18432 = 36 * 512, 1408 = 44 * 32.
"""

import functools
import math

import numpy as np

from moejax.errors import InputError

# The largest factor: a product with H takes as many multiplications a number as its factors have rows together.
_MAX_FACTOR = 64
_SYLVESTER = np.array([[1, 1], [1, -1]], np.int8)


@functools.cache
def hadamard_factors(n: int) -> tuple[np.ndarray, ...]:
    """Small matrices of +1 and -1, int8, whose Kronecker product is a Hadamard matrix of order b, which divides n.

    b is n itself where `hadamard_order_fits`. Elsewhere it is the largest divisor of n whose matrix is known here,
    and n / b such matrices stand along the diagonal. Raises InputError if n is odd and not 1.
    """
    twos = n & -n
    if n != 1 and twos == 1:
        raise InputError(f"{n} numbers cannot be rotated by a Hadamard matrix; an even number, or 1, is accepted")
    if twos >= 4:
        for odd in range(_MAX_FACTOR // 4 - 1, 1, -2):
            if n % odd == 0 and (paley := _paley(4 * odd)) is not None:
                return (paley, *_powers_of_two(twos // 4))
    return _powers_of_two(twos)


def hadamard_order_fits(n: int) -> bool:
    """Whether the product of `hadamard_factors(n)` is of order n, so that every number is mixed with all others."""
    return hadamard_order(n) == n


def hadamard_order(n: int) -> int:
    """b of `hadamard_factors`: the order of the blocks along the diagonal."""
    return math.prod(len(factor) for factor in hadamard_factors(n))


def hadamard_matrix(n: int) -> np.ndarray:
    """The whole matrix (n, n), with zeros outside the blocks along the diagonal."""
    block = functools.reduce(np.kron, hadamard_factors(n), np.ones((1, 1), np.int8))
    return np.kron(np.eye(n // len(block), dtype=np.int8), block)


def _powers_of_two(n: int) -> tuple[np.ndarray, ...]:
    """Sylvester's matrix of order n as factors of about equal size, none above _MAX_FACTOR."""
    exponent = n.bit_length() - 1
    count = -(-exponent // (_MAX_FACTOR.bit_length() - 1))
    exponents = [(exponent + i) // count for i in range(count)]
    return tuple(functools.reduce(np.kron, [_SYLVESTER] * own) for own in exponents)


def _paley(order: int) -> np.ndarray | None:
    """By Paley's first construction, order = q + 1 with q = 3 mod 4, or his second, order = 2 (q + 1) with q = 1 mod 4,
    if q is prime."""
    if order % 4 == 0 and _is_prime(order - 1):
        return _conference_matrix(order - 1) + np.eye(order, dtype=np.int8)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        signs = np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(_conference_matrix(q), _SYLVESTER) + np.kron(np.eye(q + 1, dtype=np.int8), signs)
    return None


def _conference_matrix(q: int) -> np.ndarray:
    """C (q+1, q+1) with C C^T = q I, zeros on its diagonal, antisymmetric for q = 3 mod 4, symmetric for q = 1."""
    residue = np.full(q, -1, np.int8)
    residue[np.arange(1, q) ** 2 % q] = 1
    residue[0] = 0
    border = np.ones(q, np.int8)
    differences = np.subtract.outer(np.arange(q), np.arange(q)) % q
    return np.block([[np.zeros(1, np.int8), border], [residue[-1] * border[:, None], residue[differences]]])


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, q))
