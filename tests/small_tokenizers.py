"""Small tokenizers: byte pairs trained on a few words, in the tokenizers library or as `tiktoken.model`, and one that
works as SentencePiece's do."""

import base64
import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from moejax.tokenizer.tiktoken_model import PATTERN

SPECIAL = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<think>", "</think>", "<|im_middle|>")
"""The first special tokens; `<think>` and `</think>` are not called special, so they are part of the text."""

TEXT = (
    "The quick brown fox doesn't jump, it'll THINK twice. I'VE SEEN 1234567 of 2024-05-17!\n\n"
    "    def add(a, b):\n        return a + b  # summe\r\n\tNaïve café, Ünïcode; größer als Straße.\n"
    "北京市位于华北平原。人口超过两千万。中文English混合。日本語のテキスト、한국어 문장.\n"
)
_TOKENS = 400


@cache
def ranks() -> dict[bytes, int]:
    """The tokens of byte pairs, trained on `TEXT`, by rank."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = _split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_TOKENS, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    letters = {letter: byte for byte, letter in enumerate(_letters())}
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    return {bytes(letters[letter] for letter in token): rank for rank, token in enumerate(tokens)}


def write_tiktoken(folder: Path) -> None:
    """`tiktoken.model` and the names of its special tokens."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks().items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    added = {str(len(ranks()) + n): {"content": t, "special": "think" not in t} for n, t in enumerate(SPECIAL)}
    fields = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def byte_level() -> tokenizers.Tokenizer:
    """The same tokenizer in the tokenizers library: any two tokens whose bytes together are one merge to it."""
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks()}
    merges = [
        (spelled[token[:n]], spelled[token[n:]])
        for token in ranks()
        for n in range(1, len(token))
        if token[:n] in ranks() and token[n:] in ranks()
    ]
    vocab = {spelled[token]: rank for token, rank in ranks().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(t, special="think" not in t, normalized=False) for t in SPECIAL])
    return tokenizer


def sentence_piece(decoder: decoders.Decoder | None = None) -> tokenizers.Tokenizer:
    """Words that begin with their blank, bytes spelled `<0x41>` where a letter is none of the vocabulary."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcé", "▁a", "ab", "▁ab", "▁▁"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoder or decoders.Sequence(llama)
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def _split() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def _letters() -> list[str]:
    """GPT-2's letters of the bytes: printable ones are their own, the others follow from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
