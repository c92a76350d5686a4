"""One decoder block that is measured: its weights' errors in every format, and what some spoil of its output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import Experts, MoE, Routing
from moejax.model.sliced import Entered, leave
from moejax.model.weights import PER_EXPERT
from moejax.pipeline.crossing import AlternativeOf, Inside, Run
from moejax.pipeline.options import allowed_counts, order_of_pruning, pruned_count
from moejax.pipeline.probes import PRUNED_SHARES, PRUNING, Change, family_of, probed_format
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.rounded import ExpertsInFormats, InFormats
from moejax.pipeline.sampled import Sampled
from moejax.pipeline.variants import Changed, Variants
from moejax.pipeline.working_copy import dense_experts
from moejax.sharding import ALONE, Crew
from moejax.transforms.prune import lost, masked_bias, pruning_error, pruning_scores, rerouted
from moejax.transforms.rounding import to_float32

# Of the probes' sequences one in so many, at least one, shows how much of an output is spoiled.
_ONE_IN = 4
# So many numbers of pruned experts are tried in a layer, spread evenly.
_PRUNED = 6

# Gives experts of a block, whose numbers in the layer these are, in every format, by projection.
ExpertsIn = Callable[[Sequence[int], Experts], Mapping[str, ExpertsInFormats]]


class Errors:
    """By weight, of every format, (F,), or of every expert and format, (E, F); experts come slice by slice. `tick` is
    called for every matrix, and as many experts as are rounded together; not where errors come from a sample.

    sampled: where errors come from a sample, what it tells; the sample of experts is known before the first slice.
    """

    def __init__(self, tick: Callable[[], object], sampled: Sampled | None):
        self._tick, self._sampled = tick, sampled
        self._relative: dict[str, Any] = {}
        self._found: dict[str, list[Any]] = {}
        self._seen: set[int] = set()

    @property
    def are_sampled(self) -> bool:
        return self._sampled is not None

    def add(self, weights: Mapping[str, InFormats]) -> None:
        """Of matrices outside the routed experts, by name."""
        for own, weight in weights.items():
            if self._sampled is None:
                self._tick()
                self._found[own] = weight.errors().tolist()
            else:
                self._found[own] = self._sampled.errors(weight).tolist()
                self._relative[own] = self._sampled.relative[weight.name].tolist()

    def look_at(self, weights: Mapping[str, ExpertsInFormats]) -> None:
        """At a sample of a layer's experts, by projection."""
        assert self._sampled is not None
        for own, weight in weights.items():
            self._sampled.look_at_experts(weight)
            self._relative[own] = self._sampled.relative[weight.of.name].tolist()

    def add_slice(self, members: Sequence[int], weights: Mapping[str, ExpertsInFormats]) -> None:
        """Of some experts by projection, unless they have been added: slices rise, and may come anew."""
        if members[0] not in self._seen:
            self._seen.add(members[0])
            for own, weight in weights.items():
                self._found.setdefault(own, []).extend(self._of_experts(weight).tolist())

    def _of_experts(self, weight: ExpertsInFormats) -> np.ndarray:
        if self._sampled is None:
            return weight.errors(self._tick)
        return self._sampled.expert_errors(weight)

    def measured(self) -> dict[str, dict[str, Any]]:
        """As JSON holds them."""
        return {"errors": self._found, "relative": self._relative}


