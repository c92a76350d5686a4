"""`moejax evaluate` within a limit of memory, and predictions that are saved and used again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import moejax, refused, run
from large_checkpoint import write_large_checkpoint, write_with_another_head
from moejax import ledger
from moejax.checkpoint.load import abstract_model, open_checkpoint
from moejax.evaluate.memory import needs

COST = ("seconds", "peak_memory_bytes")
# Runs a command and prints the most memory that its process has held, in bytes.
MEASURED = """
import resource, sys
from moejax import cli
cli.main()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak if sys.platform == "darwin" else peak * 1024)
"""


def read(file: Path) -> dict[str, Any]:
    """The figures in a file, without what the run took."""
    figures: dict[str, Any] = json.loads(file.read_text())
    return {name: value for name, value in figures.items() if name not in COST}


def evaluated(folder: Path, *arguments: object) -> dict[str, Any]:
    run("evaluate", *arguments, "--json", folder / "figures.json")
    return read(folder / "figures.json")


def test_part_by_part_or_in_memory_the_figures_are_the_same(
    small: Path, compressed: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [compressed, "--against", small, "--text", heldout_text]
    expected = evaluated(tmp_path, *arguments)
    monkeypatch.setattr(ledger, "resident_memory", lambda: 0)
    model, base = (abstract_model(open_checkpoint(path)) for path in (compressed, small))
    asked = needs(model, base, 512, 1, "float32")
    ran = moejax("evaluate", *arguments, "--memory", f"{asked.part_by_part(1)}B", "--json", tmp_path / "again.json")
    assert ran.code == 0 and "for everything does not fit" in ran.err, ran.err
    assert "read block by block from disk, 1 time over" in ran.err
    assert read(tmp_path / "again.json") == expected
    assert "does not fit" not in moejax("evaluate", *arguments, "--memory", f"{asked.in_memory}B").err


def test_a_limit_that_not_even_one_block_fits_is_refused_with_one_that_does(
    small: Path, heldout_text: Path, tmp_path: Path
) -> None:
    message = refused(tmp_path, "evaluate", small, "--text", heldout_text, "--memory", "100MB")
    assert f"{small} cannot be evaluated, not even block by block, in 100.00 MB; " in message
    least = message.split("; ")[1].split(" would do")[0]
    assert evaluated(tmp_path, small, "--text", heldout_text, "--memory", least)["tokens"] == 255


def test_saved_predictions_stand_for_the_original(
    small: Path, compressed: Path, heldout_text: Path, tmp_path: Path
) -> None:
    """Saved with a comparison or from the original alone, they are the same file."""
    base, alone = tmp_path / "base", tmp_path / "alone"
    text = ["--text", heldout_text]
    expected = evaluated(tmp_path, compressed, *text, "--against", small, "--save-base", base)
    assert evaluated(tmp_path, compressed, *text, "--against", base) == expected
    run("evaluate", small, *text, "--save-base", alone)
    assert alone.read_bytes() == base.read_bytes()


def test_predictions_of_something_else_are_refused(
    small: Path, compressed: Path, tiny: Path, heldout_text: Path, calibration_text: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    text = ["--text", heldout_text]
    run("evaluate", small, *text, "--save-base", base)
    against = ["evaluate", compressed, "--against", base]
    message = refused(tmp_path, *against, "--text", calibration_text)
    assert f"{base} holds predictions of {heldout_text.name} (SHA-256 " in message
    assert f"{calibration_text.name} (" in message and "the same text and tokenizer are needed" in message
    message = refused(tmp_path, *against, *text, "--dtype", "bfloat16")
    assert f"{base} holds predictions in float32; --dtype float32 compares with them" in message
    message = refused(tmp_path, *against, *text, "--save-base", tmp_path / "other")
    assert "holds predictions already; --save-base takes them from a checkpoint" in message
    message = refused(tmp_path, "evaluate", tiny, "--against", base, *text)
    assert f"{base} has 320 tokens and {tiny} 4096; two models of one vocabulary are needed" in message
    assert "exists already" in refused(tmp_path, "evaluate", small, *text, "--save-base", base)
    assert "is not a sound safetensors file" in refused(tmp_path, "evaluate", small, *text, "--against", heldout_text)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder with a checkpoint of 4 GB, `original`, and the same with another head, `other`."""
    free = shutil.disk_usage(tmp_path).free
    if free < 6e9:
        pytest.skip(f"{free / 1e9:.1f} GB are free on the disk; a checkpoint of 4 GB needs 6")
    folder = tmp_path / "large"
    folder.mkdir()
    write_large_checkpoint(folder / "original", seed=1)
    write_with_another_head(folder / "other", folder / "original", seed=2)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_checkpoint_of_4_gb_is_evaluated_in_1_5(large: Path, heldout_text: Path) -> None:
    assert sum(file.stat().st_size for file in (large / "original").iterdir()) > 4e9
    base, text = large / "base", ["--text", heldout_text, "--memory", "1.5GB"]
    first = measured(large, large / "other", "--against", large / "original", "--save-base", base, *text)
    again = measured(large, large / "other", "--against", base, *text)
    assert first == again
    assert first["kld_mean"] > 0.1 and first["mtp_ppl"] > 100


def measured(folder: Path, *arguments: object) -> dict[str, Any]:
    """The figures of an evaluation in a process of its own, whose peak memory is below 1.5 GB.

    A shell stands between, because a process's peak begins at what its parent holds, and that is this one's.
    """
    command = [sys.executable, "-c", MEASURED, "evaluate", *map(str, arguments), "--json", str(folder / "figures.json")]
    ran = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "does not fit 1.50 GB: read block by block from disk, 1 time over" in ran.stderr
    peak, reported = int(ran.stdout.split()[-1]), json.loads((folder / "figures.json").read_text())["peak_memory_bytes"]
    assert peak < 1.5e9 and reported == pytest.approx(peak, rel=0.01)
    return read(folder / "figures.json")
