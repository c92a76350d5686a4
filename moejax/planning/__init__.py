"""What is done to each weight, as a value; and the solve that chooses it under a byte budget."""

from moejax.planning.plan import KEEP, BlockPlan, Method, Plan

__all__ = ["KEEP", "BlockPlan", "Method", "Plan"]
