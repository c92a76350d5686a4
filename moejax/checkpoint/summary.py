"""A checkpoint in a few rows: what kinds of weights it has, their bytes and their bits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import jax.numpy as jnp

from moejax.formats import ExpertWeights, Leaf, PackedTensor, payload_bytes
from moejax.kernels import kernel_of
from moejax.model.weights import Role, in_mtp_block, row_of

KINDS: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class KindSummary:
    """Weights of one kind: how many numbers they stand for, the bytes of their arrays, bits per number."""

    kind: str
    elements: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.elements


def kernel_bytes(leaves: Iterable[tuple[str, Leaf | ExpertWeights]], platform: str) -> dict[str, int]:
    """Bytes of the packed weights that each backend multiplies in bfloat16 in programs for a platform."""
    found: dict[str, int] = {}
    for name, leaf in leaves:
        if row_of(name).is_matrix and kind_of(name) != "embedding":  # of which rows are taken
            for kernel, own in kernel_of(leaf, jnp.bfloat16, platform).items():
                packed = [part for part in own if isinstance(part, PackedTensor)]
                found[kernel] = found.get(kernel, 0) + payload_bytes(packed)
    return {kernel: size for kernel, size in found.items() if size}


def kind_of(name: str) -> Role:
    """The kind of a weight by its name in the model: its role, but all of an MTP block are of one kind."""
    return "mtp" if in_mtp_block(name) else row_of(name).role


def summarize(leaves: Iterable[tuple[str, Leaf | ExpertWeights]]) -> list[KindSummary]:
    """Rows in the order of KINDS, from weights by name, concrete or abstract."""
    elements, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, leaf in leaves:
        elements[kind_of(name)] += math.prod(leaf.shape)
        sizes[kind_of(name)] += payload_bytes(leaf)
    return [KindSummary(kind, elements[kind], sizes[kind]) for kind in KINDS if elements[kind]]
