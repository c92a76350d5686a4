"""The files that come with the package: the tiny trained checkpoint and the configurations."""

import importlib.resources
from pathlib import Path

from moejax.errors import InputError

_PACKAGE = Path(str(importlib.resources.files("moejax")))


def tiny_checkpoint() -> Path:
    """The folder of the tiny trained DeepSeek-V3 checkpoint, in Hugging Face's layout with FP8 blocks."""
    return _PACKAGE / "tiny"


def config_path(kind: str, name: str) -> Path:
    """The file `name` among the configurations of one kind (a folder: "models", "recipes", "expert_scores",
    "sensitivity"); its extension may be left out.

    Raises:
      InputError: there is no such configuration; the message lists those there are.
    """
    paths = sorted((_configs() / kind).glob("*.*"))
    for path in paths:
        if name in (path.name, path.stem):
            return path
    available = ", ".join(path.stem for path in paths) or "none"
    raise InputError(f"there is no configuration {name!r} among the {kind}; available: {available}")


def _configs() -> Path:
    """In a wheel the configurations lie inside the package, in a source checkout beside it."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"
