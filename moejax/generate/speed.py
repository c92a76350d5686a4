"""How fast a model reads a prompt and how fast it writes."""

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moejax.errors import InputError
from moejax.generate.decode import Decoding, Runner, generate
from moejax.model import DeepseekV3
from moejax.progress import Progress, silent


@dataclass
class Timed:
    """The tokens of a generator, and the times at which they came.

    first_seconds: from the first request to the first token: the prompt's time, and that of compiling.
    decode_tokens_per_s: of the tokens from the third on, None for fewer; what decodes is compiled before the second.
    """

    tokens: Iterable[int]
    _started: float = field(default=0.0, init=False)
    _times: list[float] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[int]:
        self._started = time.perf_counter()
        for token in self.tokens:
            self._times.append(time.perf_counter())
            yield token

    @property
    def count(self) -> int:
        return len(self._times)

    @property
    def first_seconds(self) -> float | None:
        return self._times[0] - self._started if self._times else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        if self.count < 3:
            return None
        return (self.count - 2) / (self._times[-1] - self._times[1])


@dataclass(frozen=True)
class Speed:
    """Medians over repeated runs, everything compiled beforehand."""

    prompt_tokens: int
    decoded_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def check_measurement(prompt_tokens: int, decoded_tokens: int, repeats: int) -> None:
    """Raise InputError for numbers below 1."""
    for name, value in (("prompt", prompt_tokens), ("tokens", decoded_tokens), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"{name} is {value}; at least 1 is needed")


def measure_speed(
    model: DeepseekV3 | Runner,
    prompt_tokens: int,
    decoded_tokens: int,
    repeats: int,
    decoding: Decoding,
    progress: Progress = silent,
) -> Speed:
    """Random prompts of `prompt_tokens`, each continued greedily by `decoded_tokens` behind it, `repeats` times.

    Raises InputError as `check_measurement` does, or if both exceed the context.
    """
    check_measurement(prompt_tokens, decoded_tokens, repeats)
    prefill, decode = [], []
    for n in progress(range(repeats + 1), "measuring speed"):
        prompt = np.random.RandomState(n).randint(model.config.vocab_size, size=prompt_tokens)
        started = time.perf_counter()
        tokens = generate(model, prompt, decoded_tokens + 1, decoding=decoding)
        next(tokens)
        first = time.perf_counter()
        for _ in tokens:
            pass
        if n:  # the first run compiles
            prefill.append(prompt_tokens / (first - started))
            decode.append(decoded_tokens / (time.perf_counter() - first))
    return Speed(prompt_tokens, decoded_tokens, statistics.median(prefill), statistics.median(decode))
