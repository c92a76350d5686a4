"""What is measured of a model: one walk over its blocks, of each of which a few kilobytes are kept.

Of every block: the error that every format makes of every weight's outputs, rounded as it will be if the plan says so;
how much of the block's own output one format of each weight spoils, and so many experts pruned. Variants of the model
(`probes`) go along; their true KL divergence says in the end what spoiled outputs cost. `prices` puts it together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics
from moejax.formats import Leaf
from moejax.model import Config, Layout, named_leaves
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Weight
from moejax.model.moe import MoE
from moejax.model.source import Source, Step, walk
from moejax.model.steps import run_block
from moejax.model.weights import IN_BLOCK, row_of
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.measured import Measured, block_measures
from moejax.pipeline.options import allowed_counts, order_of_pruning, pruned_count
from moejax.pipeline.probes import PRUNED_SHARES, PRUNING, Change, changes_of, family_of, probed_format
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.rounded import ExpertsInFormats, InFormats, block_in_formats
from moejax.pipeline.variants import Variants
from moejax.pipeline.work import Work
from moejax.pipeline.working_copy import dense_block, with_leaves
from moejax.planning import BlockPlan
from moejax.progress import Progress, counted
from moejax.transforms.compress import embedding_inputs
from moejax.transforms.compress_block import Rounder, experts_together
from moejax.transforms.on_the_way import StatisticsOnTheWay
from moejax.transforms.prune import masked_bias, pruning_error, pruning_scores

_STAGE = "measuring"
# Of the probes' sequences one in so many, at least one, shows how much of an output is spoiled.
_ONE_IN = 4
# So many numbers of pruned experts are tried in a layer, spread evenly.
_PRUNED = 6


def measure(
    source: Source,
    recipe: Recipe,
    calibrated: Calibrated,
    statistics: Callable[[], StatisticsOnTheWay],
    rounder: Rounder,
    work: Work,
    progress: Progress,
) -> Measured:
    """Walk over what is compressed; probes are made on the chunks held out. What the work knows is not measured again.

    A recipe without formats measures pruning alone. Raises InputError where a weight, an output or a divergence is not
    finite.
    """
    config = source.config
    step = _Measuring(config, recipe, calibrated, rounder, work)
    if not work.knows(_name("divergences")):
        with counted(progress, _steps(config), "measuring") as tick:
            step.begin(statistics(), tick)
            walk(source, step, mtp=config.num_nextn_predict_layers, head=True)
    work.drop_states(_STAGE)
    return step.measured()


def _name(part: str | int) -> str:
    return f"measures of block {part}" if isinstance(part, int) else f"measures of {part}"


class _Measuring(Step):
    def __init__(self, config: Config, recipe: Recipe, calibrated: Calibrated, rounder: Rounder, work: Work):
        self.config, self.recipe, self.rounder, self.work = config, recipe, rounder, work
        self.tokens_C = np.bincount(calibrated.chunks.reshape(-1), minlength=config.vocab_size)
        self.changes = changes_of(config, recipe.formats)
        self.variants = Variants(config, calibrated.held_out)
        self.found: dict[str, Any] = {}

    def begin(self, statistics: StatisticsOnTheWay, tick: Callable[[], object]) -> None:
        self.statistics, self.tick = statistics, tick
        self.passed = -1
        kept = self.work.states(_STAGE)
        if kept is not None and all(self.work.knows(_name(index)) for index in range(kept[0] + 1)):
            self.passed, states = kept
            self.variants.restore(states)

    def measured(self) -> Measured:
        def of(part: str | int) -> Any:
            name = _name(part)
            return self.found[name] if name in self.found else self.work.known(name)

        outer = {name: np.asarray(of(name)) for name in ("embed", "head")}
        return Measured({i: block_measures(of(i)) for i in range(self.config.num_blocks)}, outer, of("divergences"))

    def embedding(self, embedding: Leaf) -> None:
        self.statistics.embedding(embedding, embedding)
        inputs, weight_C = embedding_inputs(self.config), jnp.asarray(self.tokens_C, jnp.float32)
        own = InFormats(self.recipe.formats, self.rounder, "embed", embedding, inputs, weight_C)
        self._find("embed", lambda: own.errors().tolist())
        if self.passed < 0:
            self.variants.embedding(embedding, self._changed("embed", own))

    def block(self, index: int, block: Block) -> None:
        if index <= self.passed:
            self.statistics.pass_by(index, block, lambda: block)
            return
        sums = self.statistics.block(index, block, BlockPlan())
        weights = self._in_formats(f"layers.{index}", named_leaves(block), sums)
        layer = _Layer(self.recipe, weights, dense_block(block), self.variants, sums)
        self._find(index, lambda: layer.measures(self.tick))
        self.variants.block(index, layer.dense, layer.changed(index, self.changes))
        self.work.keep_states(_STAGE, index, self.variants.arrays())

    def norm(self, gain_D: jax.Array) -> None:
        self.statistics.norm(gain_D)
        self.gain_D = gain_D

    def mtp(self, depth: int, mtp: MtpBlock) -> None:
        sums = self.statistics.mtp(depth, mtp, BlockPlan())
        leaves = {name.removeprefix("block."): leaf for name, leaf in named_leaves(mtp).items()}
        weights = self._in_formats(f"mtp.{depth}", leaves, sums)

        def found() -> dict[str, Any]:
            return {"errors": _errors(weights, self.tick), "spoiled": {}, **_scores(sums, self.recipe), "pruned": []}

        self._find(self.config.num_hidden_layers + depth, found)

    def head(self, head: Leaf) -> None:
        inputs = self.statistics.head(head)
        own = InFormats(self.recipe.formats, self.rounder, "head", head, inputs, jnp.ones(len(self.tokens_C)))
        self._find("head", lambda: own.errors().tolist())
        changed = self._changed("head", own)
        self._find("divergences", lambda: self.variants.divergences(self.gain_D, head, changed))

    def _changed(self, name: str, own: InFormats) -> Iterator[tuple[str, jax.Array]]:
        """What variants have in place of the embedding or the head, in float32."""
        for change in self.changes:
            if family_of(name) in change.families:
                yield change.name, own.rounded(int(change.level))

    def _in_formats(
        self, part: str, leaves: Mapping[str, Weight], sums: BlockStatistics
    ) -> dict[str, InFormats | ExpertsInFormats]:
        inside = f"{part}.block" if part.startswith("mtp") else part
        return block_in_formats(
            lambda own: f"{part if IN_BLOCK[own].role == 'mtp' else inside}.{own}",
            leaves,
            sums,
            self.recipe.formats,
            self.rounder,
            self.config.down_input_transform,
        )

    def _find(self, part: str | int, find: Callable[[], Any]) -> None:
        self.found[_name(part)] = self.work.once(_name(part), find)


@dataclass(frozen=True)
class _Layer:
    """A decoder block that is measured: what its weights are in every format, and, dense, what it puts out."""

    recipe: Recipe
    weights: Mapping[str, InFormats | ExpertsInFormats]
    dense: Block
    variants: Variants
    statistics: BlockStatistics

    def measures(self, tick: Callable[[], object]) -> dict[str, Any]:
        """`BlockMeasures`, as JSON holds it."""
        errors = _errors(self.weights, tick)
        compared = max(1, len(self.variants.tokens_BT) // _ONE_IN)
        x_BTD = self.variants.original[:compared]
        y_BTD = run_block(self.dense, x_BTD, self.variants.by)

        def spoiled(changed: Block) -> float:
            return float(_spoiled(y_BTD, run_block(changed, x_BTD, self.variants.by)))

        formats = self.recipe.formats
        rounded = {
            own: spoiled(with_leaves(self.dense, {own: weight.rounded(probed_format(family_of(own), formats))}))
            for own, weight in self.weights.items()
            if formats
        }
        return {"errors": errors, "spoiled": rounded, **self._scores, "pruned": self._pruned(spoiled)}

    def changed(self, index: int, changes: Sequence[Change]) -> Iterator[tuple[str, Block]]:
        """The block of every variant that has another in its place."""
        for change in changes:
            if index not in change.layers:
                continue
            new: dict[str, Weight] = {
                own: weight.rounded(int(change.level))
                for own, weight in self.weights.items()
                if family_of(own) in change.families
            }
            if PRUNING in change.families and isinstance(self.dense.mlp, MoE):
                new["mlp.bias"] = self._masked(self._order[: pruned_count(self._allowed, change.level)])
            if new:
                yield change.name, with_leaves(self.dense, new)

    def _pruned(self, spoiled: Callable[[Block], float]) -> list[Any]:
        """Of the numbers that may be pruned a few: how many, the layer's errors, and how much is spoiled."""
        mlp, found = self.dense.mlp, []
        if not isinstance(mlp, MoE):
            return []
        x_TD = self.variants.experts_input(self.dense)
        for count in tried_counts(self._allowed):
            error = pruning_error(mlp, x_TD, jnp.isin(jnp.arange(mlp.num_experts), self._order[:count]))
            masked = with_leaves(self.dense, {"mlp.bias": self._masked(self._order[:count])})
            found.append((count, list(map(float, error)), spoiled(masked)))
        return found

    @cached_property
    def _scores(self) -> dict[str, Any]:
        return _scores(self.statistics, self.recipe)

    @cached_property
    def _order(self) -> np.ndarray:
        return order_of_pruning(np.asarray(self._scores["scores_E"]), self.dense.config, self.recipe)

    @cached_property
    def _allowed(self) -> np.ndarray:
        return allowed_counts(self._order, self.dense.config, self.recipe)

    def _masked(self, pruned: np.ndarray) -> jax.Array:
        bias_E = named_leaves(self.dense)["mlp.bias"]
        return masked_bias(bias_E, np.isin(np.arange(len(bias_E)), pruned))


