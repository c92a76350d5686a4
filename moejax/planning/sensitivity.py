"""How sensitive a model's predictions are to errors of each of its weights, where somebody has measured it.

A measurement is the mean KL divergence of the model with one tensor at a time in llama.cpp's IQ1_M, as published for
DeepSeek-V3.1-Terminus by GGUF-Tool-Suite (github.com/Thireus/GGUF-Tool-Suite). Read that way:

    KL(weight in a format) = (measured - floor) / members * error(format) / error(IQ1_M)

The floor is the least value of all, what the measurement shows where nothing changes. Tensors of equal values were
measured as one, so they share theirs. Single values are noisy: their layers' ranks correlate at 0.36 to 0.49 with those
of the same publisher's perplexities, so half of a value's distance from its kind's mean is believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.model import Config
from moejax.model.weights import block_and_name

# Kinds of weights that the measurement changed together.
_TOGETHER = (
    ("self_attn.q_a", "self_attn.q_b"),
    ("self_attn.k_b", "self_attn.v_b"),
    ("mlp.shared.gate", "mlp.shared.up", "mlp.shared.down"),
)
# What stands in for kinds that were not measured: q is both of its factors, eh_proj one more matrix of D outputs.
_STAND_INS = {"self_attn.q": ("self_attn.q_a", "self_attn.q_b"), "eh_proj": ("self_attn.o",)}
_BELIEVED = 0.5


@dataclass(frozen=True)
class Sensitivity:
    """KL by kind of weight, above the floor, of a weight in the format that was measured: a number for embedding and
    head; for the rest depth (0 to 1) and KL of every layer. A projection's experts count together."""

    outer: Mapping[str, float]
    by_depth: Mapping[str, tuple[np.ndarray, np.ndarray]]
    source: str

    def of(self, name: str, config: Config) -> float:
        """KL of the weight `name` of a model in the format that was measured, at the same relative depth.

        MTP blocks, which the model's predictions do not depend on, count like the last layer.
        """
        block, kind = block_and_name(name, config.num_hidden_layers)
        if block is None:
            return self.outer[kind]
        layer = min(block, config.num_hidden_layers - 1)
        depth = (layer + 0.5) / config.num_hidden_layers
        return sum(float(np.interp(depth, *self.by_depth[part])) for part in _STAND_INS.get(kind, (kind,)))


def sensitivity_from_json(raw: Mapping[str, Any], source: str) -> Sensitivity:
    """Read a measurement: `kl` holds a number for `embed` and `head` and, for other kinds, KL by layer.

    Raises InputError if it is none.
    """
    try:
        kl = {kind: own if isinstance(own, float) else _by_layer(own) for kind, own in raw["kl"].items()}
        if not all(np.all(np.isfinite(own[1] if isinstance(own, tuple) else own)) for own in kl.values()):
            raise ValueError("values that are not finite")
        layers = 1 + max(int(layers[-1]) for layers, _ in (own for own in kl.values() if isinstance(own, tuple)))
        floor = min(float(np.min(own[1])) if isinstance(own, tuple) else own for own in kl.values())
        members = {kind: len(group) for group in _TOGETHER for kind in group}
        outer, by_depth = {}, {}
        for kind, own in kl.items():
            if isinstance(own, tuple):
                above = (own[1] - floor) / members.get(kind, 1)
                by_depth[kind] = ((own[0] + 0.5) / layers, _BELIEVED * above + (1 - _BELIEVED) * np.mean(above))
            else:
                outer[kind] = own - floor
        return Sensitivity(outer, by_depth, str(raw["source"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source} cannot be read: {error!r} in it; KL by kind of weight is needed") from None


def _by_layer(raw: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    if not raw:
        raise ValueError("a kind without layers")
    layers = np.asarray([int(layer) for layer in raw])
    order = np.argsort(layers)
    return layers[order], np.asarray([float(value) for value in raw.values()])[order]
