"""Speculation gives what plain greedy decoding gives, token for token, however good or bad the drafts are."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import InputError
from moejax.formats import ExpertWeights, dense
from moejax.generate import speculative
from moejax.generate.decode import Decoding, generate
from moejax.generate.speculative import Speculation
from moejax.model import DeepseekV3, named_leaves
from moejax.model.leaves import Weight
from small_models import CONFIG, small_model

PROMPT = [5, 80, 13, 60, 2, 41]


@cache
def two_layers() -> DeepseekV3:
    """The first layers of `small_model` and its MTP block, whose drafts are as good as chance."""
    config = replace(CONFIG, num_hidden_layers=2)
    return DeepseekV3(config, named_leaves(small_model()).__getitem__)


@cache
def markov_model() -> DeepseekV3:
    """Blocks that add nothing and an MTP block that passes the next token's embedding on: the next token depends on the
    last one alone, for the model and the draft alike, so every draft is right."""
    model = two_layers()
    eye = jnp.eye(CONFIG.hidden_size)

    def leaf(name: str) -> Weight:
        own = named_leaves(model)[name]
        if name == "mtp.0.eh_proj":
            return jnp.concatenate([eye, 0 * eye], axis=1)
        if name.endswith(".o") or name.endswith("mlp.down") or name.endswith("shared.down"):
            return jnp.zeros(own.shape)
        if name.endswith("experts.down"):
            zeros = jnp.zeros(own.shape)
            return ExpertWeights((zeros,), own.bucket_E, own.index_E)
        if name.endswith("norm"):
            return jnp.ones(own.shape)
        return own if name.endswith("group_id") or isinstance(own, ExpertWeights) else dense(own, jnp.float32)

    return DeepseekV3(model.config, leaf)


def greedy(model: DeepseekV3, prompt: list[int], count: int) -> list[int]:
    return list(generate(model, prompt, count))


def compilations() -> tuple[int, int]:
    steps: Any = speculative
    return steps._verify._cache_size(), steps._prefill._cache_size()


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT * 3])
@pytest.mark.parametrize("chunk", [4, 512])
def test_the_same_tokens_as_greedy_where_drafts_are_chance(prompt: list[int], chunk: int) -> None:
    decoding = Decoding(prefill_chunk=chunk)
    speculation = Speculation(two_layers(), prompt, 40, decoding=decoding)
    assert list(speculation) == greedy(two_layers(), prompt, 40)
    assert 20 <= speculation.drafted <= 40
    assert 0 <= speculation.accepted < speculation.drafted


def test_the_same_tokens_as_greedy_where_every_draft_is_right() -> None:
    for count in (1, 8, 9):
        speculation = Speculation(markov_model(), PROMPT, count)
        assert list(speculation) == greedy(markov_model(), PROMPT, count)
        assert speculation.acceptance_rate == (1 if count > 1 else 0)
        assert speculation.drafted == count // 2


def test_some_drafts_are_right_and_some_wrong() -> None:
    """Both ways through a step are taken."""
    model = two_layers()
    accepted = drafted = 0
    for seed in range(6):
        prompt = np.random.RandomState(seed).randint(CONFIG.vocab_size, size=5).tolist()
        speculation = Speculation(model, prompt, 30)
        assert list(speculation) == greedy(model, prompt, 30)
        accepted, drafted = accepted + speculation.accepted, drafted + speculation.drafted
    assert 0 < accepted < drafted


def test_it_ends_before_a_stop_token() -> None:
    tokens = greedy(two_layers(), PROMPT, 12)
    stop = tokens[5]
    speculation = Speculation(two_layers(), PROMPT, 12, stop=[stop])
    assert list(speculation) == tokens[: tokens.index(stop)]
    assert list(speculation) == tokens[: tokens.index(stop)], "again, from the beginning"


def test_steps_are_compiled_once() -> None:
    list(Speculation(two_layers(), PROMPT, 3))
    before = compilations()
    for length in (5, 6, 7, 8):
        list(Speculation(two_layers(), (PROMPT * 2)[:length], 9))
    assert compilations() == before


def test_a_model_without_an_mtp_block_is_refused() -> None:
    with pytest.raises(InputError, match="the model has no MTP block to draft with"):
        Speculation(small_model(mtp=False), PROMPT, 3)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        Speculation(two_layers(), [], 3)


def test_the_cache_of_the_mtp_block_is_what_a_whole_pass_gives() -> None:
    """`extend_draft` behind a cache against `draft_logits` of the whole prompt."""
    model, tokens_1T = two_layers(), jnp.asarray([PROMPT + PROMPT[:3]])
    hidden_1TD = jax.jit(DeepseekV3.hidden)(model, tokens_1T)
    whole = jax.jit(DeepseekV3.draft_logits)(model, tokens_1T, hidden_1TD)
    cache, parts = model.empty_cache(1, 12, "float32")[0], []
    extend = jax.jit(DeepseekV3.extend_draft)
    for start in range(0, 8, 4):
        following = tokens_1T[:, start + 1 : start + 5]
        part, cache = extend(model, following, hidden_1TD[:, start : start + 4], cache, jnp.asarray([start]))
        parts.append(part)
    drafted = jnp.concatenate(parts, axis=1)
    logits = drafted @ dense(model.head.get_value(), jnp.float32).T
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4)
