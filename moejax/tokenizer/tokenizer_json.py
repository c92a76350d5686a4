"""`tokenizer.json`: a tokenizer that the tokenizers library wrote and runs."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, pre_tokenizers

from moejax.checkpoint.json_file import MAX_JSON_BYTES, parse_json_object, read_bounded
from moejax.errors import InputError
from moejax.tokenizer.utf8 import decode_pieces

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def _bytes_of_letters() -> dict[str, int]:
    """The bytes that byte-level tokens spell: a letter below U+0100 is its own byte, the others follow in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [ord(letter) for letter in letters if ord(letter) < 256]
    return dict(zip(letters, own + sorted(set(range(256)).difference(own)), strict=True))


_BYTES = _bytes_of_letters()


@dataclass(frozen=True)
class TokenizerJson:
    """One of the two kinds of `tokenizer.Backend`; what the library cannot do is an InputError that names `path`."""

    library: tokenizers.Tokenizer
    path: Path

    def encode(self, text: str) -> list[int]:
        with _errors_of_the_library(self.path):
            return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        with _errors_of_the_library(self.path):
            return self.library.decode(token_ids)

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        if isinstance(self.library.decoder, decoders.ByteLevel):
            return decode_pieces(map(self._bytes, token_ids))
        return self._pieces_by_decoding(token_ids)

    def id_of(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < 2**32 and self.library.id_to_token(token_id) is not None

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.library.get_added_tokens_decoder().values())

    def _bytes(self, token_id: int) -> bytes:
        """What the byte-level decoder joins: a token's letters stand for bytes, unless one of them stands for none."""
        token = None if token_id in self._left_out else self.library.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:
            return token.encode()

    def _pieces_by_decoding(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Decodes the last piece's tokens with those that came after it, and yields by how much the text grew.

        The last piece stands before because decoders treat a text's first token differently (they may strip its
        leading space). A token that spells a byte waits for one that does not: it decodes differently by its neighbours
        on both sides. Tokens that give no text wait too.
        """
        before: list[int] = []
        waiting: list[int] = []
        for token_id in token_ids:
            waiting.append(token_id)
            if self._may_change(token_id):
                continue
            piece = self._growth(before, waiting)
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, waiting = waiting, []
        if piece := self._growth(before, waiting):
            yield piece

    def _growth(self, before: list[int], waiting: list[int]) -> str:
        return self.decode(before + waiting)[len(self.decode(before)) :]

    def _may_change(self, token_id: int) -> bool:
        token = self.library.id_to_token(token_id)
        return token is None or token_id in self._left_out or _BYTE_FALLBACK.fullmatch(token) is not None

    @cached_property
    def _left_out(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        return frozenset(n for n, token in self.library.get_added_tokens_decoder().items() if token.special)


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Raises InputError if `path` cannot be read, or is not a tokenizer."""
    content = read_bounded(path, MAX_JSON_BYTES, "JSON")
    model = parse_json_object(content, path).get("model")
    if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
        # The library cuts as many bytes off each second half, whatever is there, and may end the process.
        raise InputError(f"{path}: its byte pairs have a continuing_subword_prefix; a tokenizer without one is needed")
    with _errors_of_the_library(path):
        library = tokenizers.Tokenizer.from_buffer(content)
    # A file saved after training carries its batches' truncation and padding, which would cut a long text.
    library.no_truncation()
    library.no_padding()
    return TokenizerJson(library, path)


@contextmanager
def _errors_of_the_library(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # Its panics are no Exceptions; their class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path} is not a tokenizer that the tokenizers library can use: {error}") from error
