"""A checkpoint in a few rows: what kinds of weights it has, their bytes and their bits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moejax.formats import ExpertWeights, Leaf, payload_bytes

KINDS = ("embedding", "head", "attention", "dense mlp", "shared experts", "routed experts", "router", "norms", "mtp")


@dataclass(frozen=True)
class KindSummary:
    """Weights of one kind: how many numbers they stand for, the bytes of their arrays, bits per number."""

    kind: str
    elements: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.elements


def kind_of(name: str) -> str:
    """The kind of a weight by its name in the model."""
    if name.startswith("mtp."):
        return "mtp"
    if name in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[name]
    if name.endswith("norm"):
        return "norms"
    for part, kind in ((".self_attn.", "attention"), (".shared.", "shared experts"), (".experts.", "routed experts")):
        if part in name:
            return kind
    return "dense mlp" if name.endswith((".gate", ".up", ".down")) else "router"


def summarize(leaves: Iterable[tuple[str, Leaf | ExpertWeights]]) -> list[KindSummary]:
    """Rows in the order of KINDS, from weights by name, concrete or abstract."""
    elements, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, leaf in leaves:
        elements[kind_of(name)] += math.prod(leaf.shape)
        sizes[kind_of(name)] += payload_bytes(leaf)
    return [KindSummary(kind, elements[kind], sizes[kind]) for kind in KINDS if elements[kind]]
