"""The plan of a model from its config alone: no weights, exact bytes.

Bytes come from the same shapes as in `compress`; only what a plan costs is estimated (see `estimate`) where `compress`
measures it.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.hf_config import without_mtp
from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.summary import summarize
from moejax.errors import InputError, note
from moejax.formats import byte_parts, payload_bytes
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.pipeline.activated_experts import candidates
from moejax.pipeline.check import Limit
from moejax.pipeline.estimate import ESTIMATED_CURVES, criterion_of, estimate_costs
from moejax.pipeline.fit_device import Device, context_for, fit_device
from moejax.pipeline.forecast import Forecast, Split, layer_forecasts
from moejax.pipeline.options import limited_counts, options
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.shapes import Shapes, copied_files, shapes_for
from moejax.planning.allocate import smallest_choice
from moejax.planning.expert_scores import ExpertScores, equal_scores, expert_scores_from_json
from moejax.planning.fit import PRUNING_WEIGHTS, Problem, check_budget, sentence_of
from moejax.planning.memory import device_memory
from moejax.planning.menus import Menus
from moejax.planning.parameters import count_parameters
from moejax.planning.plan import PROJECTIONS
from moejax.planning.sensitivity import Sensitivity, sensitivity_from_json
from moejax.planning.size import parse_budget, parse_size
from moejax.planning.solve import Choice, choice_bytes, choice_losses, menu_survivors
from moejax.resources import config_path

# Rounds in which the price of pruning is refined, two solves each.
_REFINEMENTS = 3
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def plan(
    config: str | Path,
    budget: str | int | None = None,
    *,
    fit: str | int | None = None,
    expert_scores: Path | str | None = None,
    context: int | None = None,
    batch: int = 1,
    recipe: Recipe | None = None,
    drop_mtp: bool = False,
) -> Forecast:
    """Plan a model for a budget and say what it would cost.

    Args:
      config: the name of a model that comes with moejax (deepseek_v3, kimi_k2, moonlight_16b_a3b), or a Hugging Face
        config file; tokenizer files beside it are counted, as `compress` copies them.
      budget: bytes of the whole output folder, or a text such as "103GB" or "6x"; without it, as many as `fit` allows.
      fit: memory of the device that is to decode the result, in bytes or as a text.
      expert_scores: routing statistics (see `planning.expert_scores`); without it those that come with moejax for a
        model of that name, and where there are none all experts are taken to be alike.
      context: tokens of every sequence that it decodes; without it 4096, or the model's limit. batch: sequences.
      recipe: what may be done; without it the default recipe.
      drop_mtp: leave MTP blocks out; budgets such as "6x" are still of the original with them.

    Raises InputError for what cannot be read or met.
    """
    outlook = read_outlook(config, expert_scores, recipe or Recipe(), drop_mtp)
    memory = parse_size(fit) if isinstance(fit, str) else fit
    size = parse_budget(budget, outlook.elements) if isinstance(budget, str) else budget
    return forecast(outlook, size, memory, context_for(context, batch, outlook.config), batch)


@dataclass(frozen=True)
class Outlook:
    """A model in shapes alone, with what is known of it, and the solver's problem; budgets can share it.

    original: with the MTP blocks that `shapes` may lack. unlimited: costs whatever number of experts is pruned.
    smallest: bytes of the smallest plan.
    """

    shapes: Shapes
    original: DeepseekV3
    recipe: Recipe
    scores: ExpertScores
    sensitivity: Sensitivity
    unlimited: Menus
    problem: Problem
    smallest: int

    @property
    def config(self) -> Config:
        return self.shapes.config

    @property
    def elements(self) -> int:
        """Numbers of the original checkpoint."""
        return num_elements(self.original.config)

    @property
    def dropped_mtp(self) -> int:
        """How many MTP blocks are left out."""
        return self.original.config.num_blocks - self.config.num_blocks


def read_outlook(
    config: str | Path, expert_scores: Path | str | None, recipe: Recipe, drop_mtp: bool = False
) -> Outlook:
    """Read what `plan` is given by name."""
    name = str(config)
    is_file = name.endswith(".json")
    file = Path(config) if is_file else config_path("models", name)
    raw_config = read_json_object(file)
    original = model = abstract_original(raw_config, str(file))
    if drop_mtp:
        raw_config = without_mtp(raw_config)
        model = abstract_original(raw_config, str(file))
    shapes = shapes_for(model, recipe.method, raw_config, copied_files(file.parent) if is_file else [])
    return outlook_for(original, shapes, recipe, _read_scores(name, expert_scores, shapes.config), _read_sensitivity())


def plan_by_scores(
    original: DeepseekV3, shapes: Shapes, recipe: Recipe, scores: ExpertScores, limit: Limit
) -> Forecast:
    """The plan of a checkpoint in shapes alone, by expert scores and what is known of other models' sensitivity, and
    what it is expected to cost. Raises InputError as `plan`."""
    outlook = outlook_for(original, shapes, recipe, scores, _read_sensitivity())
    if isinstance(limit, Device):
        return forecast(outlook, None, limit.memory, limit.context, limit.batch)
    return forecast(outlook, limit, None, context_for(None, 1, outlook.config), 1)


def outlook_for(
    original: DeepseekV3, shapes: Shapes, recipe: Recipe, scores: ExpertScores, sensitivity: Sensitivity
) -> Outlook:
    """The problem of a model in shapes alone. Raises InputError if the recipe does not suit it."""
    config = shapes.config
    candidates(recipe, config, [config.n_routed_experts])
    unlimited = estimate_costs(options(shapes.model, recipe), shapes.model, recipe, scores, sensitivity)
    costs = limited_counts(unlimited, config, recipe)
    problem = Problem(
        costs,
        ESTIMATED_CURVES,
        config,
        shapes.size_of,
        partial(_per_token, recipe, config),
        method=recipe.method,
        multiple=recipe.bucket_multiple,
    )
    smallest = problem.smallest()
    problem = replace(problem, overhead=smallest.bytes - choice_bytes(costs, smallest_choice(costs)))
    return Outlook(shapes, original, recipe, scores, sensitivity, unlimited, problem, smallest.bytes)


def _per_token(recipe: Recipe, config: Config, kept: int) -> int:
    """K' of a layer that keeps so many experts: of those that the recipe lets be tried, the most."""
    return max(own[0] for own in candidates(recipe, config, [kept]))


