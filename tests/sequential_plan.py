"""A plan for the small checkpoint that calls for error feedback and sequential calibration."""

from moejax.planning import BlockPlan, Method, Plan
from moejax.planning.plan import KEEP, PROJECTIONS

EVERY, SOME = tuple(range(12)), (0, 1, 3, 4, 6, 8, 9, 11)
PLAN = Plan(
    KEEP,
    "int2g128",
    (
        BlockPlan({"mlp.down": "int2g128"}),
        BlockPlan({"self_attn.o": "int2g128"}, SOME, {name: ("int2g128",) * 8 for name in PROJECTIONS}, 3, 1.125),
        BlockPlan({}, EVERY, {name: (KEEP,) * 12 for name in PROJECTIONS}, 3),
        BlockPlan({"eh_proj": "int2g128"}, EVERY, {name: (KEEP,) * 12 for name in PROJECTIONS}, 3),
    ),
    Method(error_feedback=True, sequential=True),
)
