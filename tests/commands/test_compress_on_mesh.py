"""`compress --mesh`: several devices, of one process or two, write the files that one writes."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import moejax, refused, run
from moejax.checkpoint.toml_file import write_toml
from moejax.planning.plan import to_json
from native_checkpoint import files
from processes import Processes
from sequential_plan import PLAN

RECIPE = 'formats = ["int1g128", "int2g128", "int4g128"]\nerror_feedback = true\n'


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequential, and what gives hidden states is fitted: blocks that are written go on with both models' states."""
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    write_toml(file, to_json(replace(PLAN, method=replace(PLAN.method, output_fit=True))))
    return file


@pytest.mark.slow
def test_devices_write_what_one_writes(small: Path, plan: Path, text_options: list[object], tmp_path: Path) -> None:
    for output, mesh in (("one", []), ("three", ["--mesh", "tensor=3"])):
        run("compress", small, "--plan", plan, "--output", tmp_path / output, *text_options, *mesh)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_by_scores_too(small: Path, small_scores: Path, tmp_path: Path) -> None:
    for output, mesh in (("one", []), ("four", ["--mesh", "tensor=2,data=2"])):
        scores = ["--expert-scores", small_scores, "--output", tmp_path / output]
        run("compress", small, "--budget", "10x", *scores, *mesh)
    assert files(tmp_path / "one") == files(tmp_path / "four")


def test_devices_of_this_processor_take_memory(
    small: Path, plan: Path, text_options: list[object], tmp_path: Path
) -> None:
    arguments = ["compress", small, "--plan", plan, "--output", tmp_path / "out", *text_options, "--memory", "1GB"]
    message = refused(tmp_path, *arguments, "--mesh", "tensor=8")
    assert "cannot be worked on" in message and message.endswith("GB would do\n")


def killed(processes: Processes, number: int, journal: Path, *arguments: object) -> list[int]:
    """The exit codes of both, one of which is killed as soon as two things are finished."""
    command = ["-m", "moejax", *arguments, "--distributed"]
    going = [processes.start(n, *command, join) for n, join in enumerate(processes.join)]
    while going[0].poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.05)
    going[number].send_signal(signal.SIGKILL)
    return [own.wait(timeout=60) for own in going]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(small: Path, text_options: list[object], tmp_path: Path) -> None:
    """Stopped by the end of one, and begun again; with what is measured, tried and calibrated on the way."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    processes = Processes(tmp_path)
    arguments = ["compress", small, "--budget", "10x", "--recipe", recipe, *text_options, "--output"]
    assert processes.start(0, "-m", "moejax", *arguments, tmp_path / "one").wait(timeout=600) == 0, processes.said(0)
    kept = [tmp_path / "two", "--work", tmp_path / "work", "--mesh", "tensor=8", "--json", tmp_path / "two.json"]
    assert killed(processes, 1, tmp_path / "work" / "measured.jsonl", *arguments, *kept) == [1, -9]
    assert "moejax: process 1 ended before all was done, so process 0 does\n" in processes.said(0)[1]
    assert not (tmp_path / "two").exists()

    processes = Processes(tmp_path)
    assert processes.run(*arguments, *kept) == [0, 0], processes.said(0) + processes.said(1)
    assert "measurements of an earlier run are taken over" in processes.said(0)[1]
    assert processes.said(1) == ("", "")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert json.loads((tmp_path / "two.json").read_text())["bytes"] == sum(map(len, files(tmp_path / "two").values()))


@pytest.mark.slow
def test_two_processes_go_on_in_sequence(small: Path, plan: Path, text_options: list[object], tmp_path: Path) -> None:
    """Blocks that are written are read by both, when the job goes on."""
    arguments = ["compress", small, "--plan", plan, *text_options, "--output"]
    processes = Processes(tmp_path)
    assert processes.start(0, "-m", "moejax", *arguments, tmp_path / "one").wait(timeout=600) == 0, processes.said(0)
    kept = [tmp_path / "two", "--work", tmp_path / "work", "--mesh", "tensor=8"]
    assert killed(processes, 0, tmp_path / ".two.partial" / "journal.jsonl", *arguments, *kept) == [-9, 1]

    processes = Processes(tmp_path)
    assert processes.run(*arguments, *kept) == [0, 0], processes.said(0) + processes.said(1)
    assert "items of an earlier run are taken over" in processes.said(0)[1]
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_other_texts_are_refused(small: Path, plan: Path, text_options: list[object], tmp_path: Path) -> None:
    """And the process that has the first one's does not go on."""
    processes, (_, calibration, *evaluated) = Processes(tmp_path), text_options
    words, other = ["-m", "moejax", "compress", small], tmp_path / "other.txt"
    other.write_text(Path(str(calibration)).read_text()[::-1])
    to = ["--output", tmp_path / "out", "--mesh", "tensor=8", *evaluated]
    going = [
        processes.start(n, *words, "--plan", plan, *to, "--calibration", own, "--distributed", join)
        for n, (own, join) in enumerate(zip((calibration, other), processes.join, strict=True))
    ]
    assert [own.wait(timeout=300) for own in going] == [1, 2], processes.said(0) + processes.said(1)
    assert "process 1 has another calibration than process 0; the same command, files" in processes.said(1)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_first_refuses_ends_both(small: Path, plan: Path, text_options: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    processes = Processes(tmp_path)
    arguments = ["compress", small, "--plan", plan, *text_options, "--output", tmp_path / "out", "--mesh", "tensor=8"]
    assert processes.run(*arguments) == [2, 1], processes.said(0) + processes.said(1)
    assert processes.said(0)[1] == f"moejax: {tmp_path / 'out'}: exists already; give a path that is free\n"
    assert processes.said(1)[1] == "moejax: process 0 ended before all was done, so process 1 does\n"


def test_help_names_the_options() -> None:
    told = moejax("compress", "--help").out
    assert "--mesh" in told and "--distributed" in told