class MeasuredLayer:
    """A decoder block that is measured: what its weights are in every format, and what it puts out with some of them.

    weights: of its trunk, which is dense. in_formats: gives some of its experts in every format. errors: where those of
    its experts are added. crew: whose first process's scores count, by which experts are pruned.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Mapping[str, InFormats],
        trunk: Block,
        variants: Variants,
        statistics: BlockStatistics,
        in_formats: ExpertsIn,
        errors: Errors,
        crew: Crew = ALONE,
    ):
        self.errors, self._crew = errors, crew
        self._recipe, self._weights, self._trunk, self._variants = recipe, weights, trunk, variants
        self._statistics, self._in_formats = statistics, in_formats
        self._spoiled: dict[str, float] = {}
        self._pruned: list[Any] = []
        self._compared = max(1, len(variants.tokens_BT) // _ONE_IN)
        self._pruned_on = self._compared if errors.are_sampled else len(variants.tokens_BT)

    def measures(self) -> dict[str, Any]:
        """`BlockMeasures`, as JSON holds it, once all runs have ended."""
        return {
            **self.errors.measured(),
            "spoiled": self._spoiled,
            **self._scores,
            "pruned": self._pruned,
        }

    def alternatives(self, members: Sequence[int], experts: Experts) -> AlternativeOf:
        """Of some experts: those in which projections, by their names, are in formats, by their numbers."""
        experts = dense_experts(experts)  # once for all alternatives
        weights = self._in_formats(members, experts)
        self.errors.add_slice(members, weights)

        def of(alternative: Any) -> Experts:
            new = {own.rpartition(".")[2]: weights[own].rounded(f) for own, f in alternative or ()}
            return dense_experts(experts, new) if new else experts

        return of

    def runs(self) -> Iterator[Run]:
        """Of a few sequences with one weight, or a projection of all experts, in the format of its family's probes; and
        with experts pruned, of all, or of those few where errors come from a sample."""
        x_BTD, formats = self._variants.original[: self._compared], self._recipe.formats
        for own in [*self._weights, *self._projections] if formats else []:
            change = self._rounded([own], probed_format(family_of(own), formats))
            yield self._variants.run(x_BTD, change, self._trunk, partial(self._spoil, own))
        if isinstance(self._trunk.mlp, MoE):
            for count in tried_counts(self._allowed):
                yield from self._pruning(count, self._trunk.mlp)

    def changed(self, index: int, changes: Sequence[Change]) -> Iterator[tuple[str, Changed]]:
        """What every variant that has another block in its place has there."""
        for change in changes:
            if index not in change.layers:
                continue
            if PRUNING in change.families:
                if isinstance(self._trunk.mlp, MoE):
                    yield change.name, Changed(partial(self._masked, pruned_count(self._allowed, change.level)))
                continue
            own = [name for name in (*self._weights, *self._projections) if family_of(name) in change.families]
            if own:
                yield change.name, self._rounded(own, int(change.level))

    @property
    def _projections(self) -> list[str]:
        """The routed experts' weights, by their names in the block."""
        return [row.name for row in PER_EXPERT if row.role == "routed experts"] if self._statistics.experts else []

    def _rounded(self, names: Sequence[str], f: int) -> Changed:
        """Those weights in format number f."""
        of_experts = tuple((own, f) for own in names if own not in self._weights)
        of_trunk = [own for own in names if own in self._weights]

        def trunk() -> Block:
            return self._trunk.with_leaves({own: to_float32(self._weights[own].rounded(f)) for own in of_trunk})

        return Changed(trunk if of_trunk else None, of_experts or None)

    def _spoil(self, own: str, y_BTD: jax.Array) -> None:
        self._spoiled[own] = float(_spoiled(self._variants.output[: self._compared], y_BTD))

    def _pruning(self, count: int, mlp: MoE) -> Iterator[Run]:
        """Of so many experts pruned: what is lost, then where that goes instead."""
        pruned_E = jnp.isin(jnp.arange(mlp.num_experts), self._order[:count])
        found: dict[str, jax.Array] = {}

        def original() -> Entered:
            assert isinstance(self._variants.within, Entered)
            return _first(self._variants.within, self._pruned_on)

        def by(route: Callable[[Entered], Routing]) -> Entered:
            return original()._replace(routing=route(original()))

        def keep_lost(inside: Inside, lost_TD: jax.Array | None) -> None:
            assert lost_TD is not None
            found["lost"] = lost_TD

        def end(inside: Inside, rerouted_TD: jax.Array | None) -> None:
            own, y_TD = original(), self._variants.routed_TD
            assert y_TD is not None and rerouted_TD is not None
            error = pruning_error(own.routing, pruned_E, y_TD[: len(rerouted_TD)], found["lost"], rerouted_TD)
            y_BTD, other_BTD = (own[: self._compared] for own in (self._variants.output, leave(inside, rerouted_TD)))
            self._pruned.append((count, list(map(float, error)), float(_spoiled(y_BTD, other_BTD))))

        yield Run(lambda: by(lambda own: _lost(own.routing, pruned_E)), keep_lost)
        yield Run(lambda: by(lambda own: _rerouted(mlp, own.normed_TD, pruned_E)), end)

    def _masked(self, count: int) -> Block:
        """The trunk whose tokens go past so many experts."""
        mlp = self._trunk.mlp
        assert isinstance(mlp, MoE)
        pruned_E = np.isin(np.arange(mlp.num_experts), self._order[:count])
        return self._trunk.with_leaves({"mlp.bias": masked_bias(mlp.bias.get_value(), pruned_E)})

    @cached_property
    def _scores(self) -> dict[str, Any]:
        found: dict[str, Any] = self._crew.told(scores_of(self._statistics, self._recipe))
        return found

    @cached_property
    def _order(self) -> np.ndarray:
        return order_of_pruning(np.asarray(self._scores["scores_E"]), self._trunk.config, self._recipe)

    @cached_property
    def _allowed(self) -> np.ndarray:
        return allowed_counts(self._order, self._trunk.config, self._recipe)


def _first(within: Entered, count: int) -> Entered:
    """Of so many sequences."""
    x_BTD = within.x_BTD[:count]
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    by_token = within.normed_TD, within.routing, within.shared_TD
    return Entered(x_BTD, *jax.tree.map(lambda own: own[:tokens], by_token))


# For every choice of experts one program.
_lost, _rerouted = jax.jit(lost), jax.jit(rerouted)


def tried_counts(allowed: np.ndarray) -> list[int]:
    """The numbers of experts that pruning is tried at, those of the probes among them; rising, without 0."""
    counts = np.flatnonzero(np.isfinite(allowed))
    counts = counts[counts > 0]
    spread = counts[np.linspace(0, len(counts) - 1, min(_PRUNED, len(counts))).round().astype(int)]
    return sorted({*spread.tolist(), *(pruned_count(allowed, share) for share in PRUNED_SHARES)} - {0})


def scores_of(statistics: BlockStatistics, recipe: Recipe) -> dict[str, Any]:
    """By which a block's experts are pruned, and their largest outputs, as JSON holds them; None without experts."""
    experts = statistics.experts
    if experts is None:
        return {"scores_E": None, "peak_E": None}
    scores_E = pruning_scores(experts, recipe.criterion)
    return {"scores_E": scores_E.tolist(), "peak_E": np.asarray(experts.peak_E, np.float64).tolist()}


@jax.jit
def _spoiled(y_BTD: jax.Array, other_BTD: jax.Array) -> jax.Array:
    error_BT, whole_BT = (jnp.sum(own**2, axis=-1) for own in (other_BTD - y_BTD, y_BTD))
    return jnp.mean(error_BT / jnp.maximum(whole_BT, 1e-30))
