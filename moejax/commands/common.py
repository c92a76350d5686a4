"""What several commands do."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.toml_file import read_toml
from moejax.errors import InputError
from moejax.evaluate.text import Text, chunks, default_evaluation_text, read_text
from moejax.machine import peak_memory
from moejax.model import Config, require_tokens
from moejax.pipeline.recipe import Recipe, recipe_from_toml
from moejax.resources import config_path
from moejax.tokenizer import Tokenizer

# Enough of the default text for stable figures in a minute on two cores.
_EVALUATION_BYTES = 200_000


def evaluation_text(path: Path | None) -> Text:
    """The text to evaluate on."""
    return read_text(path) if path else default_evaluation_text(_EVALUATION_BYTES)


def tokenize(text: Text, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """A text's chunks. Raises InputError if it is too short, or has a token that is none of the model's."""
    try:
        tokens = chunks(tokenizer.encode(text.content), bos_token_id=tokenizer.bos_token_id)
        require_tokens(tokens, config)
        return tokens
    except InputError as error:
        raise InputError(f"{text.source}: {error}") from None


def read_recipe(name: str) -> Recipe:
    """A recipe by the name of one that comes with the package, or from a TOML file."""
    file = Path(name) if Path(name).suffix == ".toml" else config_path("recipes", name)
    return recipe_from_toml(read_toml(file), str(file))


def cost_of_the_run(started: float) -> dict[str, Any]:
    """Seconds since `started` and the peak memory of the process."""
    return {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
