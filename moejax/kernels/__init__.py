"""The four operations on weights, one file per backend. Nothing outside this folder knows backends."""

from moejax.kernels.api import BACKENDS, expert_matmul, matmul, matmul_transposed, take

__all__ = ["BACKENDS", "expert_matmul", "matmul", "matmul_transposed", "take"]
