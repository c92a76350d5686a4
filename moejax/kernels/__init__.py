"""The model's products, one file per backend. Nothing outside this folder knows backends."""

from moejax.kernels.api import BACKENDS, expert_matmul, hadamard, kernel_of, matmul, matmul_transposed, product, take
from moejax.kernels.expert_rows import expert_outer_products

__all__ = [
    "BACKENDS",
    "expert_matmul",
    "expert_outer_products",
    "hadamard",
    "kernel_of",
    "matmul",
    "matmul_transposed",
    "product",
    "take",
]
