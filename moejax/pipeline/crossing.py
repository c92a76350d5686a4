"""Many hidden states through one block: every slice of its experts is asked for, and changed, but once.

What differs between runs is the trunk that they enter by, where their tokens go, and which alternative of the experts
they meet. With one slice, runs go one after the other, so that what is within the block is there once; with more, as
many together as are to be, and those that meet the same experts as one.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import jax
import jax.numpy as jnp

from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import Keep, Kept, as_it_is
from moejax.model.moe import Experts, MoE, Routing, wide_dtype
from moejax.model.rope import Angles
from moejax.model.sliced import Entered, SlicedBlock, enter, leave, onto, there
from moejax.model.steps import run_block

# Runs that go through a slice as one, at most: 8 of DeepSeek-V3's on 2048 tokens are 400 rows an expert.
_PARTY = 8

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


def cross(
    block: SlicedBlock, runs: Iterable[Run], alternatives: Alternatives, together: int, kept: Keep = as_it_is
) -> None:
    """Take runs through a block, in their order. `alternatives` is asked for every slice of the experts, or once where
    there is one. Where there are more, so many runs are on their way `together`, what their experts do not take put
    away by `kept`, and the next ones read all slices anew."""
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
            slices = ((members, alternatives(members, experts)) for members, experts in block.slices())
            _through(some, slices, kept)


def _through(runs: Sequence[Run], slices: Iterable[tuple[Sequence[int], AlternativeOf]], kept: Keep = as_it_is) -> None:
    insides = []
    for run in runs:
        inside = run.begin()
        assert isinstance(inside, Entered)
        insides.append(inside._replace(x_BTD=kept(inside.x_BTD), shared_TD=kept(inside.shared_TD)))
        del inside
    parties = _parties(runs, insides)
    for members, of in slices:
        for alternative in dict.fromkeys(run.alternative for run in runs):
            experts = of(alternative)
            own = [party for party in parties if runs[party.places[0]].alternative == alternative]
            for party in own:
                party.meet(experts, members)
            jax.block_until_ready([party.routed_TD for party in own])
            del experts  # before the next ones are made
    party_of = {place: party for party in parties for place in party.places}
    for n, (run, inside) in enumerate(zip(runs, insides, strict=True)):
        run.end(there(inside), party_of[n].of(n))


class _Party:
    """Runs, by their places among all, that meet the same experts, as one of all their tokens: a slice's products are
    of more rows, and each row is what it is alone: on a CPU to the last bit, if an expert has sixteen rows or more."""

    def __init__(self, places: Sequence[int], insides: Sequence[Entered]):
        self.places, self._size = places, len(insides[0].normed_TD)
        self._normed_TD: jax.Array = _joined([own.normed_TD for own in insides])
        self._routing: Routing = jax.tree.map(lambda *own: _joined(own), *(own.routing for own in insides))
        self.routed_TD = jnp.zeros_like(self._normed_TD, wide_dtype(self._normed_TD))

    def meet(self, experts: Experts, members: Sequence[int]) -> None:
        self.routed_TD = onto(experts, members, self._normed_TD, self._routing, self.routed_TD)

    def of(self, place: int) -> jax.Array:
        """The sum over experts of one of its runs."""
        start = self.places.index(place) * self._size
        return self.routed_TD[start : start + self._size] if self.places[1:] else self.routed_TD


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(arrays) if arrays[1:] else arrays[0]


def _parties(runs: Sequence[Run], insides: list[Entered]) -> list[_Party]:
    """As many runs each as is a power of two, so that their shapes are few. What goes to the experts is moved there."""
    alike: dict[tuple[Alternative, tuple[int, ...]], list[int]] = {}
    for n, (run, inside) in enumerate(zip(runs, insides, strict=True)):
        alike.setdefault((run.alternative, inside.routing.experts_TK.shape), []).append(n)
    parties = []
    for left in alike.values():
        while left:
            size = min(_PARTY, 1 << (len(left).bit_length() - 1))
            some, left = left[:size], left[size:]
            parties.append(_Party(some, [insides[n] for n in some]))
            for n in some:
                insides[n] = insides[n]._replace(normed_TD=insides[n].normed_TD[:0])
    return parties


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
