"""The tokenizer that lies beside a checkpoint's weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moejax.checkpoint.native import MANIFEST
from moejax.errors import InputError


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, and the two special tokens that evaluation and generation need.

    Attributes:
      bos_token_id: the token that opens every text, or None where the tokenizer's config does not ask for one
        (`add_bos_token`).
      eos_token_ids: the tokens that end a generated text; empty where no config names one.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> np.ndarray:
        """The token ids of `text`, int32 of shape (T,), with no special token added."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of the token ids, special tokens left out."""
        return self.backend.decode([int(token_id) for token_id in token_ids])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`, from its `tokenizer.json` and, where they exist, its configs.

    Raises:
      InputError: a file is missing or cannot be read, or a special token is not in the vocabulary.
    """
    backend = _load_backend(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    bos_token_id = _special_token_id(backend, config, "bos_token", folder) if config.get("add_bos_token") else None
    return Tokenizer(backend, bos_token_id, _eos_token_ids(backend, config, folder))


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise InputError(f"{path} does not exist; a checkpoint's folder must hold its tokenizer in that file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises the bare class.
        raise InputError(f"{path} is not a tokenizer that the tokenizers library reads: {error}") from error
    # A file saved after training carries its batches' truncation and padding, which would cut a long text.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _eos_token_ids(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """The first config that names an end wins, in the order in which generation looks for it."""
    for fields in (_read_json(folder / "generation_config.json"), _model_config(folder)):
        token_ids = fields.get("eos_token_id")
        if token_ids is not None:
            return tuple(token_ids) if isinstance(token_ids, list) else (token_ids,)
    token_id = _special_token_id(backend, config, "eos_token", folder)
    return () if token_id is None else (token_id,)


def _model_config(folder: Path) -> dict[str, Any]:
    """Hugging Face's config, which a native checkpoint has in its manifest."""
    return _read_json(folder / "config.json") or _read_json(folder / MANIFEST).get("config", {})


def _special_token_id(backend: tokenizers.Tokenizer, config: dict[str, Any], field: str, folder: Path) -> int | None:
    """The id of a token that the tokenizer's config gives as a string or as an added token's description."""
    token = config.get(field)
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return None
    token_id = backend.token_to_id(content)
    if token_id is None:
        raise InputError(
            f"{folder}: {field} {content!r} of tokenizer_config.json is not in tokenizer.json's vocabulary"
        )
    return token_id


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds a JSON {type(fields).__name__}; a JSON object is needed")
    return fields
