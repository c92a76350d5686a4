"""The package under test, used from another folder: in CI the installed wheel, elsewhere perhaps a source checkout."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

import moejax

PACKAGE = Path(moejax.__file__).parent
CHECKOUT = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def files(folder: Path) -> list[str]:
    """The files that belong into a wheel, by their path in `folder`."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if "__pycache__" not in path.parts)


@pytest.mark.parametrize(("source", "installed"), [(CHECKOUT / "moejax", PACKAGE), (CHECKOUT / "configs", CONFIGS)])
def test_every_file_of_the_checkout_is_in_the_package_under_test(source: Path, installed: Path) -> None:
    names = files(source)
    assert names
    equal, different, missing = filecmp.cmpfiles(source, installed, names, shallow=False)
    assert (sorted(equal), different, missing) == (names, [], [])


def test_an_installed_package_has_its_configurations_inside() -> None:
    assert CONFIGS.parent == PACKAGE or PACKAGE.parent == CHECKOUT


def run(folder: Path, *arguments: str) -> str:
    """What `python -m moejax` prints when it is started in `folder` and succeeds."""
    command = [sys.executable, "-W", "error", "-m", "moejax", *arguments]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_help_names_the_commands(tmp_path: Path) -> None:
    printed = run(tmp_path, "--help")
    for command in ("compress", "evaluate", "generate", "inspect", "plan"):
        assert command in printed


def test_inspect_takes_the_tiny_checkpoint_by_default(tmp_path: Path) -> None:
    assert "deepseek_v3" in run(tmp_path, "inspect")
    assert not list(tmp_path.iterdir())
