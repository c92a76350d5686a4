"""The model's leaves from Hugging Face tensors: FP8 kept as it is, kv_b split, experts put side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.chunks import aligned
from moejax.checkpoint.hf_names import K_B, SCALE, V_B, hf_name
from moejax.formats import ExpertWeights, Fp8Blocks, Leaf
from moejax.model.config import Config
from moejax.model.leaves import Weight
from moejax.model.weights import row_of


@dataclass(frozen=True)
class HuggingFaceLeaves:
    """Leaf by name from tensor by name.

    `read` gives a tensor's array, from a file or, under `jax.eval_shape`, an abstract one; `block` is the size of FP8
    blocks, asked for only where a tensor is FP8.
    """

    config: Config
    read: Callable[[str], np.ndarray | jax.Array]
    block: Callable[[], tuple[int, int]]

    def __call__(self, name: str) -> Weight:
        """The weight that `Layout` calls `name`."""
        row = row_of(name)
        if row.is_derived:
            return derived_leaf(row.name, self.config)
        tensor = hf_name(name, self.config)
        assert tensor is not None
        if row.role == "routed experts":
            return self.experts(name, range(self.config.n_routed_experts))
        if row.name in (K_B, V_B):
            return self._split_kv_b(tensor, is_key=row.name == K_B)
        return self._leaf(tensor)

    def _leaf(self, tensor: str) -> Leaf:
        values = jnp.asarray(self.read(tensor))
        if values.dtype != jnp.float8_e4m3fn:
            return values
        return Fp8Blocks(values, jnp.asarray(self.read(tensor + SCALE)), self.block())

    def experts(self, name: str, members: Sequence[int]) -> ExpertWeights:
        """Of the routed experts' weights that `Layout` calls `name` those of some experts."""
        tensor = hf_name(name, self.config)
        assert tensor is not None
        names = [tensor.format(e) for e in members]
        values = self._stacked(names)
        bucket: Leaf = values
        if values.dtype == jnp.float8_e4m3fn:
            bucket = Fp8Blocks(values, self._stacked([name + SCALE for name in names]), self.block())
        slots = jnp.arange(len(names), dtype=jnp.int32)
        return ExpertWeights((bucket,), jnp.zeros_like(slots), slots)

    def _stacked(self, tensors: Sequence[str]) -> jax.Array:
        """Equal tensors as one array (E, ...), with no more than one of them in memory beside it."""
        first = self.read(tensors[0])
        if isinstance(first, jax.Array):
            return jnp.stack([self.read(tensor) for tensor in tensors])
        stacked = aligned((len(tensors), *first.shape), first.dtype)
        stacked[0] = first
        for e, tensor in enumerate(tensors[1:], start=1):
            stacked[e] = self.read(tensor)
        return jax.device_put(stacked)

    def _split_kv_b(self, tensor: str, is_key: bool) -> Leaf:
        """k_b (H, N, L) or v_b (H, V, L) of kv_b_proj (H*(N+V), L), FP8 scales following their rows exactly."""
        c = self.config
        first, width = (0, c.qk_nope_head_dim) if is_key else (c.qk_nope_head_dim, c.v_head_dim)
        values = jnp.asarray(self.read(tensor))
        per_head = values.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
        part = per_head[:, first : first + width]
        if values.dtype != jnp.float8_e4m3fn:
            return part
        block = kv_b_block(self.block(), c)
        rows = np.arange(values.shape[0]).reshape(per_head.shape[:2])[:, first : first + width : block[0]]
        return Fp8Blocks(part, jnp.asarray(self.read(tensor + SCALE))[rows // self.block()[0]], block)


def derived_leaf(name: str, config: Config) -> jax.Array:
    """A block's weight that no tensor holds: experts in equal contiguous groups (E,), a routing scale of one ()."""
    if name == "mlp.routing_scale":
        return jnp.ones((), jnp.float32)
    experts, groups = config.n_routed_experts, config.n_group
    return jnp.arange(experts, dtype=jnp.int32) // (experts // groups)


def kv_b_block(block: tuple[int, int], config: Config) -> tuple[int, int]:
    """The FP8 blocks of k_b and v_b, where kv_b_proj's are `block`: the most rows that no border lies within."""
    return math.gcd(block[0], config.qk_nope_head_dim, config.v_head_dim), block[1]
