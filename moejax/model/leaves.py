"""How modules get their weights.

A module is built from a `Leaves` function, name -> leaf; a checkpoint's reader, a manifest and an abstract model are
all such functions, so that there is one constructor whatever the weights' source. Names are module paths such as
`layers.3.self_attn.q_a`; the table in `weights` lists them.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moejax.formats import Leaf
from moejax.sharding import matmul

# An array (norms, router, bias), a `Leaf` (matrices) or `ExpertWeights`: the table of weights tells which.
Weight = Any
Leaves = Callable[[str], Weight]
# What every weight's input was, by the weight's name; filled while a module is traced, for calibration. The entry
# `experts` is the routed experts' `ExpertRun`.
Taps = dict[str, Any]


def under(leaves: Leaves, prefix: str) -> Leaves:
    """The leaves whose names begin with `prefix.`, named without it."""
    return lambda name: leaves(f"{prefix}.{name}")


def linear(x: jax.Array, weight: nnx.Param[Leaf], taps: Taps | None, name: str) -> jax.Array:
    """matmul(x, weight), the input noted under `name` if somebody listens."""
    if taps is not None:
        taps[name] = x
    return matmul(x, weight.get_value())


def prefixed(prefix: str, taps: Taps | None) -> Taps:
    """The taps of a submodule under its name."""
    return {f"{prefix}.{name}": value for name, value in (taps or {}).items()}


def named_leaves(module: nnx.Module) -> dict[str, Weight]:
    """Every weight of a module by its path, in a stable order."""
    # Not by `nnx.state`, whose reference cycles would keep the weights until the garbage collector comes by.
    params, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, nnx.Param))
    return {jax.tree_util.keystr(path, simple=True, separator="."): param.get_value() for path, param in params}
