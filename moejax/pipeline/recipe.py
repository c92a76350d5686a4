"""The recipe: the choices that a user makes before anything is measured, as a value read from TOML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from moejax.errors import InputError
from moejax.formats import GroupFormat, parse_group_format
from moejax.planning.plan import KEEP
from moejax.transforms.prune import CRITERIA

Groups = Literal["ragged", "equal"]
_DEFAULT_FORMATS: tuple[GroupFormat, ...] = tuple(
    parse_group_format(name) for name in ("int1g128", "ternaryg128", *(f"int{bits}g128" for bits in range(2, 9)))
)


@dataclass(frozen=True)
class Recipe:
    """What may be done to a model.

    formats: the candidates. min_bits_outer: the bits that embedding, head and the last layer's shared expert keep at
    least; min_bits_block: what other weights do, routed experts apart.
    criterion: by which experts are pruned, one of CRITERIA. protect_super_experts: whether experts with extreme outputs
    stay. groups: "ragged" prunes whichever experts a layer needs least; "equal" the same number in every routing group,
    which runtimes with equal groups need.
    share_kept: r, to keep ceil(r E) experts in every layer; None leaves the number to the solver, layer by layer.
    experts_per_token: "measured" tries several K'; "paper" takes round(r K) with the share r kept; or K' itself.
    fit_routing_scale: whether routing scales that are fitted layer by layer are tried too; formats of other programs
    may have no place for them.
    """

    formats: tuple[GroupFormat, ...] = _DEFAULT_FORMATS
    min_bits_outer: int = 4
    min_bits_block: int = 2
    criterion: str = "reap"
    protect_super_experts: bool = True
    groups: Groups = "ragged"
    share_kept: float | None = None
    experts_per_token: int | Literal["measured", "paper"] = "measured"
    fit_routing_scale: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The formats' names, KEEP last."""
        return (*(candidate.name for candidate in self.formats), KEEP)


def recipe_from_toml(raw: Mapping[str, Any], source: str) -> Recipe:
    """A recipe; missing keys have their defaults. Raises InputError naming a key or value that is not accepted."""
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(raw.keys() - known):
        raise InputError(f"{source}: {unknown[0]!r} is unknown in a recipe; its keys are {', '.join(sorted(known))}")
    for key, value in raw.items():
        holds, accepted = _ACCEPTED[key]
        if not holds(value):
            raise InputError(f"{source}: {key} is {value!r}; {accepted} is accepted")
    values = dict(raw)
    if "formats" in raw:
        values["formats"] = _formats(raw["formats"], source)
    return Recipe(**values)


def _formats(names: Sequence[str], source: str) -> tuple[GroupFormat, ...]:
    """Each once, by bits."""
    try:
        formats = {parse_group_format(name) for name in names}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return tuple(sorted(formats, key=lambda own: (own.bits, own.group_size)))


def _is_integer(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1024


def _is_bits(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 8


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_ACCEPTED: Mapping[str, tuple[Any, str]] = {
    "formats": (_are_names, 'a list of formats such as ["int2g128", "ternaryg128"]'),
    "min_bits_outer": (_is_bits, "1 to 8"),
    "min_bits_block": (_is_bits, "1 to 8"),
    "criterion": (CRITERIA.__contains__, f"one of {', '.join(CRITERIA)}"),
    "protect_super_experts": (lambda value: isinstance(value, bool), "true or false"),
    "groups": (("ragged", "equal").__contains__, "'ragged' or 'equal'"),
    "share_kept": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0 and at most 1"),
    "experts_per_token": (
        lambda value: value in ("measured", "paper") or _is_integer(value),
        "'measured', 'paper' or a positive integer",
    ),
    "fit_routing_scale": (lambda value: isinstance(value, bool), "true or false"),
}
