"""Generation from the latent cache against whole forward passes, and against Hugging Face's continuation."""

from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.errors import InputError
from moejax.generate import decode as module
from moejax.generate.decode import Decoding, cache_length, chunks, generate, generate_batch
from moejax.generate.sampling import Sampling
from moejax.model import DeepseekV3
from small_models import CONFIG, first_layers

PROMPT = [5, 80, 13, 60, 2, 41]
LONGEST = 16

# BOS and "def __init__(self, ", and how transformers 5.23 continues it, computed like the golden vectors of
# `tools/make_golden.py`; at every step the likeliest token's logit is at least 0.5 above the next.
TINY_PROMPT = [0, 531, 887, 729, 895, 447, 13, 222]
TINY_CONTINUATION = [366, 1005, 82, 66, 27, 466, 21, 776]


@jax.jit
def next_logits(model: DeepseekV3, tokens_1T: jax.Array, last: int) -> jax.Array:
    """Logits (C,) of the token behind the one at index `last`, by a whole forward pass."""
    return model(tokens_1T)[0, last]


def logits_behind(tokens: list[int]) -> NDArray[Any]:
    """By padding to one length, which later tokens cannot see, everything is compiled once."""
    padded = jnp.asarray([tokens + [0] * (LONGEST - len(tokens))])
    return np.asarray(next_logits(first_layers(2), padded, len(tokens) - 1), np.float64)


def compilations() -> int:
    step: Any = module.decode_step
    return step._cache_size()


def greedy(prompt: list[int], count: int, **options: Any) -> list[int]:
    return list(generate(first_layers(2), prompt, count, **options))


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT + PROMPT[:2]])
def test_greedy_tokens_are_the_likeliest_of_a_whole_forward_pass(prompt: list[int]) -> None:
    tokens = list(prompt)
    for token in greedy(prompt, 8):
        logits_C = logits_behind(tokens)
        assert token == np.argmax(logits_C)
        tokens.append(token)
    assert len(tokens) == len(prompt) + 8


def test_the_tiny_checkpoint_continues_as_in_hugging_face(tiny: Path) -> None:
    model = load_model(open_checkpoint(tiny))
    assert list(generate(model, np.asarray(TINY_PROMPT), len(TINY_CONTINUATION))) == TINY_CONTINUATION


def test_a_longer_continuation_begins_like_a_shorter_one() -> None:
    assert greedy(PROMPT, 8)[:3] == greedy(PROMPT, 3)
    assert greedy(PROMPT, 0) == []
    assert list(islice(generate(first_layers(2), PROMPT, 8), 2)) == greedy(PROMPT, 2)


def test_the_same_seed_draws_the_same_and_another_one_does_not() -> None:
    first, again, other = (greedy(PROMPT, 10, sampling=Sampling(temperature=1.0), seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) > 1


def test_a_low_temperature_takes_the_likeliest() -> None:
    assert greedy(PROMPT, 8, sampling=Sampling(temperature=1e-3), seed=1) == greedy(PROMPT, 8)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    scaled_C = logits_behind(PROMPT) / temperature
    probability_C = np.exp(scaled_C - scaled_C.max()) / np.sum(np.exp(scaled_C - scaled_C.max()))
    draws = 300
    drawn = [greedy(PROMPT, 1, sampling=Sampling(temperature), seed=seed)[0] for seed in range(draws)]
    count_C = np.bincount(drawn, minlength=CONFIG.vocab_size)
    assert not count_C[draws * probability_C < 1e-4].any()
    # Each likely token within 4.5 standard deviations of what a binomial distribution expects.
    likely = draws * probability_C > 5
    assert likely.sum() >= 2
    deviation_C = np.sqrt(draws * probability_C * (1 - probability_C))
    assert np.all(np.abs(count_C - draws * probability_C)[likely] < 4.5 * deviation_C[likely])


def test_generation_ends_before_a_stop_token() -> None:
    tokens = greedy(PROMPT, 8)
    stop = tokens[4]
    assert greedy(PROMPT, 8, stop=(stop, 96)) == tokens[: tokens.index(stop)]
    assert greedy(PROMPT, 8, stop=[tokens[0]]) == []
    assert greedy(PROMPT, 8, stop=sorted({*range(CONFIG.vocab_size)} - {*tokens})) == tokens


def test_a_prompt_needs_a_token() -> None:
    prompts: list[Any] = [[], np.zeros(0, np.int32)]
    for prompt in prompts:
        with pytest.raises(InputError, match="the prompt has no tokens; at least one is needed"):
            next(generate(first_layers(2), prompt, 3))


def test_prompt_and_continuation_fit_the_context() -> None:
    limit = CONFIG.max_position_embeddings
    message = f"{limit - 2} prompt tokens and 3 more exceed the context of {limit} tokens"
    with pytest.raises(InputError, match=message):
        next(generate(first_layers(2), [1] * (limit - 2), 3))


def test_a_prompt_has_tokens_of_the_model() -> None:
    for token in (-1, CONFIG.vocab_size):
        with pytest.raises(InputError, match=f"token {token} is none of the model's {CONFIG.vocab_size}; 0 to "):
            next(generate(first_layers(2), [1, token], 3))


def test_bad_requests_are_refused_before_a_token_is_asked_for() -> None:
    with pytest.raises(InputError, match="the prompt has no tokens"):
        generate(first_layers(2), [], 3)
    with pytest.raises(InputError, match="top_p is 0"):
        generate(first_layers(2), PROMPT, 3, sampling=Sampling(top_p=0))
    with pytest.raises(InputError, match="there is no prompt; at least one is needed"):
        generate_batch(first_layers(2), [], 3)


def test_ways_of_decoding_that_there_are_not() -> None:
    with pytest.raises(InputError, match="prefill_chunk is 0; at least 1 token is needed"):
        Decoding(prefill_chunk=0)
    with pytest.raises(InputError, match="cache_dtype is int4; accepted are float32, bfloat16, int8"):
        Decoding(cache_dtype="int4")


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (5, 4), (7, 4), (13, 5), (300, 512)])
def test_chunks_cover_the_prompt_and_the_cache_holds_them(length: int, chunk: int) -> None:
    sizes = list(chunks(length, chunk))
    assert [start for start, _ in sizes] == list(range(0, length, chunk))
    assert all(size == chunk for _, size in sizes[:-1]) and sizes[-1][1] <= chunk
    end = sum(sizes[-1])
    assert length <= end <= cache_length(length, 1, chunk)
    assert cache_length(length, 1000, chunk) >= length + 1000


