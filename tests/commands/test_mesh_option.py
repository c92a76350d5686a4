"""`--mesh` and `--distributed`: over devices and processes, commands say what they say on one device."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from command_line import moejax, refused, run
from processes import Processes
from small_checkpoint import words

# What a run takes, and what is rounded otherwise where sums are made in other orders.
COST = ("seconds", "peak_memory_bytes", "read_seconds", "text")
# Joins, and is sent a signal.
SIGNALLED = """
import os, sys, time
from moejax.commands.devices import mesh_from
from moejax.commands.ending import in_sentences
number, *options = sys.argv[1:]
with in_sentences(), mesh_from(*options):
    os.kill(os.getpid(), int(number))
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four chunks."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(words(seed=2, count=600))
    return file


def figures(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text())
    return {name: value for name, value in read.items() if name not in COST}


@pytest.mark.parametrize("mesh", [pytest.param("tensor=8", marks=pytest.mark.slow), "tensor=2,data=4"])
def test_evaluate_over_devices(mesh: str, small: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", compressed, "--against", small, "--text", text, "--json"]
    run(*arguments, tmp_path / "one.json")
    run(*arguments, tmp_path / "mesh.json", "--mesh", mesh)
    assert figures(tmp_path / "mesh.json") == pytest.approx(figures(tmp_path / "one.json"), rel=1e-4)


def test_generate_over_devices(compressed: Path) -> None:
    arguments = ["generate", compressed, "--prompt", "one two", "--tokens", "6"]
    assert run(*arguments, "--mesh", "tensor=8") == run(*arguments)


def test_bench_over_devices(compressed: Path, tmp_path: Path) -> None:
    arguments = ["bench", compressed, "--prompt", "4", "--tokens", "2", "--repeats", "1", "--json", tmp_path / "b.json"]
    run(*arguments, "--mesh", "tensor=2")
    assert json.loads((tmp_path / "b.json").read_text())["read_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mesh", "tensor=16"], "--mesh tensor=16 is of 16 devices; there are 8 CPU devices"),
        (["--mesh", "tensor"], "--mesh is 'tensor'; tensor=8, data=2 or tensor=4,data=2 are accepted"),
        (["--mesh", "tensor=2,tensor=4"], "--mesh is 'tensor=2,tensor=4'; tensor=8"),
        (["--mesh", "expert=2"], "--mesh is 'expert=2'; tensor=8"),
        (["--mesh", "data=8"], "--mesh has data=8 and the text 4 chunks; up to data=4 is accepted"),
        (["--mesh", "tensor=0"], "--mesh is 'tensor=0'; tensor=8"),
        (["--mesh", "tensor=8", "--distributed", "all"], "--distributed is 'all'; auto, or coordinator=HOST:PORT"),
        (
            ["--mesh", "tensor=8", "--distributed", "coordinator=a:1,processes=2,process=2"],
            "--distributed is 'coordinator=a:1,processes=2,process=2'; auto, or",
        ),
        (["--distributed", "auto"], "--distributed spreads a model over the devices of several processes; --mesh says"),
        (
            ["--mesh", "tensor=2", "--memory", "100MB"],
            "cannot be evaluated on a mesh, which needs all of it in memory,",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], reason: str, small: Path, text: Path, tmp_path: Path) -> None:
    assert reason in refused(tmp_path, "evaluate", small, "--text", text, *options)


@pytest.mark.parametrize("command", [["generate", "--prompt", "one"], ["bench"]])
def test_one_sequence_is_not_spread_over_data(command: list[str], small: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, command[0], small, *command[1:], "--mesh", "tensor=2,data=2")
    assert "--mesh has data=2; one sequence is decoded, so data=1 is accepted" in message


