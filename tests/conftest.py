"""What every test shares: the CPU as JAX's platform, reproducible hypothesis examples, and the tiny checkpoint."""

import os

# Before the first import of JAX: with libtpu installed, it would look for a TPU first and log that there is none.
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import hypothesis
import pytest

from moejax.resources import tiny_checkpoint

# No deadline, because an example's first call compiles; derandomized, so that a run can be repeated.
hypothesis.settings.register_profile("moejax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("moejax")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny trained checkpoint that comes with the package."""
    return tiny_checkpoint()
