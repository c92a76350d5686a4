"""The recipe: the choices that a user makes before anything is measured, as a value read from TOML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from moejax.errors import InputError
from moejax.formats import Format, parse_format
from moejax.planning.plan import KEEP, Method
from moejax.transforms.prune import CRITERIA

Groups = Literal["ragged", "equal"]
_DEFAULT_FORMATS: tuple[Format, ...] = tuple(
    parse_format(name) for name in ("int1g128", "ternaryg128", *(f"int{bits}g128" for bits in range(2, 9)))
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
    error_feedback: whether columns not yet rounded make up for the errors of those that are: better, and slower.
    row_feedback: whether rows do too, where outputs are hidden states, by gradients of the loss; it needs
    error_feedback, and a block whole in memory.
    output_fit: whether weights of such outputs are then fitted to what blocks lack of the original's, when the plan
    that was chosen is carried out; it needs error_feedback.
    rotation: whether the model is rotated first, at every site that costs nothing at run time; down_rotation: whether
    the inputs of `down` are too, which costs a little.
    allocation: "solve" finds the formats of least predicted loss, weight by weight and expert by expert; "raise" gives
    all tensors one and raises the most sensitive, as the paper does; it needs share_kept.
    sequential: whether every block is calibrated on what the compressed blocks before it put out, when the plan that
    was chosen is carried out.
    experts_per_token: "measured" tries several K'; "paper" takes round(r K) with the share r kept; or K' itself.
    fit_routing_scale: whether routing scales that are fitted layer by layer are tried too; formats of other programs
    may have no place for them.
    bucket_multiple: m, to keep a multiple of m experts in every layer, or all, and in each of their projections as many
    in every format (see `bucket_counts`): devices that compile for every size of array compile less.
    prices: "whole" rounds every weight to every format to know what each costs, "sampled" some (see `sampled`), and
    "by size" does as the model's size asks for.
    """

    formats: tuple[Format, ...] = _DEFAULT_FORMATS
    min_bits_outer: int = 4
    min_bits_block: int = 2
    criterion: str = "reap"
    protect_super_experts: bool = True
    groups: Groups = "ragged"
    share_kept: float | None = None
    experts_per_token: int | Literal["measured", "paper"] = "measured"
    fit_routing_scale: bool = True
    error_feedback: bool = False
    sequential: bool = False
    allocation: Literal["solve", "raise"] = "solve"
    rotation: bool = False
    down_rotation: bool = False
    bucket_multiple: int = 1
    prices: Literal["by size", "whole", "sampled"] = "by size"
    row_feedback: bool = False
    output_fit: bool = False

    @property
    def method(self) -> Method:
        """How a plan's weights come to their formats."""
        return Method(**{own.name: getattr(self, own.name) for own in fields(Method)})

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
    recipe = Recipe(**values)
    for key in ("row_feedback", "output_fit"):
        if getattr(recipe, key) and not recipe.error_feedback:
            raise InputError(
                f"{source}: {key} is true and error_feedback is not; both, or the latter alone, are accepted"
            )
    if recipe.down_rotation and not recipe.rotation:
        raise InputError(f"{source}: down_rotation is true and rotation is not; both, or rotation alone, are accepted")
    if recipe.allocation == "raise" and recipe.share_kept is None:
        raise InputError(
            f"{source}: allocation is 'raise', which prunes as share_kept says, and that is missing; a share above 0, "
            "at most 1, is accepted"
        )
    return recipe


def _formats(names: Sequence[str], source: str) -> tuple[Format, ...]:
    """Each once, by bits."""
    try:
        formats = {parse_format(name) for name in names}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return tuple(sorted(formats, key=lambda own: (own.bits, own.group_size, own.name)))


def _is_integer(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1024


def _is_bits(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 8


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_ACCEPTED: Mapping[str, tuple[Any, str]] = {
    "formats": (_are_names, 'a list of formats such as ["int2g128", "ternaryg128"]'),
    "min_bits_outer": (_is_bits, "1 to 8"),
    "min_bits_block": (_is_bits, "1 to 8"),
    "criterion": (CRITERIA.__contains__, f"one of {', '.join(CRITERIA)}"),
    "protect_super_experts": (_is_bool, "true or false"),
    "groups": (("ragged", "equal").__contains__, "'ragged' or 'equal'"),
    "share_kept": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0 and at most 1"),
    "experts_per_token": (
        lambda value: value in ("measured", "paper") or _is_integer(value),
        "'measured', 'paper' or a positive integer",
    ),
    "fit_routing_scale": (_is_bool, "true or false"),
    "error_feedback": (_is_bool, "true or false"),
    "row_feedback": (_is_bool, "true or false"),
    "output_fit": (_is_bool, "true or false"),
    "sequential": (_is_bool, "true or false"),
    "rotation": (_is_bool, "true or false"),
    "down_rotation": (_is_bool, "true or false"),
    "bucket_multiple": (_is_integer, "1 to 1024"),
    "prices": (("by size", "whole", "sampled").__contains__, "'by size', 'whole' or 'sampled'"),
    "allocation": (("solve", "raise").__contains__, "'solve' or 'raise'"),
}