def _read_sensitivity() -> Sensitivity:
    known = config_path("sensitivity", "deepseek_v3")
    return sensitivity_from_json(read_json_object(known), str(known))


def _read_scores(name: str, given: Path | str | None, config: Config) -> ExpertScores:
    if given is not None:
        return expert_scores_from_json(read_json_object(Path(given)), config, str(given))
    try:
        known = config_path("expert_scores", name)
    except InputError:
        return equal_scores(config)
    return expert_scores_from_json(read_json_object(known), config, str(known))


def forecast(outlook: Outlook, budget: int | None, memory: int | None, context: int, batch: int) -> Forecast:
    """Solve for a budget, or without one for a device's memory, and put the figures together."""
    without_format = outlook.problem.costs.without_format
    if budget is not None:
        check_budget(outlook.smallest, budget, payload_bytes(outlook.original), without_format)
        found = _forecast(outlook, budget, context, batch)
    elif memory is not None:
        device = Device(memory, context, batch)

        def planned(problem: Problem, room: int) -> Forecast:
            return _forecast(replace(outlook, problem=problem), room, context, batch)

        found = fit_device(device, outlook.problem, outlook.shapes, planned, lambda own: own.memory)
    else:
        raise InputError("neither --budget nor --fit is given; a budget such as 103GB or a device's memory is needed")
    if without_format:
        note(sentence_of(without_format))
    return replace(found, budget=budget, memory_limit=memory)


def _forecast(outlook: Outlook, budget: int, context: int, batch: int) -> Forecast:
    problem = outlook.problem
    if outlook.recipe.allocation == "raise":
        fitted = problem.fit_raised(budget) or problem.smallest()
    else:
        fitted = problem.fit(budget, _best_pruning_weight(problem, budget)) or problem.smallest()
    compressed = outlook.shapes.compressed(fitted.plan)
    leaves = named_leaves(compressed)
    return Forecast(
        plan=fitted.plan,
        config=outlook.config,
        budget=None,
        elements=outlook.elements,
        dropped_mtp=outlook.dropped_mtp,
        before=count_parameters(outlook.shapes.model),
        after=count_parameters(compressed),
        kinds=tuple(summarize(leaves.items())),
        bytes=outlook.shapes.bytes_of(fitted.plan),
        parts=byte_parts(list(leaves.values())),
        layers=layer_forecasts(fitted.plan, outlook.config, outlook.scores),
        memory=device_memory(compressed, context, batch),
        memory_limit=None,
        losses=fitted.losses,
        predicted=problem.predicted(fitted.losses),
        splits=tuple(split(outlook, budget, share) for share in SHARES),
        pruned_by=criterion_of(outlook.recipe),
        scores_source=outlook.scores.source,
        sensitivity_source=outlook.sensitivity.source,
        without_format=problem.costs.without_format,
    )


def split(outlook: Outlook, budget: int, share: float) -> Split:
    """The solver's plan that keeps this share of each layer's experts, for so many bytes of what the problem counts."""
    try:
        costs = limited_counts(outlook.unlimited, outlook.config, replace(outlook.recipe, share_kept=share))
    except InputError:  # routing needs more experts than the share leaves
        return Split(share, None, None, None)
    problem = replace(outlook.problem, costs=costs)
    solved = problem.solve(budget - problem.overhead, 1.0)
    if solved is None:
        return Split(share, None, None, None)
    losses = choice_losses(costs, solved[0])
    return Split(share, _expert_bits(costs, solved[0], outlook.config), losses, problem.predicted(losses))


def _best_pruning_weight(problem: Problem, budget: int) -> float:
    """The price of pruning whose plan is predicted to lose least, looked for ever closer around the best so far."""
    predicted = {own: _predicted(problem, budget, own) for own in PRUNING_WEIGHTS}
    for _ in range(_REFINEMENTS):
        best = min(predicted, key=predicted.__getitem__)
        if np.isinf(best):
            return best
        known = sorted(own for own in predicted if np.isfinite(own))
        place = known.index(best)
        for neighbour in {known[max(place - 1, 0)], known[min(place + 1, len(known) - 1)]} - {best}:
            between = float(np.sqrt(best * neighbour))
            predicted[between] = _predicted(problem, budget, between)
    return min(predicted, key=predicted.__getitem__)


def _predicted(problem: Problem, budget: int, pruning_weight: float) -> float:
    solved = problem.solve(budget - problem.overhead, pruning_weight)
    return float("inf") if solved is None else problem.predicted(choice_losses(problem.costs, solved[0]))


def _expert_bits(costs: Menus, choice: Choice, config: Config) -> float:
    """Bits per weight of the experts kept."""
    size = kept = 0
    for block, menu in costs.experts.items():
        survivors = menu_survivors(menu, choice.pruned[block])
        kept += len(survivors)
        for name in PROJECTIONS:
            size += int(np.sum(menu.menus[name].bytes_NF[survivors, choice.expert[block][name][survivors]]))
    return 8 * size / (kept * len(PROJECTIONS) * config.hidden_size * config.moe_intermediate_size)