@pytest.mark.parametrize("chunk", [3, 4])
def test_a_prompt_in_chunks_continues_as_in_one(chunk: int) -> None:
    assert greedy(PROMPT, 8, decoding=Decoding(prefill_chunk=chunk)) == greedy(PROMPT, 8)


def test_every_prompt_of_a_batch_continues_as_alone() -> None:
    prompts = [PROMPT, PROMPT[:1], (PROMPT + PROMPT)[:9], PROMPT[2:4]]
    steps = list(generate_batch(first_layers(2), prompts, 7, decoding=Decoding(prefill_chunk=4)))
    assert [list(row) for row in zip(*steps, strict=True)] == [greedy(prompt, 7) for prompt in prompts]


def test_a_batch_ends_row_by_row() -> None:
    prompts = [PROMPT, PROMPT[:3]]
    alone = [greedy(prompt, 8) for prompt in prompts]
    stop = next(token for token in alone[0] if token not in alone[1])
    cut = alone[0].index(stop)
    steps = list(generate_batch(first_layers(2), prompts, 8, stop=[stop]))
    assert [first for first, _ in steps] == alone[0][:cut] + [None] * (8 - cut)
    assert [second for _, second in steps] == alone[1]
    both = sorted({alone[0][2], alone[1][2]})
    assert len(list(generate_batch(first_layers(2), prompts, 8, stop=both))) <= 2


def test_the_first_row_of_a_batch_draws_as_alone_and_the_others_otherwise() -> None:
    hot = Sampling(temperature=3.0)
    steps = list(generate_batch(first_layers(2), [PROMPT, PROMPT], 8, sampling=hot, seed=5))
    first, second = (list(row) for row in zip(*steps, strict=True))
    assert first == greedy(PROMPT, 8, sampling=hot, seed=5) != second


def test_a_smaller_cache_continues_alike() -> None:
    """The tiny checkpoint's first tokens have margins that rounding the latents does not bridge."""
    model = load_model(open_checkpoint())
    decoding = Decoding(cache_dtype="int8")
    assert list(generate(model, TINY_PROMPT, 8, decoding=decoding)) == TINY_CONTINUATION


def test_a_step_is_compiled_once_whatever_the_prompts_length() -> None:
    greedy(PROMPT, 3)
    before = compilations()
    for length in (5, 6, 7, 8):
        greedy((PROMPT + PROMPT)[:length], 3)
        greedy((PROMPT + PROMPT)[:length], 9, sampling=Sampling(0.7, 5, 0.9, 0.05), seed=length)
    # A prompt of one token is a step like any later one.
    greedy(PROMPT[:1], 3)
    assert compilations() == before
    # A longer prompt adds the sizes of its chunks, and no other step.
    greedy(PROMPT * 4, 3, decoding=Decoding(prefill_chunk=8))
    assert compilations() == before
