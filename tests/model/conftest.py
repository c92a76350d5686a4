"""What the tests of the model share: float64, and the small models of `model_cases` read from checkpoints on disk."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from model_cases import CASES, write_hf_checkpoint
from moejax.checkpoint.huggingface import open_huggingface
from moejax.model import DeepseekV3


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets JAX compute in float64 while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def build_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DeepseekV3]:
    """Gives the model of one of `CASES` by its name."""

    @functools.cache
    def build(name: str) -> DeepseekV3:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        write_hf_checkpoint(folder, case.config, case.tensors())
        return load(folder)

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> DeepseekV3:
    """The trained FP8 checkpoint that comes with the package."""
    return load(tiny)


def load(folder: Path) -> DeepseekV3:
    checkpoint = open_huggingface(folder)
    return DeepseekV3(checkpoint.config, checkpoint.leaf)
