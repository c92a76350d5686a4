"""A small random checkpoint with everything that commands need: BF16 tensors, an MTP block, a tokenizer, texts.

Most of its matrices are 128 x 128, so that the default formats' groups of 128 fit and few shapes are compiled.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fp8_checkpoint import fp8_config, published
from model_cases import BASE, Config, random_tensors, write_hf_checkpoint

CONFIG: Config = BASE | {
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 12,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "num_nextn_predict_layers": 1,
}
BEGIN = "<|begin|>"
_WORDS = 300


# The same as DeepSeek publishes its models.
FP8_CONFIG = fp8_config(CONFIG, [128, 128])


def write_small_checkpoint(folder: Path) -> None:
    """Config, two shards, tokenizer: what a checkpoint's folder on the Hugging Face hub holds."""
    tensors = random_tensors(CONFIG, seed=40)
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write_hf_checkpoint(folder, CONFIG, stored)
    write_tokenizer(folder)


def write_published_checkpoint(folder: Path) -> None:
    """The same in FP8, as DeepSeek publishes its models."""
    write_hf_checkpoint(folder, FP8_CONFIG, published(FP8_CONFIG, [128, 128]))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE whose tokens are as many as the config's vocabulary has."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[BEGIN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(seed=0, count=2000)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": BEGIN, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def random_scores(seed: int) -> dict[str, object]:
    """Routing statistics as `moejax plan --expert-scores` reads them, some experts far more important than others."""
    random = np.random.RandomState(seed)
    experts = CONFIG["n_routed_experts"]
    raw: dict[str, object] = {"source": "made up"}
    for layer in range(CONFIG["first_k_dense_replace"], CONFIG["num_hidden_layers"]):
        activations = random.randint(100, 10_000, size=(experts,))
        scores = activations * random.uniform(0.1, 0.4, size=(experts,))
        raw[f"layer_{layer}"] = {"scores": scores.tolist(), "activations": activations.tolist()}
    return raw


def words(seed: int, count: int) -> str:
    """A text of so many words, of a vocabulary that all seeds share; a thousand words are about four chunks."""
    letters = np.random.RandomState(0).randint(ord("a"), ord("z") + 1, (_WORDS, 8), np.uint8)
    vocabulary = [bytes(row[: 2 + n % 7]).decode() for n, row in enumerate(letters)]
    picked = _WORDS * np.random.RandomState(seed).power(0.4, count)
    return " ".join(vocabulary[int(n)] for n in picked)
