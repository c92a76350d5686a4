"""The plan: everything that `compress` will do, as a value that can be printed, saved and edited."""

import hashlib
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from moejax.errors import InputError

# The format of a weight that stays as it is in the original checkpoint.
KEEP = "keep"
PROJECTIONS = ("gate", "up", "down")
# Plans in which they are false do not name them, as those of before they were there.
_NEW = ("row_feedback", "output_fit")


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
class Method:
    """How weights come to their formats, whichever those are.

    error_feedback: columns not yet rounded make up for the errors of those that are; without it each weight goes to its
    nearest level. sequential: every block is calibrated on what the compressed blocks before it put out; without it on
    what the original's do. rotation: the model is rotated first, at every site that costs nothing at run time.
    down_rotation: so are the inputs of `down`, as the model runs; only with `rotation`. row_feedback: where outputs are
    hidden states, rows make up for each other's errors too, by gradients of the loss; only with `error_feedback`.
    output_fit: weights of such outputs are then fitted to what blocks lack of the original's, and rounded again; only
    with `error_feedback`.
    """

    error_feedback: bool = False
    sequential: bool = False
    rotation: bool = False
    down_rotation: bool = False
    row_feedback: bool = False
    output_fit: bool = False


@dataclass(frozen=True)
class Plan:
    """One BlockPlan per decoder block, MTP blocks last, the formats of embedding and head, and how to get there."""

    embed: str
    head: str
    blocks: tuple[BlockPlan, ...]
    method: Method = Method()


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for JSON or TOML; formats are lettered so that a thousand experts take a thousand
    characters, and survivors are written as ranges, `"0-5 7"`."""
    names = sorted(_format_names(plan))
    letter = {name: chr(ord("a") + n) for n, name in enumerate(names)}
    return {
        "formats": {letter[name]: name for name in names},
        "embed": letter[plan.embed],
        "head": letter[plan.head],
        "method": {name: own for name, own in asdict(plan.method).items() if own or name not in _NEW},
        "blocks": [_block_to_json(block, letter) for block in plan.blocks],
    }


def digest(plan: Plan) -> str:
    """A short text that no other plan has."""
    return hashlib.sha256(json.dumps(to_json(plan), sort_keys=True).encode()).hexdigest()[:16]


def from_json(raw: Mapping[str, Any]) -> Plan:
    """The inverse of `to_json`. Raises InputError where a key is missing or unknown or a value is no such value."""
    try:
        _require_keys("the plan", raw, {"formats", "embed", "head", "method", "blocks"})
        name = {letter: _format_name(own) for letter, own in raw["formats"].items()}
        blocks = tuple(_block_from_json(f"block {i} of the plan", block, name) for i, block in enumerate(raw["blocks"]))
        return Plan(name[raw["embed"]], name[raw["head"]], blocks, _method_from_json(raw["method"]))
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
        raw["keep"] = ranges(block.keep)
        raw["experts"] = {name: "".join(letter[own] for own in formats) for name, formats in block.experts.items()}
        raw["experts_per_token"] = block.experts_per_token
        raw["routing_scale"] = block.routing_scale
    return raw


def _format_name(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r} is no format")
    return raw


def _block_from_json(what: str, raw: Mapping[str, Any], name: Mapping[str, str]) -> BlockPlan:
    has_experts = "keep" in raw
    own_keys = {"formats", "keep", "experts", "experts_per_token", "routing_scale"} if has_experts else {"formats"}
    _require_keys(what, raw, own_keys)
    formats = {weight: name[own] for weight, own in raw["formats"].items()}
    if not has_experts:
        return BlockPlan(formats)
    keep = parse_ranges(raw["keep"])
    experts = {projection: tuple(name[own] for own in letters) for projection, letters in raw["experts"].items()}
    _require_keys(f"experts in {what}", experts, set(PROJECTIONS))
    for projection, own in experts.items():
        if len(own) != len(keep):
            raise InputError(
                f"{what} has {len(own)} formats for {projection}; one for each of {len(keep)} experts kept"
            )
    return BlockPlan(formats, keep, experts, operator.index(raw["experts_per_token"]), float(raw["routing_scale"]))


def _method_from_json(raw: Mapping[str, Any]) -> Method:
    _require_keys("method in the plan", {**dict.fromkeys(_NEW, False), **raw}, {own.name for own in fields(Method)})
    for name, value in raw.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} in the plan's method is {value!r}; true or false is accepted")
    method = Method(**raw)
    for name in _NEW:
        if getattr(method, name) and not method.error_feedback:
            raise InputError(f"the plan's method has {name} without error_feedback; both, or the latter, are accepted")
    if method.down_rotation and not method.rotation:
        raise InputError("the plan's method has down_rotation without rotation; both, or rotation alone, are accepted")
    return method


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: (0, 1, 2, 5) is `0-2 5`."""
    breaks = [n for n in range(1, len(numbers)) if numbers[n] != numbers[n - 1] + 1]
    runs = [(numbers[a], numbers[b - 1]) for a, b in pairwise([0, *breaks, len(numbers)])] if numbers else []
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """The inverse of `ranges`. Raises InputError for anything else than ascending ranges of at most six digits."""
    numbers: list[int] = []
    for part in text.split():
        if not (match := re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)):
            raise InputError(f"{part!r} in a list of experts is no number and no range; accepted are such as 7 and 0-5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (numbers and first <= numbers[-1]):
            raise InputError(f"{part!r} in a list of experts is out of order; experts are listed once each, ascending")
        numbers += range(first, last + 1)
    return tuple(numbers)


def _require_keys(what: str, raw: Mapping[str, Any], keys: set[str]) -> None:
    for key in sorted(keys ^ raw.keys()):
        problem = "is missing in" if key in keys else "is unknown in"
        raise InputError(f"{key!r} {problem} {what}; its keys are {', '.join(sorted(keys))}")
