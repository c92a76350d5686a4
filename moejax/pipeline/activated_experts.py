"""How many experts a token goes to after pruning, and with what routing scale: tried out, the best kept."""

from dataclasses import dataclass, replace

import jax

from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps
from moejax.model.moe import MoE
from moejax.model.rope import Rotation
from moejax.pipeline.probe import Probe
from moejax.pipeline.search import divergence_of, masked_blocks
from moejax.pipeline.working_copy import with_leaves
from moejax.planning import Plan
from moejax.progress import Progress
from moejax.transforms.experts_per_token import fit_routing_scale, paper_rule


@dataclass(frozen=True)
class ActivatedExperts:
    """A choice of K' and of a routing scale per layer (1 in dense layers), and its true KL on the probe's text."""

    experts_per_token: int
    routing_scales: tuple[float, ...]
    divergence: float

    @property
    def is_scaled(self) -> bool:
        return any(scale != 1.0 for scale in self.routing_scales)


def try_activated_experts(
    probe: Probe, compressed: DeepseekV3, plan: Plan, progress: Progress
) -> list[ActivatedExperts]:
    """The original K, one less, and the paper's rule, each without and with the least-squares routing scale; the best
    first."""
    blocks = masked_blocks(probe, compressed, plan)
    config = compressed.config
    kept = [len(own.keep) for own in plan.blocks if own.keep is not None]
    if not kept:
        return []
    full = config.num_experts_per_tok
    share = sum(kept) / (len(kept) * config.n_routed_experts)
    tried = []
    for fewer in progress(sorted({full, max(1, full - 1), paper_rule(full, share)}), "trying experts per token"):
        fitted = tuple(_fitted_scale(probe, i, block, fewer) for i, block in enumerate(blocks))
        for scales in ((1.0,) * len(blocks), fitted):
            adjusted = [_adjusted(block, fewer, scale) for block, scale in zip(blocks, scales, strict=True)]
            tried.append(ActivatedExperts(fewer, scales, divergence_of(probe, compressed, adjusted)))
    return sorted(tried, key=lambda choice: choice.divergence)


def with_activated_experts(plan: Plan, choice: ActivatedExperts) -> Plan:
    """The plan with that K' and those routing scales; MTP blocks take the last layer's."""
    scales = [*choice.routing_scales, *[choice.routing_scales[-1]] * (len(plan.blocks) - len(choice.routing_scales))]
    blocks = tuple(
        block if block.keep is None else replace(block, experts_per_token=choice.experts_per_token, routing_scale=scale)
        for block, scale in zip(plan.blocks, scales, strict=True)
    )
    return replace(plan, blocks=blocks)


def _adjusted(block: Block, experts_per_token: int, scale: float) -> Block:
    if not isinstance(block.mlp, MoE):
        return block
    return with_leaves(block, {"mlp.routing_scale": jax.numpy.float32(scale)}, experts_per_token)


def _fitted_scale(probe: Probe, index: int, block: Block, experts_per_token: int) -> float:
    original = probe.blocks[index]
    if not isinstance(original.mlp, MoE):
        return 1.0
    fewer = _adjusted(block, experts_per_token, 1.0).mlp
    scale = fit_routing_scale(original.mlp, fewer, _mlp_input(original, probe.inputs[index], probe.rotation))
    return round(float(scale), 4)


@jax.jit
def _mlp_input(block: Block, x_BTD: jax.Array, by: Rotation) -> jax.Array:
    """What a block's experts and router take in, (B*T, D)."""
    taps: Taps = {}
    block(x_BTD, by, taps=taps)
    return taps["mlp.router"]
