"""How a model lies over the devices of a mesh, and the products of weights that are cut over them."""

from moejax.sharding.operations import expert_matmul, gathered, matmul, matmul_transposed, take
from moejax.sharding.rules import TENSOR, shardings

__all__ = ["TENSOR", "expert_matmul", "gathered", "matmul", "matmul_transposed", "shardings", "take"]
