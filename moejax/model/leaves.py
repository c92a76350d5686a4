"""How modules get their weights, and how their weights are named.

A module is built from a `Leaves` function, name -> leaf; a checkpoint's reader, a manifest and an abstract model are
all such functions, so that there is one constructor whatever the weights' source. Names are module paths such as
`layers.3.self_attn.q_a`; `Layout` lists them with their shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from moejax.formats import Leaf
from moejax.kernels import matmul
from moejax.model.config import Config

# An array (norms, router, bias), a `Leaf` (matrices) or `ExpertWeights`: only the name tells which.
Weight = Any
Leaves = Callable[[str], Weight]
# What every weight's input was, by the weight's name; filled while a module is traced, for calibration. The entry
# `experts` is the routed experts' `ExpertRun`.
Taps = dict[str, Any]

# What MTP blocks of rotated models hold beside the others' weights.
ROTATION_LEAVES = ("signs", "input_gain")


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


@dataclass(frozen=True)
class Layout:
    """The names and logical shapes of a model's weights: what its config says they must be."""

    config: Config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape; experts of one projection count as one weight (E, O, I)."""
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, c.hidden_size)}
        for layer in range(c.num_hidden_layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self.block(layer)}
        shapes |= {"norm": (c.hidden_size,), "head": (c.vocab_size, c.hidden_size)}
        for m in range(c.num_nextn_predict_layers):
            block = self.block(c.num_hidden_layers + m)
            shapes |= {f"mtp.{m}.block.{name}": shape for name, shape in block}
            gains = ("enorm", "hnorm", "norm", *(ROTATION_LEAVES if c.residual_rotation else ()))
            shapes |= {f"mtp.{m}.{name}": (c.hidden_size,) for name in gains}
            shapes[f"mtp.{m}.eh_proj"] = (c.hidden_size, 2 * c.hidden_size)
        return shapes

    def block(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of one decoder layer, relative to it."""
        c = self.config
        yield "input_norm", (c.hidden_size,)
        yield from ((f"self_attn.{name}", shape) for name, shape in self._attention())
        yield "post_attention_norm", (c.hidden_size,)
        if not c.is_moe(layer):
            yield from self._mlp("mlp", c.intermediate_size)
            return
        E, F, D = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        yield from (("mlp.router", (E, D)), ("mlp.bias", (E,)), ("mlp.group_id", (E,)), ("mlp.routing_scale", ()))
        yield from (("mlp.experts.gate", (E, F, D)), ("mlp.experts.up", (E, F, D)), ("mlp.experts.down", (E, D, F)))
        yield from self._mlp("mlp.shared", c.moe_intermediate_size * c.n_shared_experts)

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        c = self.config
        heads, nope, latent = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
        queries = heads * (nope + c.qk_rope_head_dim)
        if c.q_lora_rank is None:
            yield "q", (queries, c.hidden_size)
        else:
            yield from (("q_a", (c.q_lora_rank, c.hidden_size)), ("q_a_norm", (c.q_lora_rank,)))
            yield "q_b", (queries, c.q_lora_rank)
        yield from (("kv_a", (latent + c.qk_rope_head_dim, c.hidden_size)), ("kv_a_norm", (latent,)))
        yield from (("k_b", (heads, nope, latent)), ("v_b", (heads, c.v_head_dim, latent)))
        yield "o", (c.hidden_size, heads * c.v_head_dim)

    def _mlp(self, prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        D = self.config.hidden_size
        yield from ((f"{prefix}.gate", (width, D)), (f"{prefix}.up", (width, D)), (f"{prefix}.down", (D, width)))
