"""The variants whose true KL divergence says what errors of a model's blocks cost: few, however many experts it has.

Weights are taken together by family. A probe changes one family in one layer and gives the slope from the error of the
block's output to KL; layers between those that are probed take what lies between. Joint probes change a family in all
layers at once, and say how losses add up.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moejax.formats import Format
from moejax.model import Config, Layout
from moejax.model.weights import IN_BLOCK, block_and_name, row_of

EMBEDDING, HEAD, PRUNING = "embedding", "head", "pruning"
QUERIES, VALUES = "queries and keys", "values"
WIDE, DOWN = "gate and up", "down"
EXPERTS = (EXPERTS_WIDE, EXPERTS_DOWN) = ("experts' gate and up", "experts' down")
OTHERS = (EMBEDDING, HEAD, QUERIES, VALUES, WIDE, DOWN)

_OF_QUERIES = {"queries", "q_latent", "nope"}

# So many layers of a family are probed at most, spread evenly.
_DEPTHS = 5
# The widths of probes, near those that budgets lead to, and of the experts that may go the shares that do.
_BITS, _EXPERT_BITS = 3, 2
PRUNED_SHARES = (0.25, 0.5, 1.0)
# The levels of joint probes: formats' bits, and shares.
_JOINT_BITS, _JOINT_SHARES = (1, 2, 3), (0.5, 1.0)


@dataclass(frozen=True)
class Change:
    """How a variant differs: in these layers, what is of these families is rounded to format number `level` of the
    recipe, or that share of the experts that may go is pruned. Embedding and head are in no layer."""

    families: Collection[str]
    layers: Collection[int]
    level: float

    @property
    def name(self) -> str:
        layers = ", ".join(map(str, sorted(self.layers)))
        return f"{' and '.join(sorted(self.families))} of layers {layers} at {self.level:g}"


def family_of(own: str) -> str:
    """The family of a weight that gets formats, by its name within its block (or the model)."""
    if own not in IN_BLOCK:
        return EMBEDDING if row_of(own).role == "embedding" else HEAD
    row = IN_BLOCK[own]
    if row.role in ("attention", "mtp"):
        return QUERIES if _OF_QUERIES & set(row.axes) else VALUES
    if row.role == "routed experts":
        return EXPERTS_DOWN if row.takes_product else EXPERTS_WIDE
    return DOWN if row.takes_product else WIDE


def layers_by_family(config: Config) -> dict[str, list[int]]:
    """The decoder layers that have weights of each family in them, or experts to prune."""
    found: dict[str, set[int]] = {}
    for name in Layout(config).shapes():
        block, own = block_and_name(name, config.num_hidden_layers)
        row = row_of(name)
        if (
            block is None
            or block >= config.num_hidden_layers
            or not (row.may_be_rounded or row.role == "routed experts")
        ):
            continue
        found.setdefault(family_of(own), set()).add(block)
        if row.role == "routed experts":
            found.setdefault(PRUNING, set()).add(block)
    return {family: sorted(layers) for family, layers in found.items()}


def probed_format(family: str, formats: Sequence[Format]) -> int:
    """The number of the format that a family's probes round to."""
    return _nearest(formats, _EXPERT_BITS if family in EXPERTS else _BITS)


def rounding_probes(config: Config, formats: Sequence[Format]) -> dict[str, dict[int, Change]]:
    """The probes of every family by layer; embedding and head have one, in no layer."""
    if not formats:
        return {}
    layers_of = {family: _spread(layers) for family, layers in layers_by_family(config).items() if family != PRUNING}
    probes = {
        family: {layer: Change((family,), (layer,), probed_format(family, formats)) for layer in layers}
        for family, layers in layers_of.items()
    }
    outer = {family: {-1: Change((family,), (), probed_format(family, formats))} for family in (EMBEDDING, HEAD)}
    return probes | outer


def pruning_probes(config: Config) -> dict[float, dict[int, Change]]:
    """The probes of pruning by share and layer."""
    layers = _spread(layers_by_family(config).get(PRUNING, []))
    return {share: {layer: Change((PRUNING,), (layer,), share) for layer in layers} for share in PRUNED_SHARES}


def joint_probes(config: Config, formats: Sequence[Format]) -> dict[str, list[Change]]:
    """The probes of all layers at once, by the kind of loss (`Losses`)."""
    every = range(config.num_hidden_layers)
    levels = sorted({_nearest(formats, bits) for bits in _JOINT_BITS}) if formats else []
    return {
        "others": [Change(OTHERS, every, level) for level in levels],
        "experts": [Change(EXPERTS, every, level) for level in levels],
        "pruning": [Change((PRUNING,), every, share) for share in _JOINT_SHARES],
    }


def changes_of(config: Config, formats: Sequence[Format]) -> list[Change]:
    """All of them."""
    by_layer = [*rounding_probes(config, formats).values(), *pruning_probes(config).values()]
    singles = (change for own in by_layer for change in own.values())
    joint = (change for changes in joint_probes(config, formats).values() for change in changes)
    return [*singles, *joint]


def _nearest(formats: Sequence[Format], bits: float) -> int:
    return min(range(len(formats)), key=lambda f: abs(formats[f].bits - bits))


def _spread(layers: Sequence[int]) -> list[int]:
    places = np.linspace(0, len(layers) - 1, min(_DEPTHS, len(layers))).round().astype(int)
    return [layers[place] for place in places]
