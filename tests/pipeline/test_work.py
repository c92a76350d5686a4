"""A job that is stopped and begun again goes on where it was, and its folder is that of one that was not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.load import open_checkpoint
from moejax.errors import InputError, Note
from moejax.ledger import ledger_of
from moejax.pipeline import job as main_job
from moejax.pipeline.check import require_original
from moejax.pipeline.work import Work, work_in
from moejax.progress import silent
from native_checkpoint import files
from small_job import RECIPE, Job
from stopped import MADE_OF, stopped_again_and_again


def test_what_is_found_is_found_once(tmp_path: Path) -> None:
    value = {"cost": [0.1 + 0.2, 1e-300], "kept": [1, 2]}
    with work_in(tmp_path / "w", MADE_OF) as work:
        assert work.once("a", lambda: value) == value
        assert work.once("a", lambda: pytest.fail("asked again")) == value
    taken_over = pytest.warns(Note, match="w: 1 measurements of an earlier run are taken over$")
    with taken_over, work_in(tmp_path / "w", MADE_OF) as work:
        assert work.once("a", lambda: pytest.fail("asked again")) == value
        assert work.once("b", lambda: 2) == 2


def test_a_line_that_was_cut_short_is_found_again(tmp_path: Path) -> None:
    with work_in(tmp_path, MADE_OF) as work:
        work.once("a", lambda: 1)
        work.once("b", lambda: 2)
    file = tmp_path / "measured.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(Note, match=": 1 measurements"), work_in(tmp_path, MADE_OF) as work:
        assert work.once("a", lambda: 7) == 1
        assert work.once("b", lambda: 8) == 8
    with pytest.warns(Note, match=": 2 measurements"), work_in(tmp_path, MADE_OF) as work:
        assert work.once("b", lambda: 9) == 8


def test_without_a_folder_nothing_is_kept() -> None:
    with work_in(None, MADE_OF) as work:
        assert (work.once("a", lambda: 1), work.once("a", lambda: 2), work.job) == (1, 2, None)


def test_another_job_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    with work_in(tmp_path, MADE_OF) as work:
        work.once("a", lambda: 1)
    with (
        pytest.raises(InputError, match="was begun with another recipe; give that again, or another folder for --work"),
        work_in(tmp_path, MADE_OF | {"recipe": "b"}),
    ):
        pytest.fail("began")
    (tmp_path / "measured.jsonl").write_text('{"job": "[1"}\n')
    with pytest.raises(InputError, match="was begun with another recipe"), work_in(tmp_path, MADE_OF):
        pytest.fail("began")


def test_states_are_those_of_the_last_part_and_of_their_own_job(tmp_path: Path) -> None:
    states = {"": np.arange(6.0).reshape(2, 3), "a b of layers 1, 2": np.ones((1, 2), np.float32)}
    with work_in(tmp_path, MADE_OF) as work:
        assert work.states("s") is None
        work.keep_states("s", 0, {"": np.zeros(1)})
        work.keep_states("s", 3, states)
    with work_in(tmp_path, MADE_OF) as work:
        passed, found = work.states("s") or (None, {})
        assert passed == 3 and found.keys() == states.keys()
        assert all(np.array_equal(found[name], own) for name, own in states.items())
        assert work.states("other") is None
    (tmp_path / "measured.jsonl").unlink()
    with work_in(tmp_path, MADE_OF | {"recipe": "b"}) as work:
        assert work.states("s") is None
    (tmp_path / "measured.jsonl").unlink()
    with work_in(tmp_path, MADE_OF) as work:
        work.keep_states("s", 1, states)
        work.drop_states("s")
        assert work.states("s") is None and not list(tmp_path.glob("*.npz"))


def test_states_whose_bytes_are_others_now_are_none(tmp_path: Path) -> None:
    with work_in(tmp_path, MADE_OF) as work:
        work.keep_states("s", 0, {"a": np.ones(1000, np.float32)})
        (file,) = tmp_path.glob("s-*.npz")
        whole = file.read_bytes()
        for damaged in (whole[:-3], whole[:100], b"", whole.replace(b"\x00\x00\x80\x3f", b"\x00\x00\x80\x3e", 1)):
            assert damaged != whole
            file.write_bytes(damaged)
            assert work.states("s") is None
        file.write_bytes(whole)
        assert work.states("s") is not None


def test_a_full_disk_is_said_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with work_in(tmp_path, MADE_OF) as work, pytest.raises(OSError, match="No space left") as error:
        work.keep_states("s", 0, {"a": np.ones(3)})
    assert error.value.filename == str(tmp_path / ".s.partial")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="another process is at work in it")
    with work_in(tmp_path, MADE_OF), refused, work_in(tmp_path, MADE_OF):
        pytest.fail("began")
    with work_in(tmp_path, MADE_OF):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/w: cannot be worked in"), work_in(tmp_path / "file" / "w", MADE_OF):
        pytest.fail("began")


@pytest.mark.filterwarnings("ignore::moejax.errors.Note")
def test_a_job_goes_on_wherever_it_was_stopped(
    small: Path,
    calibration_text: Path,
    heldout_text: Path,
    tokenize: Callable[[Path], np.ndarray],
    job: Job,
    prepared: main_job.Prepared,
    tmp_path: Path,
) -> None:
    """While it measures, while plans are tried and while items are written: nothing is done twice."""
    calibrated, made = prepared.trials.calibrated, dict(prepared.shapes.provenance)
    checkpoint, output = require_original(open_checkpoint(small)), tmp_path / "out"

    def run(work: Work) -> main_job.Result:
        own = main_job.prepare(checkpoint, calibrated, RECIPE, made, silent, work)
        return main_job.compress_checkpoint(own, output, job.budget, tokenize(heldout_text), ledger_of(None), silent)

    result, runs = stopped_again_and_again(run, tmp_path / "work", [4, 3, 6, 3, 4, 2])
    names = [name for added in runs for name in added]
    assert len(names) == len(set(names))
    assert {name.split(" ")[0] for name in names} >= {"measures", "trying", "layer_0", "outer"}
    begun_with = [added[0].split(" ")[0] for added in runs]
    assert begun_with == ["measures", "states", "measures", "trying", "states", "layer_2", "outer"]
    assert result.bytes == job.written
    assert files(output) == files(job.output)


def test_a_folder_is_one_job_s_from_its_beginning(tmp_path: Path) -> None:
    """Before anything is found, and again where what says whose it is was cut short."""
    with work_in(tmp_path, MADE_OF):
        pass
    with pytest.raises(InputError, match="another recipe"), work_in(tmp_path, MADE_OF | {"recipe": "b"}):
        pytest.fail("began")
    file = tmp_path / "measured.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    with work_in(tmp_path, MADE_OF) as work:
        work.once("a", lambda: 1)
    with pytest.warns(Note, match=": 1 measurements"), work_in(tmp_path, MADE_OF) as work:
        assert work.once("a", lambda: 2) == 1


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    with work_in(tmp_path, MADE_OF) as work, pytest.raises(InputError, match=r"^costs: a measurement is not finite"):
        work.once("costs", lambda: [1.0, float("nan")])
