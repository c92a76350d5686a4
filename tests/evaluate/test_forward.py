"""Chunks through a model block by block, against the whole model."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.evaluate.forward import final_states
from moejax.formats import Leaf
from moejax.model import Config, DeepseekV3
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, SlicedMtp
from moejax.model.source import ModelSource
from small_models import CHUNKS, CONFIG, small_model

BATCHES = [CHUNKS[:2], CHUNKS[2:]]
T = CHUNKS.shape[1]
L = CONFIG.num_hidden_layers

quick_hidden = jax.jit(DeepseekV3.hidden)


@dataclass
class Watched:
    """Source of a model, copied when asked for: no part may be asked for while another one lives."""

    source: ModelSource
    asked: list[str] = field(default_factory=list)
    lent: list[Any] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return self.source.config

    def embedding(self) -> Leaf:
        return self._lend("embedding", self.source.embedding())

    def block(self, index: int) -> SlicedBlock:
        block = self.source.block(index)

        def experts_of(members: Sequence[int]) -> Experts:
            own = jax.tree.map(jnp.copy, block.experts_of(members))
            self.lent += [(f"experts of {index}", weakref.ref(array)) for array in jax.tree.leaves(own)]
            return own

        return replace(block, trunk=self._lend(f"block {index}", block.trunk), experts_of=experts_of)

    def norm(self) -> jax.Array:
        return self._lend("norm", self.source.norm())

    def head(self) -> Leaf:
        return self._lend("head", self.source.head())

    def mtp(self, depth: int) -> SlicedMtp:
        mtp = self.source.mtp(depth)
        return replace(mtp, outer=self._lend(f"mtp {depth}", mtp.outer))

    def _lend(self, name: str, part: Any) -> Any:
        alive = [own for own, array in self.lent if array() is not None]
        assert not alive or alive == ["norm"], f"{alive} when {name} was asked for"
        self.asked.append(name)
        copy = jax.tree.map(jnp.copy, part)
        self.lent += [(name, weakref.ref(array)) for array in jax.tree.leaves(copy)]
        return copy


def test_final_states_are_those_of_the_whole_model_and_one_part_is_there_at_a_time() -> None:
    model = small_model()
    ticks: list[None] = []
    source = Watched(ModelSource(model))
    gc.disable()  # what is let go must not wait for it
    try:
        states = final_states(source, BATCHES, jnp.float32, True, lambda: ticks.append(None))
    finally:
        gc.enable()
    assert source.asked == ["embedding", *(f"block {i}" for i in range(L)), "norm", "mtp 0"]
    assert len(ticks) == (L + 1) * len(BATCHES)
    tokens = jnp.asarray(CHUNKS)
    normed = np.asarray(model.normed(quick_hidden(model, tokens)))
    np.testing.assert_allclose(np.concatenate(states.scored), normed[:, T // 2 : T - 1], rtol=1e-4, atol=1e-5)
    following, by = model.embedded(tokens[:, 1:]), model.angles(jnp.arange(T - 1), jnp.dtype(jnp.float32))
    drafted = np.asarray(jax.jit(lambda *given: given[0](*given[1:]))(model.mtp[0], normed[:, :-1], following, by))
    np.testing.assert_allclose(np.concatenate(states.drafted), drafted[:, T // 2 : T - 2], rtol=1e-4, atol=1e-5)


def test_nothing_is_drafted_that_is_not_asked_for() -> None:
    source = Watched(ModelSource(small_model()))
    assert final_states(source, BATCHES, jnp.float32, False, lambda: None).drafted == []
    assert "mtp 0" not in source.asked
