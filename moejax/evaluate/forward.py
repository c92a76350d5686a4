"""Chunks through a model, all of them through one block before the next one is asked for."""

from collections.abc import Callable, Sequence
from itertools import tee
from typing import NamedTuple

import jax
import numpy as np

from moejax.model.config import Config
from moejax.model.finite import require_finite_mtp
from moejax.model.hidden_states import HiddenStates
from moejax.model.sliced import SlicedMtp, through_mtp
from moejax.model.source import Source, walk
from moejax.model.steps import run_norm

Tick = Callable[[], object]


class FinalStates(NamedTuple):
    """What the head takes, batch by batch, in the host's memory.

    scored: of the positions t = T/2 to T-2, whose logits predict token t+1, (B, T-1 - T/2, D).
    drafted: the first MTP block's of those t for which token t+2 is in the chunk, t = T/2 to T-3; empty if not asked.
    """

    scored: list[np.ndarray]
    drafted: list[np.ndarray]


def final_states(
    source: Source, batches: Sequence[np.ndarray], dtype: jax.typing.DTypeLike, draft: bool, tick: Tick
) -> FinalStates:
    """Run token batches (B, T), which are of one length, through the model and, if `draft`, its first MTP block.

    No more than one part of the model is asked for at a time. `tick` is called before every batch of every block.

    Raises InputError, naming the matrix, at the first block whose output is not finite.
    """
    step = _Final(source.config, batches, dtype, draft, tick)
    walk(source, step, mtp=int(draft))
    return FinalStates(step.scored, step.drafted)


class _Final(HiddenStates):
    """Keeps of the final norm's output, and of the MTP block's, what the head takes."""

    def __init__(
        self, config: Config, batches: Sequence[np.ndarray], dtype: jax.typing.DTypeLike, draft: bool, tick: Tick
    ):
        super().__init__(config, batches, dtype, drafts=draft, kept=np.asarray, tick=tick)
        self._length = batches[0].shape[1]
        self.scored: list[np.ndarray] = []
        self.drafted: list[np.ndarray] = []

    def norm(self, gain_D: jax.Array) -> None:
        for n, x_BTD in enumerate(self.states):
            normed_BTD = np.asarray(run_norm(x_BTD, gain_D, eps=self.config.rms_norm_eps))
            self.states[n] = normed_BTD
            self.scored.append(normed_BTD[:, self._length // 2 : self._length - 1].copy())

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        taken, given = tee(self.mtp_inputs())
        for own, y_BTD in zip(taken, through_mtp(mtp, given, self.mtp_by), strict=True):
            self.tick()
            require_finite_mtp(f"mtp.{depth}", mtp, *own, self.mtp_by, y_BTD)
            self.drafted.append(np.asarray(y_BTD)[:, self._length // 2 : self._length - 2].copy())
