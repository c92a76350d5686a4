"""`compress --fit`: a checkpoint that a device of so much memory decodes."""

import json
from pathlib import Path

import pytest

from command_line import run
from moejax.checkpoint.load import abstract_model, open_checkpoint
from moejax.planning.memory import device_memory

RECIPE = 'formats = ["int2g128", "int4g128"]\n'
MEMORY = 1_500_000


@pytest.mark.slow
def test_what_is_written_decodes_in_the_memory_asked_for(
    small: Path, text_options: list[object], tmp_path: Path
) -> None:
    recipe, output, figures = (tmp_path / name for name in ("few.toml", "out", "figures.json"))
    recipe.write_text(RECIPE)
    options = ["--fit", f"{MEMORY}B", "--context", 256, "--recipe", recipe, "--json", figures]
    printed = run("compress", small, "--output", output, *options, *text_options)
    taken = device_memory(abstract_model(open_checkpoint(output)), 256, 1)
    told = json.loads(figures.read_text())
    assert 0.98 * MEMORY < taken.total <= MEMORY
    assert told["memory"]["total"] == taken.total and told["memory"]["fits"] and told["budget_bytes"] is None
    assert told["memory"]["longest_context"] >= 256
    assert "as much as decodes in 1.50 MB" in printed and "device memory: weights" in printed
