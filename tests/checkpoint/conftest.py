"""A native checkpoint on disk, to read and to damage."""

import shutil
from pathlib import Path

import pytest

from moejax.checkpoint.native_writer import write_native
from moejax.model import DeepseekV3
from native_checkpoint import BUDGET, DESCRIPTION, random_model


@pytest.fixture(scope="session")
def model() -> DeepseekV3:
    return random_model()


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("copied")
    (folder / "tokenizer.json").write_text('{"vocab": "ö"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


@pytest.fixture(scope="session")
def written(model: DeepseekV3, copied: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    output = tmp_path_factory.mktemp("written") / "out"
    write_native(model, output, DESCRIPTION, copied, BUDGET)
    return output


@pytest.fixture
def own_copy(written: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))