def tried_counts(allowed: np.ndarray) -> list[int]:
    """The numbers of experts that pruning is tried at, those of the probes among them; rising, without 0."""
    counts = np.flatnonzero(np.isfinite(allowed))
    counts = counts[counts > 0]
    spread = counts[np.linspace(0, len(counts) - 1, min(_PRUNED, len(counts))).round().astype(int)]
    return sorted({*spread.tolist(), *(pruned_count(allowed, share) for share in PRUNED_SHARES)} - {0})


def _errors(weights: Mapping[str, InFormats | ExpertsInFormats], tick: Callable[[], object]) -> dict[str, Any]:
    found = {}
    for own, weight in weights.items():
        if isinstance(weight, ExpertsInFormats):
            found[own] = weight.errors(tick).tolist()
        else:
            tick()
            found[own] = weight.errors().tolist()
    return found


def _scores(statistics: BlockStatistics, recipe: Recipe) -> dict[str, Any]:
    experts = statistics.experts
    if experts is None:
        return {"scores_E": None, "peak_E": None}
    scores_E = pruning_scores(experts, recipe.criterion)
    return {"scores_E": scores_E.tolist(), "peak_E": np.asarray(experts.peak_E, np.float64).tolist()}


@jax.jit
def _spoiled(y_BTD: jax.Array, other_BTD: jax.Array) -> jax.Array:
    error_BT, whole_BT = (jnp.sum(own**2, axis=-1) for own in (other_BTD - y_BTD, y_BTD))
    return jnp.mean(error_BT / jnp.maximum(whole_BT, 1e-30))


def _steps(config: Config) -> int:
    """How often `tick` is called."""
    shapes = Layout(config).shapes()
    experts = [shape for name, shape in shapes.items() if row_of(name).role == "routed experts"]
    in_blocks = [
        name for name in shapes if row_of(name).may_be_rounded and row_of(name).role not in ("embedding", "head")
    ]
    return len(in_blocks) + sum(-(-shape[0] // experts_together(shape)) for shape in experts if len(shape) == 3)
