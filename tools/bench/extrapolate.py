"""What compressing a larger model of the same widths would take on this machine, before its files are here.

    python tools/bench/extrapolate.py CHECKPOINT --calibration FILE [--model deepseek_v3] [--memory SIZE]
           [--recipe fast] [--chunks 16] [--evaluated 16] [--json FILE]

The pieces that `moejax compress` times before a job are done and timed on CHECKPOINT (`moejax/pipeline/duration.py`),
and counted for it and for MODEL, a configuration that comes with moejax. Prints the seconds of every piece, and of
every phase of both jobs.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from moejax.checkpoint.load import abstract_model, open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.commands.common import read_recipe, tokenize
from moejax.evaluate.text import read_text
from moejax.ledger import ledger_of
from moejax.machine import peak_memory
from moejax.model.config import config_from_hf
from moejax.pipeline.check import require_original
from moejax.pipeline.duration import expected_seconds, timed_pieces
from moejax.pipeline.job import split_calibration
from moejax.pipeline.room import room_in
from moejax.pipeline.sampled import Sampled, seen_by_variants
from moejax.pipeline.shapes import ready
from moejax.resources import config_path
from moejax.tokenizer import load_tokenizer

PROBED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--memory")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--evaluated", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint, recipe = require_original(open_checkpoint(options.checkpoint)), read_recipe(options.recipe)
    larger = config_from_hf(json.loads(config_path("models", options.model).read_text()))
    text = tokenize(read_text(options.calibration), load_tokenizer(checkpoint.path), checkpoint.config)
    calibrated = split_calibration(text, options.chunks, PROBED)
    seen_BT = seen_by_variants(calibrated.held_out, Sampled(recipe.formats, {}))
    given = abstract_model(checkpoint), seen_BT.shape[1], recipe.method
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        room_in(ledger_of(options.memory), *given, Path(folder) / "output", keeps_rounded=False) as room,
    ):
        pieces = timed_pieces(ready(CheckpointSource(checkpoint), recipe.method), recipe, calibrated, seen_BT, room)
        together = room.runs_within(4 * seen_BT.size * checkpoint.config.hidden_size)
    counts = options.chunks, len(seen_BT), options.evaluated, together
    phases = {
        name: expected_seconds(pieces, config, recipe, *counts)
        for name, config in ((str(options.checkpoint), checkpoint.config), (options.model, larger))
    }
    found = {"pieces": asdict(pieces), "runs_together": together, "seconds": phases, "peak_memory_bytes": peak_memory()}
    print(json.dumps(found, indent=2))
    for name, seconds in phases.items():
        print(f"{name}: {sum(seconds.values()) / 3600:.2f} h")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
