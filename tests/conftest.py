"""What every test shares: JAX on the CPU, reproducible hypothesis examples, the checkpoints that tests work on."""

import importlib.metadata
import itertools
import json
import os
import re

# Before the first import of JAX: with libtpu installed, it would look for a TPU first and log that there is none.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compiling, which takes half as long without optimizations.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Meshes have these devices; what names none runs on the first, as ever.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have lost the flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import jax
import pytest
from xdist.scheduler import LoadFileScheduling

from command_line import refused, run
from moejax import machine
from moejax.resources import tiny_checkpoint
from small_checkpoint import random_scores, words, write_published_checkpoint, write_small_checkpoint
from small_job import FORMATS

# No deadline, because an example's first call compiles; derandomized, so that a run can be repeated.
hypothesis.settings.register_profile("moejax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("moejax")


# Modules that look at the same compressed checkpoints; what one of them compiles, most of the others need.
_SHARING = ("tests/commands/", "tests/pipeline/", "tests/test_bad_", "tests/test_cli.py")
_LONGEST = "tests/pipeline/test_prediction.py"


def _turn(nodeid: str) -> int:
    """When a test has its turn: one process begins with the modules that share, another with the longest of all."""
    return 1 if nodeid.startswith(_LONGEST) else 0 if nodeid.startswith(_SHARING) else 2


class _SharingScheduling(LoadFileScheduling):  # type: ignore[misc]
    """Each process takes whole modules, but those that share go to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "sharing" if _turn(nodeid) == 0 else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _SharingScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.nodeid))


# Looking how many programs there are takes longer than many a test.
_LOOKED_AFTER = 20
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets what was compiled before there is too much of it."""
    yield
    if request.node.get_closest_marker("slow") or next(_tests) % _LOOKED_AFTER == 0:
        machine.bound_programs()


@pytest.fixture(autouse=True)
def kept_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job compiles, the next one of the same process needs."""
    monkeypatch.setattr("moejax.pipeline.job.machine", SimpleNamespace(forget_programs=lambda: None))


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Optimizations again, for what computes longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny trained checkpoint that comes with the package."""
    return tiny_checkpoint()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small random checkpoint; no test changes it."""
    folder = tmp_path_factory.mktemp("small")
    write_small_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def small_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random checkpoint in DeepSeek's published formats; no test changes it."""
    folder = tmp_path_factory.mktemp("small_fp8")
    write_published_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def small_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routing statistics of the small checkpoints, some experts far more important than others."""
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    file.write_text(json.dumps(random_scores(seed=1)))
    return file


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of three chunks for the small checkpoint."""
    file = tmp_path_factory.mktemp("calibration") / "calibration.txt"
    file.write_text(words(seed=1, count=450))
    return file


@pytest.fixture(scope="session")
def heldout_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another of one chunk."""
    file = tmp_path_factory.mktemp("heldout") / "heldout.txt"
    file.write_text(words(seed=2, count=180))
    return file


@pytest.fixture(scope="session")
def text_options(calibration_text: Path, heldout_text: Path) -> list[object]:
    """The options of `moejax compress` that name the texts."""
    return ["--calibration", calibration_text, "--text", heldout_text]


@pytest.fixture(scope="session")
def compressed(small: Path, text_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint in the smallest budget that a refusal names, with few formats; `figures.json` and `printed`
    lie beside it."""
    folder, recipe = tmp_path_factory.mktemp("compressed"), tmp_path_factory.mktemp("recipe") / "few.toml"
    recipe.write_text(f"formats = {json.dumps(FORMATS)}")
    options = ["--output", folder / "out", "--recipe", recipe, *text_options]
    message = refused(folder, "compress", small, "--budget", "100KB", *options)
    smallest = re.search(r"a budget of 100.00 KB \(100000 bytes\) cannot be met; .* \((\d+) bytes\)$", message.strip())
    assert smallest is not None, message
    budget = ["--budget", f"{smallest[1]}B", "--json", folder / "figures.json"]
    (folder / "printed").write_text(run("compress", small, *budget, *options))
    return folder / "out"
