"""The paper's allocation, of made-up bytes and costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.planning.fit import Problem
from moejax.planning.menus import Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.predict import LossCurves
from moejax.planning.raise_sensitive import raise_most_sensitive
from moejax.planning.solve import Choice, choice_bytes, menu_survivors
from plan_menus import CONFIG, EXPERTS, FORMATS, SIZES, made_up_costs, size_of

COSTS = made_up_costs()
KEEP = len(FORMATS) - 1


def tensors(choice: Choice) -> dict[str, tuple[int, int, float]]:
    """By name: the format's number, and what the tensor takes and costs in it and in the next larger."""
    found = {
        name: (int(f), int(COSTS.tensors.bytes_NF[n, f]), float(COSTS.tensors.cost_NF[n, f]))
        for n, (name, f) in enumerate(zip(COSTS.names, choice.tensor_N, strict=True))
    }
    for block, menu in COSTS.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        for name in PROJECTIONS:
            (f,) = set(choice.expert[block][name][kept].tolist())
            own = menu.menus[name]
            found[f"{block}.{name}"] = (f, int(own.bytes_NF[kept, f].sum()), float(own.cost_NF[kept, f].sum()))
    return found


def base_bytes(level: int) -> int:
    experts = sum(COSTS.experts[1].menus[name].bytes_NF[0, level] for name in PROJECTIONS)
    return sum(own[level] for own in SIZES.values()) + len(COSTS.experts) * 4 * int(experts)


@given(st.integers(0, base_bytes(KEEP) + 100))
def test_the_bytes_are_within_the_budget_and_nothing_more_sensitive_could_be_raised(budget: int) -> None:
    choice = raise_most_sensitive(COSTS, budget)
    if choice is None:
        assert budget < base_bytes(0)
        return
    size = choice_bytes(COSTS, choice)
    assert size <= budget
    base = max(level for level in range(KEEP) if base_bytes(level) <= budget)
    found = tensors(choice)
    assert all(f >= base for f, _, _ in found.values())
    assert set(choice.pruned.values()) == {2}
    for name, (f, own_bytes, _) in found.items():
        if f < KEEP:
            extra = own_bytes if not name.endswith("tiny") else 1  # formats double in bytes
            assert size + extra > budget, name


def test_the_most_sensitive_goes_first() -> None:
    """Costs are 1/bytes, so tensors of few bytes cost most; as it is `tiny` takes no more bytes than in 8 bits."""
    choice = raise_most_sensitive(COSTS, base_bytes(0) + 2)
    assert choice is not None
    found = tensors(choice)
    raised = {name for name, (f, _, _) in found.items() if f > 0}
    assert raised == {"layers.2.tiny"} and found["layers.2.tiny"][0] == KEEP


def test_a_format_that_may_not_be_used_is_passed_over() -> None:
    cost_NF = COSTS.tensors.cost_NF.copy()
    cost_NF[COSTS.names.index("head"), :2] = np.inf
    costs = Menus(COSTS.names, type(COSTS.tensors)(FORMATS, COSTS.tensors.bytes_NF, cost_NF), COSTS.experts, 3)
    choice = raise_most_sensitive(costs, base_bytes(0) + 600)
    assert choice is not None
    assert choice.tensor_N[costs.names.index("head")] == 2
    assert raise_most_sensitive(costs, base_bytes(0) + 599) is None


@pytest.mark.parametrize("metadata", [0, 100])
def test_the_fitted_plan_keeps_within_its_budget(metadata: int) -> None:
    problem = Problem(COSTS, LossCurves(), CONFIG, lambda plan: size_of(plan) + metadata)
    for budget in range(base_bytes(0) + metadata, base_bytes(KEEP), 97):
        fitted = problem.fit_raised(budget)
        assert fitted is not None and fitted.bytes == size_of(fitted.plan) + metadata <= budget
        assert [len(block.keep or ()) for block in fitted.plan.blocks] == [0, *[EXPERTS - 2] * 3]
    assert problem.fit_raised(base_bytes(0) + metadata - 1) is None
