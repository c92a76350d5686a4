"""What commands do with what they can use; `test_bad_input` has the rest."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from command_line import Ran, moejax, run
from moejax.checkpoint import hf_export
from moejax.checkpoint.store import folder_bytes
from moejax.commands import inspect
from moejax.errors import InternalError
from moejax.progress import counted
from moejax.report.console import progress_bar
from small_checkpoint import words

# The keys of `--json` that do not change (those of a divergence are there with `--against`, `mtp_ppl` where the model
# has an MTP block).
FIGURES = {"bytes", "ratio", "bits_per_weight", "text", "tokens", "ppl", "mtp_ppl", "seconds", "peak_memory_bytes"}
# One in which a bar is printed once, when it ends.
DUMB_TERMINAL = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "dumb"}
DIVERGENCE = {"base_ppl", "ln_ppl_ratio", "kld_mean", "kld_p999", "same_top1"}


def test_compress_meets_the_smallest_budget_that_a_refusal_names(compressed: Path) -> None:
    figures = json.loads((compressed.parent / "figures.json").read_text())
    assert figures["bytes"] == folder_bytes(compressed)
    # Of each layer's list of survivors it is known only how long it is at most: 17 characters, and here 7 at least.
    assert figures["budget_bytes"] - 3 * 10 <= figures["bytes"] <= figures["budget_bytes"]
    assert {path.name for path in compressed.parent.iterdir()} == {"out", "figures.json", "printed"}


def test_compress_writes_its_figures(small: Path, heldout_text: Path, compressed: Path) -> None:
    figures = json.loads((compressed.parent / "figures.json").read_text())
    assert figures.keys() >= FIGURES | DIVERGENCE
    assert figures["text"]["source"] == heldout_text.name and figures["tokens"] == 255
    assert figures["experts_kept"] == [6, 6, 6]
    assert figures["ratio"] * figures["bits_per_weight"] == pytest.approx(16)
    assert figures["ratio"] == pytest.approx(folder_bytes(small) / folder_bytes(compressed), rel=0.03)
    assert figures["bits_by_kind"]["embedding"] == 4 + 16 / 128
    assert 0 < figures["kld_mean"] < figures["kld_p999"]
    assert figures["kld_predicted"] > 0 and figures["tried_plans"] and figures["tried_experts_per_token"]
    assert {probe["layer"] for probe in figures["pruning_probes"]} == {1, 2}


def test_compress_prints_its_figures(compressed: Path) -> None:
    figures = json.loads((compressed.parent / "figures.json").read_text())
    printed = (compressed.parent / "printed").read_text()
    assert f"({figures['bytes']} bytes)" in printed and f"{figures['ratio']:.2f}x smaller" in printed
    assert f"{figures['ppl']:.4f}" in printed and f"{figures['kld_mean']:.5f}" in printed
    assert f"{figures['same_top1']:.2f} %" in printed
    assert "pruning, layer by layer" in printed and "tried: 3 experts a token, routing scale 1" in printed
    for kind, bits in figures["bits_by_kind"].items():
        assert re.search(rf"{kind} .* {bits:.3f} ", printed), kind


def test_inspect_an_original(small: Path, tmp_path: Path) -> None:
    printed = run("inspect", small, "--json", tmp_path / "figures.json")
    facts = json.loads((tmp_path / "figures.json").read_text())
    assert (facts["model_type"], facts["bytes"]) == ("deepseek_v3", folder_bytes(small))
    assert (facts["layers"], facts["mtp_blocks"], facts["vocabulary"]) == (3, 1, 320)
    assert (facts["experts_per_layer"], facts["experts_per_token"]) == ([12, 12, 12], [3])
    assert {facts["bits_by_kind"][kind] for kind in ("embedding", "attention", "norms", "dense mlp")} == {16}
    assert str(small) in printed and f"({folder_bytes(small)} bytes)" in printed
    assert "packed_bytes_by_kernel_on_tpu" not in facts


def test_inspect_a_compressed_checkpoint(compressed: Path, calibration_text: Path, tmp_path: Path) -> None:
    printed = run("inspect", compressed, "--json", tmp_path / "figures.json")
    facts = json.loads((tmp_path / "figures.json").read_text())
    assert (facts["experts_per_layer"], facts["bytes"]) == ([6, 6, 6], folder_bytes(compressed))
    assert facts["made_by"]["calibration"]["source"] == calibration_text.name
    figures = json.loads((compressed.parent / "figures.json").read_text())
    assert facts["bits_by_kind"] == figures["bits_by_kind"]
    assert calibration_text.name in printed and "packed_bytes_by_kernel_on_tpu" in printed
    assert 0 < sum(facts["packed_bytes_by_kernel_on_tpu"].values()) < facts["bytes"]


def test_inspect_verifies_a_folder_that_compress_wrote(small: Path, compressed: Path, tmp_path: Path) -> None:
    printed = run("inspect", compressed, "--verify", "--json", tmp_path / "figures.json")
    facts = json.loads((tmp_path / "figures.json").read_text())
    assert facts["verified_bytes"] == folder_bytes(compressed) and "verified_seconds" in printed
    assert "has no checksums to be verified by" in moejax("inspect", small, "--verify").err


def test_inspect_takes_the_tiny_checkpoint_by_default(tiny: Path) -> None:
    printed = run("inspect")
    assert str(tiny) in printed and "routed experts" in printed


def evaluated(folder: Path, *arguments: object) -> dict[str, Any]:
    run("evaluate", *arguments, "--json", folder / "figures.json")
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures


def test_evaluate_against_the_original_repeats_the_figures_of_compress(
    small: Path, compressed: Path, heldout_text: Path, tmp_path: Path
) -> None:
    figures = evaluated(tmp_path, compressed, "--against", small, "--text", heldout_text)
    assert figures.keys() == FIGURES | DIVERGENCE
    before = json.loads((compressed.parent / "figures.json").read_text())
    for name in DIVERGENCE | {"ppl", "tokens", "text", "bytes"}:
        assert figures[name] == (before[name] if name in ("text", "bytes") else pytest.approx(before[name], rel=1e-5))


def test_evaluate_an_original_alone_and_against_itself(small: Path, heldout_text: Path, tmp_path: Path) -> None:
    alone = evaluated(tmp_path, small, "--text", heldout_text)
    assert alone.keys() == FIGURES and alone["bytes"] == folder_bytes(small)
    itself = evaluated(tmp_path, small, "--against", small, "--text", heldout_text)
    assert itself["ppl"] == alone["ppl"] == itself["base_ppl"]
    assert (itself["kld_mean"], itself["ln_ppl_ratio"], itself["same_top1"]) == (0, pytest.approx(0, abs=1e-6), 100)


def test_the_trained_checkpoint_predicts_python(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(Path(__file__).read_text()[:3000])
    figures = evaluated(tmp_path, "--text", tmp_path / "source.py")
    # Of 4096 tokens; by chance it would be 4096.
    assert figures["ppl"] < 100 and figures["tokens"] >= 255


def test_greedy_and_sampled_tokens_are_reproducible() -> None:
    arguments = ["generate", "--prompt", "import numpy", "--tokens", 12]
    greedy = run(*arguments)
    assert greedy.startswith("import numpy") and len(greedy) > len("import numpy\n")
    sampled = [run(*arguments, "--temperature", 1.5, "--seed", seed) for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1]
    assert len({greedy, *sampled}) == 3
    assert run(*arguments, "--temperature", 0, "--seed", 7) == greedy


def test_a_compressed_checkpoint_generates(compressed: Path) -> None:
    prompt = words(seed=5, count=6)
    printed = run("generate", compressed, "--prompt", prompt, "--tokens", 8)
    assert printed.startswith(prompt) and len(printed) > len(prompt) + 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "--budget", "6x"],
        ["plan"],
        ["plan", "deepseek_v3"],
        ["plan", "--budget", "103GB"],
        ["plan", "deepseek_v3", "--budget", "103GB", "--context", "long"],
        ["squeeze"],
        ["generate", "--prompt", "a", "--tokens", "many"],
        ["evaluate", "--dtype", "int8"],
        ["inspect", "--unknown"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: list[str]) -> None:
    ran = moejax(*arguments)
    assert ran.code == 2 and "Traceback" not in ran.out + ran.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "some/file"), "some/file: no space left on device"),
        (OSError("of some kind"), "of some kind"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "out of memory; 7.28 TiB could not be had"),
        (RuntimeError("RESOURCE_EXHAUSTED: compiling failed"), "out of memory"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: while trying to allocate 1.5GiB."),
            "out of memory; 1.5 GiB could not be had",
        ),
        (InternalError("1 is not 2"), "1 is not 2: this is a bug of moejax, please report it"),
    ],
)
def test_failures_of_the_machine(monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str) -> None:
    monkeypatch.setattr(inspect, "run_inspect", mock.Mock(side_effect=error))
    assert moejax("inspect") == Ran(1, "", f"moejax: {message}\n")


@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(inspect, "run_inspect", lambda *_: library.ones((2**50,), np.int8).block_until_ready())
    sizes = {np: "1.00 PiB", jnp: f"{2**50} bytes"}
    assert moejax("inspect") == Ran(1, "", f"moejax: out of memory; {sizes[library]} could not be had\n")


def test_a_mistake_of_moejax_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "run_inspect", mock.Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        moejax("inspect")


def test_a_progress_bar_ends_before_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_the_second_step(*_: object) -> None:
        with counted(progress_bar, 3, "work") as begin:
            begin()
            begin()
            raise OSError("the reason")

    monkeypatch.setattr(inspect, "run_inspect", fail_at_the_second_step)
    for name, value in DUMB_TERMINAL.items():
        monkeypatch.setenv(name, value)
    ran = moejax("inspect")
    assert re.fullmatch(r"work .* 1/3 .*\nmoejax: the reason\n", ran.err), ran.err


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")]
)
def test_a_signal_leaves_nothing_half_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, message: str
) -> None:
    """The signal comes while the partial folder is there."""

    def stop(*_: object, **__: object) -> None:
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        signal.raise_signal(number)

    monkeypatch.setattr(hf_export, "write_shards", stop)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, usual)  # in the background shells have SIGINT ignored, and nohup SIGHUP
    try:
        ran = moejax("export", small, "--to", "hf", "--output", tmp_path / "out")
        assert ran == Ran(128 + number, "", f"moejax: {message}\n")
        assert not list(tmp_path.iterdir()) and signal.getsignal(number) is usual
    finally:
        signal.signal(number, inherited)


def test_what_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "run_inspect", lambda *_: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert moejax("inspect") == Ran(0, "", "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_of_its_own_that_is_terminated_while_it_writes_an_item(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from moejax import cli
from moejax.checkpoint import store
from moejax.commands import inspect
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.checkpoint.load import load_model, open_checkpoint
from pathlib import Path

def write(*_):
    checkpoint = open_checkpoint()
    write_native(load_model(checkpoint), Path("out"), Description(checkpoint.raw_config, {}, {}), [], 10**9)

def first_and_stop(held, number):
    os.kill(os.getpid(), signal.SIGTERM)
    return chunk(held, number)

chunk, store.Held.chunk = store.Held.chunk, first_and_stop
inspect.run_inspect = write
sys.argv = ["moejax", "inspect"]
cli.main()
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (143, "", "moejax: terminated\n")
    assert not list(tmp_path.iterdir())


def test_help_comes_without_jax() -> None:
    program = """
import sys
from moejax import cli
sys.argv = ["moejax", "--help"]
try:
    cli.main()
finally:
    assert not {"jax", "numpy", "orbax"} & sys.modules.keys()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "compress" in ran.stdout and not ran.stderr


def test_a_process_of_its_own_in_another_folder(compressed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "moejax", "inspect"]
    printed = subprocess.run([*command, compressed], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.startswith(f"{compressed}: deepseek_v3") and not printed.stderr
    failed = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith("moejax: nowhere: is neither a folder")
    assert not list(tmp_path.iterdir())
