import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.resources import tiny_checkpoint
from moejax.tokenizer.tokenizer import load_tokenizer, text_pieces
from small_tokenizers import byte_level, ranks, write_tiktoken


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's tokenizer, without any of the configs."""
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    return tmp_path


def write(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(fields))


# As transformers' AutoTokenizer encodes them, with add_special_tokens=False.
@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("", []),
        ("def add(a, b):\n    return a + b\n", [531, 1177, 9, 66, 13, 300, 381, 282, 403, 270, 645, 300, 200]),
        ("  two  spaces\t\ttabs\r\n", [222, 1666, 222, 298, 680, 454, 199, 199, 85, 3589, 203, 200]),
        ("Naïve café 🙂", [47, 66, 129, 109, 384, 275, 1126, 129, 104, 222, 2218, 249, 226]),
    ],
)
def test_encode_equals_transformers(tiny: Path, text: str, token_ids: list[int]) -> None:
    encoded = load_tokenizer(tiny).encode(text)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == token_ids


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    token_ids = tokenizer.encode(text)
    assert "".join(text_pieces(tokenizer, [0, *token_ids, 1])) == text


def test_decode_leaves_special_tokens_out(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert tokenizer.decode([0, *tokenizer.encode("x = 1"), 0, 1]) == "x = 1"


def test_the_tiny_checkpoint_begins_and_ends_a_text_with_token_0(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (0,))


def test_without_configs_there_are_no_special_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, ())


@pytest.mark.parametrize(
    ("fields", "bos_token_id"),
    [
        ({"add_bos_token": True, "bos_token": "<|pad|>"}, 1),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<|pad|>"}}, 1),
        ({"add_bos_token": True, "bos_token": None}, None),
        ({"add_bos_token": False, "bos_token": "<|pad|>"}, None),
        ({"bos_token": "<|pad|>"}, None),
    ],
)
def test_bos_is_given_only_where_the_config_asks_for_it(
    folder: Path, fields: dict[str, Any], bos_token_id: int | None
) -> None:
    write(folder / "tokenizer_config.json", **fields)
    assert load_tokenizer(folder).bos_token_id == bos_token_id


def test_eos_comes_from_the_first_config_that_names_it(folder: Path) -> None:
    write(folder / "tokenizer_config.json", eos_token="<|pad|>")
    assert load_tokenizer(folder).eos_token_ids == (1,)
    write(folder / "config.json", eos_token_id=7)
    assert load_tokenizer(folder).eos_token_ids == (7,)
    write(folder / "generation_config.json", eos_token_id=[5, 0])
    assert load_tokenizer(folder).eos_token_ids == (5, 0)


@pytest.mark.parametrize("token_id", ["7", 7.0, True, -1, 4096, 10**30, [3, None], [[3]], {"id": 3}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "manifest.json"])
def test_eos_that_is_no_token_is_refused(folder: Path, name: str, token_id: object) -> None:
    fields = {"eos_token_id": token_id}
    write(folder / name, **({"config": fields} if name == "manifest.json" else fields))
    with pytest.raises(InputError, match=rf"{name}: eos_token_id has .*; token ids of the vocabulary"):
        load_tokenizer(folder)


def test_a_native_checkpoint_has_the_config_in_its_manifest(folder: Path) -> None:
    write(folder / "manifest.json", config={"eos_token_id": [9]})
    assert load_tokenizer(folder).eos_token_ids == (9,)
    write(folder / "manifest.json", config=[])
    assert load_tokenizer(folder).eos_token_ids == ()


@pytest.mark.parametrize("token", [3, True, ["<s>"], {"content": 3}, "\ud800", {"content": "\ud800"}])
@pytest.mark.parametrize("field", ["bos_token", "eos_token"])
def test_a_special_token_that_is_no_text_is_refused(folder: Path, field: str, token: object) -> None:
    write(folder / "tokenizer_config.json", **{"add_bos_token": True, field: token})
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: {field} is .*; a token's text is needed"):
        load_tokenizer(folder)


def test_half_a_character_is_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        load_tokenizer(tiny).encode("a\ud83d")


def test_a_tiktoken_model_is_read_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    eos = len(ranks()) + 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, (eos,))
    assert tokenizer.encode("The[EOS]").tolist() == [*tokenizer.encode("The"), eos]
    assert "".join(text_pieces(tokenizer, tokenizer.encode("北京 🙂[EOS]"))) == "北京 🙂"
    write(tmp_path / "generation_config.json", eos_token_id=eos + 254)
    assert load_tokenizer(tmp_path).eos_token_ids == (eos + 254,)
    write(tmp_path / "generation_config.json", eos_token_id=eos + 255)
    with pytest.raises(InputError, match="eos_token_id has"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_wins(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tiktoken.model").write_bytes(b"no tokens")
    assert load_tokenizer(tmp_path).eos_token_ids == (len(ranks()) + 1,)


def test_truncation_and_padding_left_by_training_are_not_applied(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    text = "one two three four five six seven eight"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 1 not in tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json does not exist"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: is not valid JSON"),
        ("generation_config.json", "[]", r"generation_config\.json: holds a JSON list"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<s>"}', "bos_token '<s>' of tokenizer_config"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "eos_token '</s>' of tokenizer_config"),
    ],
)
def test_unusable_files_are_named(folder: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)
