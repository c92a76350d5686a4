"""Text that may not be Unicode, and UTF-8 that comes in pieces."""

import codecs
from collections.abc import Iterable, Iterator
from typing import TypeGuard


def decode_pieces(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text of bytes as it becomes whole.

    "".join(decode_pieces(chunks)) == b"".join(chunks).decode(errors="replace"). Each piece is whole characters and not
    empty; bytes that are no UTF-8 become U+FFFD once no byte can mend them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        if piece := decoder.decode(chunk):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a string without lone surrogates, halves of characters that UTF-8 does not have."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
