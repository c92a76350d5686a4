"""The plan: everything that `compress` will do, as a value that can be printed, saved and edited."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moejax.errors import InputError

# The format of a weight that stays as it is in the original checkpoint.
KEEP = "keep"
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class BlockPlan:
    """What happens to one decoder block.

    formats: format by weight's name relative to the block; weights not named stay as they are.
    keep: the experts that survive, ascending original numbers. experts: by projection, the format of each survivor.
    experts_per_token: K'. routing_scale: what the routed experts' weights are multiplied by.
    The last four are None or empty in a dense block.
    """

    formats: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[int, ...] | None = None
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts_per_token: int | None = None
    routing_scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """One BlockPlan per decoder block, MTP blocks last, and the formats of embedding and head."""

    embed: str
    head: str
    blocks: tuple[BlockPlan, ...]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values; formats are numbered so that a thousand experts take a thousand characters."""
    names = sorted(_format_names(plan))
    letter = {name: chr(ord("a") + n) for n, name in enumerate(names)}
    return {
        "formats": {letter[name]: name for name in names},
        "embed": letter[plan.embed],
        "head": letter[plan.head],
        "blocks": [_block_to_json(block, letter) for block in plan.blocks],
    }


def from_json(raw: Mapping[str, Any]) -> Plan:
    """The inverse of `to_json`. Raises InputError where a key is missing or unknown or a value is no such value."""
    try:
        _require_keys("the plan", raw, {"formats", "embed", "head", "blocks"})
        name = raw["formats"]
        blocks = tuple(_block_from_json(f"block {i} of the plan", block, name) for i, block in enumerate(raw["blocks"]))
        return Plan(name[raw["embed"]], name[raw["head"]], blocks)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"the plan cannot be read: {error!r} in it; expected what `plan.to_json` writes") from None


def _format_names(plan: Plan) -> set[str]:
    names = {plan.embed, plan.head}
    for block in plan.blocks:
        names.update(block.formats.values(), *block.experts.values())
    return names


def _block_to_json(block: BlockPlan, letter: Mapping[str, str]) -> dict[str, Any]:
    raw: dict[str, Any] = {"formats": {name: letter[own] for name, own in block.formats.items()}}
    if block.keep is not None:
        raw["keep"] = list(block.keep)
        raw["experts"] = {name: "".join(letter[own] for own in formats) for name, formats in block.experts.items()}
        raw["experts_per_token"] = block.experts_per_token
        raw["routing_scale"] = block.routing_scale
    return raw


def _block_from_json(what: str, raw: Mapping[str, Any], name: Mapping[str, str]) -> BlockPlan:
    has_experts = "keep" in raw
    own_keys = {"formats", "keep", "experts", "experts_per_token", "routing_scale"} if has_experts else {"formats"}
    _require_keys(what, raw, own_keys)
    formats = {weight: name[own] for weight, own in raw["formats"].items()}
    if not has_experts:
        return BlockPlan(formats)
    keep = tuple(int(e) for e in raw["keep"])
    experts = {projection: tuple(name[own] for own in letters) for projection, letters in raw["experts"].items()}
    _require_keys(f"experts in {what}", experts, set(PROJECTIONS))
    for projection, own in experts.items():
        if len(own) != len(keep):
            raise InputError(
                f"{what} has {len(own)} formats for {projection}; one for each of {len(keep)} experts kept"
            )
    return BlockPlan(formats, keep, experts, int(raw["experts_per_token"]), float(raw["routing_scale"]))


def _require_keys(what: str, raw: Mapping[str, Any], keys: set[str]) -> None:
    for key in sorted(keys ^ raw.keys()):
        problem = "is missing in" if key in keys else "is unknown in"
        raise InputError(f"{key!r} {problem} {what}; its keys are {', '.join(sorted(keys))}")
