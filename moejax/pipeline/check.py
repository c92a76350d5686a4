"""What is refused before the main job begins."""

from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError, note
from moejax.pipeline.activated_experts import candidates
from moejax.pipeline.fit_device import Device, check_device
from moejax.pipeline.options import options
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.shapes import shapes_of
from moejax.planning import Plan
from moejax.planning.fit import Problem, check_budget, sentence_of
from moejax.planning.plan import ranges
from moejax.planning.predict import LossCurves

# What decides how large a plan is: the bytes of its folder, or what is to decode it.
Limit = int | Device


def require_original(checkpoint: object) -> HuggingFaceCheckpoint:
    """The checkpoint, if it is one that can be compressed; InputError if it has been already."""
    if not isinstance(checkpoint, HuggingFaceCheckpoint):
        raise InputError("the checkpoint is compressed already; compress takes an original Hugging Face checkpoint")
    return checkpoint


def check_limit(checkpoint: HuggingFaceCheckpoint, limit: Limit, recipe: Recipe) -> int:
    """About the bytes that a plan's folder takes at most. Raises InputError if the recipe does not suit the model, or
    the limit cannot be met or is none, before any work: shapes alone decide. A note names weights that have no
    format."""
    shapes = shapes_of(checkpoint, recipe.method)
    config = shapes.config
    candidates(recipe, config, [config.n_routed_experts] * config.num_hidden_layers)
    problem = Problem(
        options(shapes.model, recipe),
        LossCurves(),
        config,
        shapes.size_of,
        method=recipe.method,
        multiple=recipe.bucket_multiple,
    )
    smallest = problem.smallest()
    size = smallest.bytes + _scattering_bytes(smallest.plan, config.n_routed_experts)
    without_format = problem.costs.without_format
    if isinstance(limit, Device):
        least = check_device(limit, problem, shapes)
        most = size + limit.memory - least.total
    else:
        check_budget(size, limit, folder_bytes(checkpoint.path), without_format)
        most = limit
    if without_format:
        note(sentence_of(without_format))
    return most


def check_plan_bytes(checkpoint: HuggingFaceCheckpoint, plan: Plan, budget: int | None) -> int:
    """The exact bytes of a given plan's folder, or the budget if there is one. Raises InputError if the plan does not
    suit the model, or is over the budget."""
    size = shapes_of(checkpoint, plan.method).size_of(plan)
    if budget is not None and size > budget:
        raise InputError(f"the plan takes {size} bytes; the budget is {budget}, a plan that fits it is needed")
    return size if budget is None else budget


def _scattering_bytes(plan: Plan, experts: int) -> int:
    """By how much a plan's lists of survivors can grow at most while which experts survive is not measured yet.

    m pruned experts leave at most m + 1 ranges, each of at most two numbers.
    """
    more = 0
    for keep in (block.keep for block in plan.blocks if block.keep is not None):
        numbers = min(len(keep), 2 * (experts - len(keep) + 1))
        more += numbers * len(f"{experts - 1} ") - 1 - len(ranges(keep))
    return more
