"""Speculative decoding: the MTP block drafts the token after the next, the model checks it in the same step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.generate.decode import NO_TOKEN, Decoding, cache_length, check_request, chunks, known_token
from moejax.model import Config, DeepseekV3
from moejax.model.deepseek_v3 import head_logits
from moejax.model.finite import refuse_head
from moejax.model.hidden_states import require_finite_blocks
from moejax.model.latent_cache import LatentCache, empty_cache
from moejax.model.source import ModelSource


class _Caches(NamedTuple):
    """The model's caches, and the MTP block's own."""

    layers: list[LatentCache]
    mtp: LatentCache


@dataclass
class Speculation:
    """Greedy tokens by speculation, and how well the drafts did so far.

    Iterating yields what `generate` yields with temperature 0: a drafted token counts only where the model, given
    everything before it, likes the same one best (Leviathan et al., arXiv:2211.17192, for greedy decoding; the draft is
    the MTP block's, arXiv:2412.19437, section 2.2). A step takes one confirmed token and one draft, and so confirms one
    or two.
    """

    model: DeepseekV3
    prompt: Sequence[int] | np.ndarray
    max_tokens: int
    stop: Sequence[int] = ()
    decoding: Decoding = field(default_factory=Decoding)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Raises InputError if the model has no MTP block, and for what `generate` refuses."""
        require_mtp(self.model.config)
        check_request(self.model.config, [self.prompt], self.max_tokens)

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts by drafts checked."""
        return self.accepted / max(self.drafted, 1)

    def __iter__(self) -> Iterator[int]:
        for token in islice(self._tokens(), self.max_tokens):
            if token in self.stop:
                return
            yield token

    def _tokens(self) -> Iterator[int]:
        """Confirmed tokens without end; a step may confirm one more than is wanted."""
        self.drafted = self.accepted = 0
        decoding, prompt = self.decoding, np.asarray(self.prompt, np.int32)
        length = cache_length(len(prompt), self.max_tokens + 1, decoding.prefill_chunk)
        layers = self.model.empty_cache(1, length, decoding.kept_in)
        caches = _Caches(layers, empty_cache(self.model.config, 1, length, decoding.kept_in))
        token, draft = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        for start, size in chunks(len(prompt), decoding.prefill_chunk):
            # One token more than the chunk: the MTP block takes the token behind each.
            own = prompt[start : start + size + 1]
            tokens = np.pad(own, (0, size + 1 - len(own)), mode="edge")
            last = min(len(prompt) - 1 - start, size - 1)
            is_last_chunk = start + size >= len(prompt)
            token, draft, caches = _prefill(self.model, tokens, caches, start, last, is_last_chunk, decoding.dtype)
            if int(token) == NO_TOKEN:
                self._refuse(prompt.tolist())
        so_far = [*prompt.tolist(), int(token)]
        yield so_far[-1]
        while True:
            position = len(so_far) - 1
            pair, next_draft, accepted, caches = _verify(self.model, token, draft, caches, position, decoding.dtype)
            confirmed = np.asarray(pair)[: 1 + int(accepted)].tolist()
            if NO_TOKEN in confirmed:
                self._refuse([*so_far, int(draft)])
            self.drafted += 1
            self.accepted += int(accepted)
            so_far += confirmed
            yield from confirmed
            token, draft = pair[int(accepted)], next_draft

    def _refuse(self, tokens: list[int]) -> NoReturn:
        require_finite_blocks(ModelSource(self.model), jnp.asarray([tokens]), self.decoding.dtype)
        refuse_head()


def require_mtp(config: Config) -> None:
    """Raise InputError for a model that has nothing to draft with."""
    if not config.num_nextn_predict_layers:
        raise InputError("the model has no MTP block to draft with; decode without speculation")


@partial(jax.jit, static_argnames="dtype", donate_argnames="caches")
def _prefill(
    model: DeepseekV3,
    tokens_T1: jax.Array,
    caches: _Caches,
    start: jax.Array,
    last: jax.Array,
    is_last_chunk: jax.Array,
    dtype: str,
) -> tuple[jax.Array, jax.Array, _Caches]:
    """T prompt tokens, and one more, into the caches; the likeliest next token behind index `last`, and the draft for
    the one after it."""
    start_1 = jnp.asarray(start, jnp.int32)[None]
    hidden_1TD, layers = model.extend(tokens_T1[None, :-1], caches.layers, start_1, dtype)
    logits_1C = model.logits(_at(hidden_1TD, last))[:, 0]
    (token,) = known_token(jnp.argmax(logits_1C, axis=-1), hidden_1TD, jnp.asarray(last)[None], logits_1C)
    following_T = tokens_T1[1:].at[last].set(jnp.where(is_last_chunk, token, tokens_T1[last + 1]))
    drafted_1TD, mtp = model.extend_draft(following_T[None], hidden_1TD, caches.mtp, start_1)
    draft = jnp.argmax(head_logits(_at(drafted_1TD, last), model.head.get_value()))
    return token.astype(jnp.int32), draft.astype(jnp.int32), _Caches(layers, mtp)


@partial(jax.jit, static_argnames="dtype", donate_argnames="caches")
def _verify(
    model: DeepseekV3, token: jax.Array, draft: jax.Array, caches: _Caches, position: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array, _Caches]:
    """A confirmed token and a draft behind it: the likeliest token behind each (2,), the next draft, and whether the
    draft was the likeliest. What a refused draft left in the caches is overwritten by the next step."""
    start_1 = jnp.asarray(position, jnp.int32)[None]
    hidden_12D, layers = model.extend(jnp.stack([token, draft])[None], caches.layers, start_1, dtype)
    logits_2C, one_each = model.logits(hidden_12D)[0], jnp.zeros(2, jnp.int32)
    # Each for itself: what a draft leads to does not matter where it is refused.
    next_2 = known_token(jnp.argmax(logits_2C, axis=-1), hidden_12D[0][:, None], one_each, logits_2C).astype(jnp.int32)
    accepted = next_2[0] == draft
    drafted_12D, mtp = model.extend_draft(next_2[None], hidden_12D, caches.mtp, start_1)
    draft = jnp.argmax(head_logits(_at(drafted_12D, accepted.astype(jnp.int32)), model.head.get_value()))
    return next_2, draft.astype(jnp.int32), accepted, _Caches(layers, mtp)


def _at(x_1TD: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_1TD, index, 1, axis=1)
