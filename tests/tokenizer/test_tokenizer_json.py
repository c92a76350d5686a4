import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from moejax.checkpoint.json_file import MAX_JSON_BYTES
from moejax.errors import InputError
from moejax.tokenizer.tokenizer_json import TokenizerJson, read_tokenizer_json
from small_tokenizers import SPECIAL, byte_level, ranks, sentence_piece

PATH = Path("folder/tokenizer.json")
BYTE_LEVEL = TokenizerJson(byte_level(), PATH)
SENTENCE_PIECE = [
    TokenizerJson(sentence_piece(decoder), PATH)
    for decoder in (None, decoders.Metaspace(), decoders.WordPiece(prefix="▁"))
]


@given(st.lists(st.integers(0, len(ranks()) + len(SPECIAL) + 1), max_size=40))
def test_byte_level_pieces_join_to_what_the_library_decodes(token_ids: list[int]) -> None:
    pieces = list(BYTE_LEVEL.pieces(token_ids))
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids)
    assert all(pieces)


def test_each_byte_level_token_alone() -> None:
    for token_id in range(len(ranks()) + len(SPECIAL)):
        assert "".join(BYTE_LEVEL.pieces([token_id])) == BYTE_LEVEL.decode([token_id])


def test_an_added_token_of_other_letters_is_its_text() -> None:
    library = byte_level()
    library.add_tokens(["<用户>", "né"])
    own = TokenizerJson(library, PATH)
    token_ids = own.encode("né<用户>")
    assert len(token_ids) == 2
    assert "".join(own.pieces(token_ids)) == own.decode(token_ids) == own.library.decode(token_ids)


@given(st.sampled_from(SENTENCE_PIECE), st.data())
def test_sentence_piece_pieces_join_to_what_the_library_decodes(own: TokenizerJson, data: st.DataObject) -> None:
    size = own.library.get_vocab_size()
    token_id = (
        st.integers(0, size)
        | st.integers(size - 10, size)
        | st.sampled_from([0xC3, 0xA9, 0xE4, 0xFF]).map(lambda byte: byte + 2)
    )
    token_ids = data.draw(st.lists(token_id, max_size=30))
    pieces = list(own.pieces(token_ids))
    assert "".join(pieces) == own.decode(token_ids)
    assert all(pieces)


@given(st.sampled_from([BYTE_LEVEL, SENTENCE_PIECE[0]]), st.text())
def test_no_piece_has_half_a_character(own: TokenizerJson, text: str) -> None:
    text = text.replace("\ufffd", "")
    assert "".join(own.pieces(own.encode(text))) == text
    assert not any("\ufffd" in piece for piece in own.pieces(own.encode(text)))


@pytest.mark.parametrize("own", [BYTE_LEVEL, *SENTENCE_PIECE])
def test_a_letter_comes_with_its_token(own: TokenizerJson) -> None:
    a = own.id_of("a")
    assert a is not None
    token_ids = iter([a, a, a])
    for _ in own.pieces(token_ids):
        break
    assert len(list(token_ids)) == 2


class Counting(TokenizerJson):
    """Counts the tokens that were decoded."""

    decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        Counting.decoded += len(token_ids)
        return super().decode(token_ids)


@pytest.mark.parametrize("token_of", [lambda n: 2 + 0xE4, lambda n: n % 2, lambda n: 2 + 256 + n % 7])
def test_the_time_of_pieces_is_linear(token_of: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "decoded", 0)
    token_ids = [token_of(n) for n in range(2000)]
    assert list(Counting(sentence_piece(), PATH).pieces(token_ids)) is not None
    assert Counting.decoded <= 4 * len(token_ids)


def test_ids_of_the_vocabulary() -> None:
    size = len(ranks()) + len(SPECIAL)
    assert 0 in BYTE_LEVEL and size - 1 in BYTE_LEVEL
    assert not any(token_id in BYTE_LEVEL for token_id in (-1, size, 2**31, 2**32, 2**80))
    assert BYTE_LEVEL.id_of("[EOS]") == len(ranks()) + 1 and BYTE_LEVEL.id_of("[NONE]") is None
    assert set(BYTE_LEVEL.special_tokens) == set(SPECIAL)


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match="are more than the"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "is not a tokenizer that the tokenizers"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"tokenizer\.json:? {reason}"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_what_makes_the_library_end_the_process_is_refused(tmp_path: Path) -> None:
    fields = json.loads(byte_level().to_str())
    fields["model"]["continuing_subword_prefix"] = "\0"
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="continuing_subword_prefix"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_is_an_error() -> None:
    own = TokenizerJson(sentence_piece(decoders.Strip("a", 0, 2)), PATH)
    with pytest.raises(InputError, match=r"folder/tokenizer\.json is not a tokenizer .* can use: index out of bounds"):
        own.decode(own.encode("cca")[-1:])


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    library: tokenizers.Tokenizer = byte_level()
    library.save(str(tmp_path / "tokenizer.json"))
    own = read_tokenizer_json(tmp_path / "tokenizer.json")
    text = "The fox[EOS]<think>北京<|im_end|>"
    assert own.encode(text) == library.encode(text).ids
    assert own.decode(own.encode(text)) == "The fox<think>北京"