@pytest.mark.parametrize("mesh", ["tensor=8", pytest.param("tensor=4,data=2", marks=pytest.mark.slow)])
def test_two_processes_evaluate_as_one(mesh: str, small: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    arguments, processes = ["evaluate", compressed, "--text", text], Processes(tmp_path)
    saving = ["--against", small, "--save-base", tmp_path / "base", "--json", tmp_path / "two.json"]
    codes = processes.run(*arguments, *saving, "--mesh", mesh)
    assert codes == [0, 0], processes.said(0) + processes.said(1)
    out, err = processes.said(0)
    assert "perplexity" in out and "Gloo" not in out + err
    assert processes.said(1) == ("", "")
    run(*arguments, "--against", small, "--json", tmp_path / "one.json")
    assert figures(tmp_path / "two.json") == pytest.approx(figures(tmp_path / "one.json"), rel=1e-4)
    run(*arguments, "--against", tmp_path / "base", "--mesh", "tensor=2", "--json", tmp_path / "saved.json")
    assert figures(tmp_path / "saved.json") == pytest.approx(figures(tmp_path / "one.json"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_generate_as_one(compressed: Path, tmp_path: Path) -> None:
    arguments, processes = ["generate", compressed, "--prompt", "one two", "--tokens", "6"], Processes(tmp_path)
    assert processes.run(*arguments, "--mesh", "tensor=8") == [0, 0], processes.said(0) + processes.said(1)
    assert processes.said(0)[0] == run(*arguments)
    assert processes.said(1) == ("", "")


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize(
    ("number", "code", "own"), [(signal.SIGKILL, -9, ""), (signal.SIGTERM, 143, "moejax: terminated\n")]
)
def test_a_process_that_is_stopped_stops_the_other(
    number: int, code: int, own: str, killed: int, compressed: Path, text: Path, tmp_path: Path
) -> None:
    processes, other = Processes(tmp_path), 1 - killed
    command = ["-m", "moejax", "evaluate", compressed, "--text", text, "--mesh", "tensor=8", "--distributed"]
    going = processes.start(other, *command, processes.join[other])
    stopped = processes.start(killed, "-c", SIGNALLED, int(number), "tensor=8", processes.join[killed])
    assert stopped.wait(timeout=300) == code
    assert own in processes.said(killed)[1]
    assert going.wait(timeout=300) == 1
    said = f"moejax: process {killed} ended before all was done, so process {other} does"
    assert re.sub(r"reading .*\n", "", processes.said(other)[1]) == f"{said}\n"


def test_bad_input_is_told_and_ends_both(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    assert processes.run("evaluate", tmp_path / "nothing", "--mesh", "tensor=8") == [2, 2]
    assert all("nothing" in processes.said(n)[1] and processes.said(n)[1].count("\n") == 1 for n in (0, 1))


def test_what_the_first_alone_fails_by_ends_both(small: Path, text: Path, tmp_path: Path) -> None:
    processes, nowhere = Processes(tmp_path), tmp_path / "nowhere" / "figures.json"
    codes = processes.run("evaluate", small, "--text", text, "--json", nowhere, "--mesh", "tensor=8")
    assert codes == [2, 1], processes.said(0) + processes.said(1)
    assert processes.said(0)[1].startswith(f"moejax: {nowhere}: cannot be written")
    assert processes.said(1)[1] == "moejax: process 0 ended before all was done, so process 1 does\n"


def test_numbers_that_are_not_finite_are_traced_to_their_matrix(small: Path, text: Path, tmp_path: Path) -> None:
    """On several devices as on one."""
    folder = tmp_path / "overflowing"
    shutil.copytree(small, folder)
    (file,) = (own for own in folder.glob("*.safetensors") if "layers.1.self_attn.o_proj" in str(load_file(own).keys()))
    tensors = load_file(file)
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file(tensors | {name: (tensors[name].astype(np.float32) * 1e25).astype(tensors[name].dtype)}, file)
    for mesh in ([], ["--mesh", "tensor=8"]):
        ran = moejax("evaluate", folder, "--text", text, *mesh)
        assert ran.code == 2
        assert "moejax: layers.1: the output of self_attn.o reaches 3.33e+25, too much" in ran.err


def test_help_names_the_options() -> None:
    assert all("--mesh" in moejax(command, "--help").out for command in ("evaluate", "generate", "bench"))
