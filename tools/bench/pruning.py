"""What pruning does to every layer, by criterion: its output error with and without re-routing, and the KL it costs.

usage: python tools/bench/pruning.py CHECKPOINT --calibration FILE

KL is measured at half of what can be pruned, and follows the block's error elsewhere. Beside it stand the ratio of the
re-routed error to what the gate weights alone say, and KL per unit of error over the same for rounded down projections
(2 bits, in units of the format's error on Gaussian weights). It calibrates on 64 chunks and probes on 8 others of the
same text.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.evaluate.text import chunks, read_text
from moejax.formats import IntFormat
from moejax.pipeline.calibrated import KeptStatistics
from moejax.pipeline.check import require_original
from moejax.pipeline.estimate import gaussian_errors
from moejax.pipeline.job import split_calibration
from moejax.pipeline.measure import measure
from moejax.pipeline.prices import Prices
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trials, Try
from moejax.pipeline.work import NOT_KEPT
from moejax.planning import KEEP, BlockPlan, Method, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.report.console import progress_bar
from moejax.tokenizer import load_tokenizer
from moejax.transforms.prune import CRITERIA
from moejax.transforms.rounder import AFRESH

ROUNDED = IntFormat(2, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    options = parser.parse_args()
    trials = prepare(options.checkpoint, options.calibration)
    config, rounding = trials.source.config, rounding_rates(trials)
    print("| criterion | layer | pruned | gate2 lost | dropped | re-routed | ratio | KL | KL per error / rounding's |")
    print("|" + "---|" * 9)
    for criterion in CRITERIA:
        recipe = Recipe(formats=(), criterion=criterion, protect_super_experts=False)
        own = trials.calibrated, trials.statistics.on_the_way, trials.rounder, NOT_KEPT
        measured = measure(trials.source, recipe, *own, progress_bar)
        for block, layer in Prices(measured, config, recipe).pruning().items():
            for probe in layer.probes:
                error, rate = probe.error, probe.divergence / float(probe.error.rerouted)
                print(
                    f"| {criterion} | {block} | {probe.pruned} | {100 * error.gate2_lost:.1f} % "
                    f"| {100 * error.dropped:.1f} % | {100 * error.rerouted:.1f} % | {probe.rerouting_ratio:.2f} "
                    f"| {probe.divergence:.4f} | {rate / rounding[block]:.1f} |"
                )


def prepare(name: str, calibration: Path) -> Trials:
    checkpoint = require_original(open_checkpoint(name))
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = chunks(tokenizer.encode(read_text(calibration).content), bos_token_id=tokenizer.bos_token_id)
    calibrated, source = split_calibration(tokens, 64, 8), CheckpointSource(checkpoint)
    statistics = KeptStatistics(source.config, Method(), calibrated, sys.maxsize)
    return Trials(source, calibrated, statistics, AFRESH, NOT_KEPT)


def rounding_rates(trials: Trials) -> Mapping[int, float]:
    """KL of every layer's down projections rounded, over the format's error."""
    config = trials.source.config
    everyone = tuple(range(config.n_routed_experts))
    untouched = BlockPlan({}, everyone, {name: (KEEP,) * len(everyone) for name in PROJECTIONS})
    rounded = replace(untouched, experts={**untouched.experts, "down": (ROUNDED.name,) * len(everyone)})
    blocks = [untouched if config.is_moe(i) else BlockPlan() for i in range(config.num_blocks)]
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
    plans = [Plan(KEEP, KEEP, (*blocks[:i], rounded, *blocks[i + 1 :])) for i in layers]
    per_layer = (config.num_experts_per_tok,) * config.num_hidden_layers
    tried = trials.of([Try(plan, per_layer, False) for plan in plans], progress_bar)
    (error,) = gaussian_errors([ROUNDED])
    return {layer: float(np.float64(own.divergence) / error) for layer, own in zip(layers, tried, strict=True)}


if __name__ == "__main__":
    main()
