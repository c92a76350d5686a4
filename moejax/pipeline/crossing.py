"""Many hidden states through one block: every slice of its experts is asked for, and changed, but once.

What differs between runs is the trunk that they enter by, where their tokens go, and which alternative of the experts
they meet. With one slice, runs go one after the other, so that what is within the block is there once; with more, as
many together as are to be.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import jax
import jax.numpy as jnp

from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import Kept
from moejax.model.moe import Experts, MoE
from moejax.model.rope import Angles
from moejax.model.sliced import Entered, SlicedBlock, enter, leave, onto
from moejax.model.steps import run_block

# What tells alternatives of a block's experts apart; the experts as they are have none.
Alternative = Hashable

# Of some experts, an alternative.
AlternativeOf = Callable[[Alternative], Experts]

# Of a slice of experts, and their numbers in the layer, the alternatives.
Alternatives = Callable[[Sequence[int], Experts], AlternativeOf]

# Hidden states within a block with experts; a dense block's output.
Inside = Entered | jax.Array


@dataclass(frozen=True)
class Run:
    """begin: goes as far as the routed experts, if there are any. end: takes that, and the sum over the experts (T, D),
    None in a dense block."""

    begin: Callable[[], Inside]
    end: Callable[[Inside, jax.Array | None], object]
    alternative: Alternative = None


def run_of(
    trunk: Callable[[], Block],
    x_BTD: Kept,
    by: Angles,
    end: Callable[[jax.Array], object],
    alternative: Alternative = None,
    scale: Callable[[], float] = lambda: 1.0,
) -> Run:
    """States x through a block with that trunk, made when the run begins; `end` takes what it puts out, the sum over
    experts times `scale`."""

    def begin() -> Inside:
        own, x = trunk(), jnp.asarray(x_BTD)
        return enter(own, x, by) if isinstance(own.mlp, MoE) else run_block(own, x, by)

    def ended(inside: Inside, routed_TD: jax.Array | None) -> None:
        if isinstance(inside, Entered):
            assert routed_TD is not None
            end(leave(inside, routed_TD if scale() == 1.0 else scale() * routed_TD))
        else:
            end(inside)

    return Run(begin, ended, alternative)


def unchanged(members: Sequence[int], experts: Experts) -> AlternativeOf:
    """The experts as they are, and no alternative."""
    return lambda alternative: experts


def cross(block: SlicedBlock, runs: Iterable[Run], alternatives: Alternatives, together: int) -> None:
    """Take runs through a block, in their order. `alternatives` is asked for every slice of the experts, or once where
    there is one. Where there are more, so many runs are on their way `together`, and the next ones read all slices
    anew."""
    if not block.is_moe:
        for run in runs:
            run.end(jax.block_until_ready(run.begin()), None)
    elif len(block.ranges) == 1:
        ((members, experts),) = block.slices()
        known = [(members, _last(alternatives(members, experts)))]
        for run in runs:
            _through([run], known)
    else:
        left = iter(runs)
        while some := list(islice(left, max(1, together))):
            _through(some, ((members, alternatives(members, experts)) for members, experts in block.slices()))


def _through(runs: Sequence[Run], slices: Iterable[tuple[Sequence[int], AlternativeOf]]) -> None:
    insides = []
    for run in runs:
        inside = run.begin()
        assert isinstance(inside, Entered)
        insides.append(inside)
    sums = [inside.nothing_TD for inside in insides]
    for members, of in slices:
        for alternative in dict.fromkeys(run.alternative for run in runs):
            experts = of(alternative)
            for n in [n for n, run in enumerate(runs) if run.alternative == alternative]:
                sums[n] = onto(experts, members, insides[n].normed_TD, insides[n].routing, sums[n])
            jax.block_until_ready(sums)
            del experts  # before the next ones are made
    for run, inside, routed_TD in zip(runs, insides, sums, strict=True):
        run.end(inside, routed_TD)


def _last(of: AlternativeOf) -> AlternativeOf:
    """The same, which remembers the experts as they are, and what it was asked for last."""
    kept: dict[Alternative, Experts] = {}

    def asked(alternative: Alternative) -> Experts:
        if alternative not in kept:
            for other in [own for own in kept if own is not None]:
                del kept[other]
            kept[alternative] = of(alternative)
        return kept[alternative]

    return asked
