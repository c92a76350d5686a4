import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from moejax.errors import InputError
from moejax.tokenizer import tiktoken_model
from moejax.tokenizer.tiktoken_model import MAX_BYTES, PATTERN, RESERVED, TiktokenModel, read_tiktoken_model
from small_tokenizers import SPECIAL, byte_level, ranks, write_tiktoken

FIRST = len(ranks())
# What the pattern tells apart, and what takes part in byte pairs.
PARTS = (
    "The",
    " quick",
    "it'LL",
    "n't ",
    "12345",
    "北京市",
    "中文English",
    "テキスト",
    "한국",
    "\r\n",
    "\t",
    "   ",
    "é́",
    "//",
    "🙂",
)
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=12).map("".join)


def read(folder: Path) -> TiktokenModel:
    return read_tiktoken_model(folder / "tiktoken.model", json.loads((folder / "tokenizer_config.json").read_text()))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TiktokenModel:
    folder = tmp_path_factory.mktemp("tiktoken")
    write_tiktoken(folder)
    return read(folder)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiktoken(tmp_path)
    return tmp_path


def test_words_are_split_as_published() -> None:
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    text = "中文English混合 don't SHOUTED'VE camelCase 12345  x= 1\n\n y"
    words = [word for word, _ in split.pre_tokenize_str(text)]
    assert words == [
        *("中文", "English", "混合", " don't", " SHOUTED'VE", " camel", "Case", " ", "123", "45"),
        *(" ", " x", "=", " ", "1", "\n\n", " y"),
    ]


@given(text=TEXTS)
def test_tokens_are_those_of_the_tokenizers_library(
    own: TiktokenModel, library: tokenizers.Tokenizer, text: str
) -> None:
    assert own.encode(text) == library.encode(text).ids
    assert own.decode(own.encode(text)) == text


