from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from moejax.tokenizer.utf8 import decode_pieces, is_text


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode) | st.sampled_from([b"\xf0\x9f", b"\x98"])))
def test_pieces_of_any_bytes_join_to_the_text(chunks: list[bytes]) -> None:
    pieces = list(decode_pieces(chunks))
    assert "".join(pieces) == b"".join(chunks).decode(errors="replace")
    assert all(pieces)


@given(st.text())
def test_characters_come_whole_and_as_soon_as_they_are(text: str) -> None:
    came: list[int] = []

    def single_bytes() -> Iterator[bytes]:
        for n, byte in enumerate(text.encode(), start=1):
            came.append(n)
            yield bytes([byte])

    seen = ""
    for piece in decode_pieces(single_bytes()):
        seen += piece
        assert len(seen.encode()) == len(came)
    assert seen == text


def test_half_a_character_is_no_text() -> None:
    assert is_text("") and is_text("é🙂\x00")
    assert not is_text("\ud83d") and not is_text(b"a") and not is_text(None)
