"""What may be done to a model: every weight's formats with their exact bytes, and how many experts can go.

Shapes alone decide it, so it is known before any weight is read; `measure` adds what each option costs.
"""

from dataclasses import dataclass

import jax
import numpy as np

from moejax.formats import ExpertWeights, IntFormat, Leaf, payload_bytes
from moejax.model import DeepseekV3, named_leaves
from moejax.planning.costs import Costs, ExpertMenu, Menu
from moejax.planning.plan import KEEP, PROJECTIONS
from moejax.transforms.prune import min_per_group, pruning_order


@dataclass(frozen=True)
class Settings:
    """The candidate formats, the pruning criterion, and the bits that weights other than routed experts keep at least:
    `min_bits_outer` for embedding, head and the last layer's shared expert, `min_bits_block` for the rest."""

    formats: tuple[IntFormat, ...] = tuple(IntFormat(bits, 128) for bits in (1, 2, 3, 4, 5, 6, 8))
    criterion: str = "reap"
    min_bits_outer: int = 4
    min_bits_block: int = 2

    @property
    def names(self) -> tuple[str, ...]:
        """The formats' names, KEEP last."""
        return (*(candidate.name for candidate in self.formats), KEEP)


def options(model: DeepseekV3, settings: Settings) -> Costs:
    """All options of a model, concrete or abstract, with no cost yet: 0 if allowed, infinite if not."""
    names, rows = [], []
    for name, leaf in quantizable(model).items():
        names.append(name)
        rows.append(_options_of(leaf, _min_bits(name, model, settings), settings))
    experts = {i: _expert_options(model, i, settings) for i in moe_blocks(model)}
    return Costs(tuple(names), _menu(rows, settings), experts)


def quantizable(model: DeepseekV3) -> dict[str, Leaf]:
    """The weights outside the routed experts that may be rounded: all matrices but the routers."""
    leaves = named_leaves(model).items()
    return {
        name: leaf
        for name, leaf in leaves
        if not isinstance(leaf, ExpertWeights) and leaf.ndim >= 2 and not name.endswith(".router")
    }


def moe_blocks(model: DeepseekV3) -> list[int]:
    """The blocks that have experts, MTP blocks counted behind the layers."""
    return [i for i in range(model.config.num_blocks) if model.config.is_moe(i)]


def block_name(model: DeepseekV3, index: int) -> str:
    """The name under which a block's weights stand in the model."""
    layers = model.config.num_hidden_layers
    return f"layers.{index}" if index < layers else f"mtp.{index - layers}.block"


def _expert_options(model: DeepseekV3, index: int, settings: Settings) -> ExpertMenu:
    leaves = named_leaves(model)
    menus = {}
    for projection in PROJECTIONS:
        weights = leaves[f"{block_name(model, index)}.mlp.experts.{projection}"]
        assert isinstance(weights, ExpertWeights)
        one = jax.eval_shape(lambda w: w.expert(0), weights)
        menus[projection] = _menu([_options_of(one, 1, settings)] * weights.num_experts, settings)
    config = model.config
    group_E = np.arange(config.n_routed_experts) // (config.n_routed_experts // config.n_group)
    order = pruning_order(np.zeros(len(group_E)), group_E, min_per_group(config, config.num_experts_per_tok))
    return ExpertMenu(menus, order, np.zeros(len(order) + 1))


def _options_of(leaf: Leaf, min_bits: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and costs (F,) of one weight."""
    as_it_is = payload_bytes(leaf)
    sizes, costs = [], []
    for candidate in settings.formats:
        fits = candidate.fits(leaf.shape[-1])
        size = payload_bytes(candidate.abstract(leaf.shape)) if fits else as_it_is
        allowed = fits and candidate.bits >= min_bits and size < as_it_is
        sizes.append(size)
        costs.append(0.0 if allowed else np.inf)
    return np.asarray([*sizes, as_it_is]), np.asarray([*costs, 0.0])


def _menu(rows: list[tuple[np.ndarray, np.ndarray]], settings: Settings) -> Menu:
    return Menu(settings.names, np.stack([size for size, _ in rows]), np.stack([cost for _, cost in rows]))


def _min_bits(name: str, model: DeepseekV3, settings: Settings) -> int:
    last = f"layers.{model.config.num_hidden_layers - 1}.mlp.shared"
    outer = name in ("embed", "head") or name.startswith(last)
    return settings.min_bits_outer if outer else settings.min_bits_block
