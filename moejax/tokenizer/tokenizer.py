"""The tokenizer that lies beside a checkpoint's weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.native import MANIFEST
from moejax.errors import InputError, brief
from moejax.tokenizer.tiktoken_model import read_tiktoken_model
from moejax.tokenizer.tokenizer_json import read_tokenizer_json
from moejax.tokenizer.utf8 import is_text

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_JSON, _TIKTOKEN_MODEL = "tokenizer.json", "tiktoken.model"


class Backend(Protocol):
    """What a kind of tokenizer's file can do; ids are those of the model."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text without surrogates; where it spells a special token, that token."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, leaving out special ones and ids that are none of the vocabulary."""

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The same text in pieces; see `text_pieces`."""

    def id_of(self, token: str) -> int | None:
        """The id of the token that is spelled so."""

    def __contains__(self, token_id: int) -> bool:
        """Whether the vocabulary has the id."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that `encode` takes for one token whatever stands around them, unlike other text."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, and the two special tokens that evaluation and generation need.

    Attributes:
      bos_token_id: the token that opens every text, or None where the tokenizer's config does not ask for one
        (`add_bos_token`).
      eos_token_ids: the tokens that end a generated text; empty where no config names one.
    """

    backend: Backend
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> np.ndarray:
        """The token ids of `text`, int32 of shape (T,), with no special token added.

        A special token that `text` spells becomes that token, as in Hugging Face transformers; what others wrote into a
        chat goes through `chat_template.encode_chat`, where it does not.

        Raises:
          InputError: `text` has a lone surrogate, which is half of a character.
        """
        if not is_text(text):
            raise InputError("the text has a lone surrogate, which is half of a character; Unicode text is needed")
        return np.array(self.backend.encode(text), np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of the token ids, special tokens left out."""
        return self.backend.decode([int(token_id) for token_id in token_ids])


def text_pieces(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: "".join(text_pieces(tokenizer, ids)) == tokenizer.decode(ids).

    A piece is yielded as soon as later tokens cannot change it: it ends with a whole character, and is never empty. The
    time is linear in the number of tokens.
    """
    return tokenizer.backend.pieces(map(int, token_ids))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`: `tokenizer.json`, else `tiktoken.model`, and its configs if any.

    Raises:
      InputError: a file is missing or cannot be read, or a special token is not in the vocabulary.
    """
    config = read_if_there(folder / TOKENIZER_CONFIG)
    backend = _load_backend(folder, config)
    bos_token_id = _special_token_id(backend, config, "bos_token", folder) if config.get("add_bos_token") else None
    return Tokenizer(backend, bos_token_id, _eos_token_ids(backend, config, folder))


def special_token(config: Mapping[str, Any], field: str, file: Path) -> str | None:
    """A token's text, which the tokenizer's config in `file` gives as a string or as an added token's description."""
    token = config.get(field)
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not is_text(content):
        raise InputError(f"{file}: {field} is {brief(token)}; a token's text is needed")
    return content


def read_if_there(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file."""
    return read_json_object(path) if path.exists() else {}


def _load_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    path, other = folder / _TOKENIZER_JSON, folder / _TIKTOKEN_MODEL
    if path.exists():
        return read_tokenizer_json(path)
    if other.exists():
        return read_tiktoken_model(other, config)
    raise InputError(f"{path} does not exist, nor does {_TIKTOKEN_MODEL}; a checkpoint's folder must hold one of them")


def _eos_token_ids(backend: Backend, config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """The first config that names an end wins, in the order in which generation looks for it."""
    for file in ("generation_config.json", "config.json", MANIFEST):
        fields = read_if_there(folder / file)
        if file == MANIFEST:  # Hugging Face's config is in it
            fields = fields.get("config", {})
        found = fields.get("eos_token_id") if isinstance(fields, dict) else None
        if found is not None:
            return _checked(backend, found, folder / file)
    token_id = _special_token_id(backend, config, "eos_token", folder)
    return () if token_id is None else (token_id,)


def _checked(backend: Backend, found: object, file: Path) -> tuple[int, ...]:
    token_ids = found if isinstance(found, list) else [found]
    for token_id in token_ids:
        if type(token_id) is not int or token_id not in backend:
            raise InputError(f"{file}: eos_token_id has {brief(token_id)}; token ids of the vocabulary are needed")
    return tuple(token_ids)


def _special_token_id(backend: Backend, config: Mapping[str, Any], field: str, folder: Path) -> int | None:
    content = special_token(config, field, folder / TOKENIZER_CONFIG)
    token_id = None if content is None else backend.id_of(content)
    if content is not None and token_id is None:
        raise InputError(f"{folder}: {field} {content!r} of {TOKENIZER_CONFIG} is not in the tokenizer's vocabulary")
    return token_id