@given(parts=st.lists(st.sampled_from(SPECIAL) | TEXTS, max_size=6))
def test_special_tokens_are_those_of_the_tokenizers_library(
    own: TiktokenModel, library: tokenizers.Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    assert own.encode(text) == library.encode(text).ids
    assert own.decode(own.encode(text)) == library.decode(library.encode(text).ids)


def test_each_token_decodes_to_its_bytes(own: TiktokenModel) -> None:
    for token, rank in ranks().items():
        assert own.library.decode_single_token_bytes(rank) == token
        assert own.decode([rank]) == token.decode(errors="replace")


@given(token_ids=st.lists(st.integers(0, FIRST + RESERVED + 3), max_size=40))
def test_pieces_join_to_the_text(own: TiktokenModel, token_ids: list[int]) -> None:
    assert "".join(own.pieces(token_ids)) == own.decode(token_ids)
    assert all(own.pieces(token_ids))


def test_special_tokens_follow_the_ranks(own: TiktokenModel) -> None:
    assert [own.id_of(token) for token in SPECIAL] == list(range(FIRST, FIRST + len(SPECIAL)))
    assert own.id_of(f"<|reserved_token_{FIRST + 100}|>") == FIRST + 100
    assert own.id_of(f"<|reserved_token_{FIRST}|>") is None
    assert FIRST + RESERVED - 1 in own and FIRST + RESERVED not in own and -1 not in own
    assert len(own.special_tokens) == RESERVED


def test_tokens_that_are_not_special_are_text(own: TiktokenModel) -> None:
    ids = own.encode(f"[BOS]<think>so</think><|im_end|><|reserved_token_{FIRST + 9}|>")
    assert own.decode(ids) == "<think>so</think>"
    assert own.decode([5 * FIRST]) == ""


def test_names_beyond_the_reserved_make_room(folder: Path) -> None:
    name(folder, **{str(FIRST + RESERVED + 2): {"content": "[LATE]", "special": True}})
    own = read(folder)
    assert own.id_of("[LATE]") == FIRST + RESERVED + 2
    assert own.id_of(f"<|reserved_token_{FIRST + RESERVED + 1}|>") == FIRST + RESERVED + 1


def cut(text: str, most: int, most_run: int) -> list[str]:
    """The published cutting, letter by letter: a piece ends before the letter that makes it, or a run, too long."""
    pieces: list[str] = []
    run = 0
    for n, letter in enumerate(text):
        run = run + 1 if n % most and letter.isspace() == text[n - 1].isspace() else 1
        if n % most == 0 or run > most_run:
            pieces.append("")
            run = 1
        pieces[-1] += letter
    return pieces


@given(st.text(alphabet="ab \n\x1c\u3000é"), st.integers(1, 9), st.integers(1, 4))
def test_long_texts_are_cut(text: str, most: int, most_run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_model, "_MAX_PIECE", most)
        patch.setattr(tiktoken_model, "_MAX_RUN", most_run)
        assert list(tiktoken_model._pieces(text)) == cut(text, most, most_run)


@pytest.mark.parametrize("part", ["a", " ", "\n", "北", "1", "=", "a b"])
def test_long_runs_are_encoded(own: TiktokenModel, part: str) -> None:
    text = part * 60_000 + "end"
    assert own.decode(own.encode(text)) == text


def name(folder: Path, **added: Any) -> None:
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields["added_tokens_decoder"] |= added
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


@pytest.mark.parametrize(
    ("appended", "reason"),
    [
        (b"YWJj!? 400\n", "line 401 is not a token in base64"),
        (b"YWJ 400\n", "line 401 is not a token in base64"),
        (b"\xff\xfe 400\n", "line 401 is not a token in base64"),
        (b"\n", "line 401 is an empty token"),
        (b" 400\n", "line 401 is an empty token"),
        (line(b"a", 400), "line 401 is an empty token or one that was there before"),
        (line(b"zzzzz", ""), "line 401 has rank ''; 400 is next"),
        (line(b"zzzzz", 401), "line 401 has rank '401'; 400 is next"),
        (line(b"zzzzz", -1), "line 401 has rank '-1'; 400 is next"),
        (line(b"zzzzz", "4_00"), "line 401 has rank '4_00'; 400 is next"),
        (line(b"zzzzz", "9" * 5000), "line 401 has rank '999"),
        (line(b"zzzzz", "400 1"), "line 401 has rank '400 1'; 400 is next"),
    ],
)
def test_a_line_that_is_not_the_next_token_is_named(folder: Path, appended: bytes, reason: str) -> None:
    assert FIRST == 400
    with (folder / "tiktoken.model").open("ab") as stream:
        stream.write(appended)
    with pytest.raises(InputError) as error:
        read(folder)
    assert f"{folder / 'tiktoken.model'}: {reason}" in str(error.value)


def test_all_bytes_are_needed(folder: Path) -> None:
    (folder / "tiktoken.model").write_bytes(b"".join(line(bytes([byte]), byte) for byte in range(255)))
    with pytest.raises(InputError, match="lacks the byte 0xff"):
        read(folder)


def test_a_file_beyond_the_bound_is_not_read(folder: Path) -> None:
    with (folder / "tiktoken.model").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="are more than the"):
        read(folder)


@pytest.mark.parametrize(
    ("key", "fields", "reason"),
    [
        (str(FIRST - 1), {"content": "x"}, f"'x' of added_tokens_decoder is token '{FIRST - 1}'; {FIRST} to"),
        ("999999999", {"content": "x"}, "is token '999999999'"),
        ("1e3", {"content": "x"}, "is token '1e3'"),
        ("-1", {"content": "x"}, "is token '-1'"),
        (str(FIRST + 50), {"content": ""}, "has no content"),
        (str(FIRST + 50), {"content": 3}, "has no content"),
        (str(FIRST + 50), {"content": "\ud800"}, "has no content"),
        (str(FIRST + 50), "x", "has no content"),
        (str(FIRST + 50), {"content": "[EOS]"}, r"the token '[EOS]' begins the token '[EOS]'"),
        (str(FIRST + 50), {"content": "[EOS]2"}, r"the token '[EOS]' begins the token '[EOS]2'"),
    ],
)
def test_names_that_are_not_of_special_tokens(folder: Path, key: str, fields: object, reason: str) -> None:
    name(folder, **{key: fields})
    with pytest.raises(InputError) as error:
        read(folder)
    assert reason in str(error.value) and str(folder / "tokenizer_config.json") in str(error.value)


def test_names_that_are_no_object(folder: Path) -> None:
    with pytest.raises(InputError, match=r"added_tokens_decoder is \[\]"):
        read_tiktoken_model(folder / "tiktoken.model", {"added_tokens_decoder": []})
