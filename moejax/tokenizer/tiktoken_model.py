"""`tiktoken.model`: byte-pair tokens by rank, as Moonlight and Kimi-K2 publish their tokenizer.

The file holds tokens alone, one `base64 rank` a line. How text is split before byte pairs are merged, how it is cut
into pieces, and how special tokens are numbered, is what these models' own code does: `tokenization_moonshot.py` of
https://huggingface.co/moonshotai/Moonlight-16B-A3B and `tokenization_kimi.py` of
https://huggingface.co/moonshotai/Kimi-K2-Instruct. Special tokens are named in `tokenizer_config.json`.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from moejax.checkpoint.json_file import read_bounded
from moejax.errors import InputError, brief
from moejax.tokenizer.utf8 import decode_pieces, is_text

MAX_BYTES = 32_000_000
"""The largest `tiktoken.model` read; Kimi-K2's 163,584 tokens take 2.8 million bytes."""

RESERVED = 256
"""Special tokens after the last rank, named or not: 163,584 and these are Moonlight's and Kimi-K2's vocabulary.

(Moonlight's code numbers two more, which its model has no embedding for.)
"""

MAX_SPECIAL = 10_000
"""The most special tokens that names in the config may ask for."""

# Capitals then small letters, with a contraction's end; a run of Chinese characters is a word of its own.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How text is split into words, within which byte pairs are merged."""

# Text is encoded in pieces that are no longer, and have no longer run of blanks or of anything else. Where a piece ends
# a token ends, so these numbers are part of what the tokenizer is.
_MAX_PIECE, _MAX_RUN = 400_000, 25_000
_RUN = re.compile(r"\s+|\S+")


@dataclass(frozen=True)
class TiktokenModel:
    """One of the two kinds of `tokenizer.Backend`.

    Attributes:
      library: what encodes.
      left_out: the special tokens that `decode` leaves out: all but those that the config says are not special.
    """

    library: tiktoken.Encoding
    left_out: frozenset[int]

    def encode(self, text: str) -> list[int]:
        return [n for piece in _pieces(text) for n in self.library.encode(piece, allowed_special="all")]

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes, token_ids)).decode(errors="replace")

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        return decode_pieces(map(self._bytes, token_ids))

    def id_of(self, token: str) -> int | None:
        try:
            return self.library.encode_single_token(token)
        except KeyError:
            return None

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < self.library.n_vocab

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(self.library.special_tokens_set)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self.left_out or token_id not in self:
            return b""
        return self.library.decode_single_token_bytes(token_id)


def read_tiktoken_model(path: Path, config: Mapping[str, Any]) -> TiktokenModel:
    """The tokenizer of the file `path`, its special tokens named by `config`, the fields of `tokenizer_config.json`.

    With n ranks in the file, the special tokens are n, ..., n + RESERVED - 1, and on to the last that has a name; one
    without is `<|reserved_token_ID|>`.

    Raises:
      InputError: the file cannot be read, is larger than `MAX_BYTES`, or a line is not the next token and its rank; or
        the config's names are not of special tokens, or are ambiguous.
    """
    ranks = _read_ranks(path)
    names = _special_names(path, config, len(ranks))
    library = tiktoken.Encoding(
        path.name,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: token_id for token_id, (name, _) in names.items()},
    )
    return TiktokenModel(library, frozenset(token_id for token_id, (_, special) in names.items() if special))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The bytes of token 0, 1, ...: line n + 1 is that of token n."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(path, MAX_BYTES, "tiktoken").splitlines(), start=1):
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not a token in base64 and its rank ({error})") from None
        if not token or token in ranks:
            raise InputError(f"{path}: line {number} is an empty token or one that was there before; each comes once")
        if rank != b"%d" % len(ranks):
            raise InputError(
                f"{path}: line {number} has rank {brief(rank.decode(errors='replace'))}; {len(ranks)} is next"
            )
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"{path}: lacks the byte {missing[0]:#04x} as a token; all 256 are needed")
    return ranks


def _special_names(path: Path, config: Mapping[str, Any], first: int) -> dict[int, tuple[str, bool]]:
    """By id: the token's name, and whether it is special, that is, left out of text."""
    source = path.with_name("tokenizer_config.json")
    named = config.get("added_tokens_decoder", {})
    if not isinstance(named, dict):
        raise InputError(f"{source}: added_tokens_decoder is {brief(named)}; an object from id to token is needed")
    own: dict[int, tuple[str, bool]] = {}
    for key, fields in named.items():
        name = fields.get("content") if isinstance(fields, dict) else None
        if not is_text(name) or not name:
            raise InputError(f"{source}: token {brief(key)} of added_tokens_decoder has no content; a name is needed")
        if not re.fullmatch(r"[0-9]{1,9}", key) or not first <= int(key) < first + MAX_SPECIAL:
            raise InputError(
                f"{source}: {name!r} of added_tokens_decoder is token {brief(key)}; "
                f"{first} to {first + MAX_SPECIAL - 1} follow the ranks of {path.name}"
            )
        own[int(key)] = (name, fields.get("special") is True)
    last = max([first + RESERVED - 1, *own])
    names = {n: own.get(n, (f"<|reserved_token_{n}|>", True)) for n in range(first, last + 1)}
    for name, following in pairwise(sorted(name for name, _ in names.values())):
        if following.startswith(name):
            raise InputError(f"{source}: the token {name!r} begins the token {following!r}, which makes text ambiguous")
    return names


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MAX_PIECE):
        piece = text[start : start + _MAX_PIECE]
        runs = (run.span() for run in _RUN.finditer(piece))
        cuts = [cut for begin, end in runs for cut in range(begin + _MAX_RUN, end, _MAX_RUN)]
        yield from (piece[begin:end] for begin, end in pairwise([0, *cuts, len(piece)]))
