"""The Pallas kernel compiles for a real TPU, ahead of time and without one, at the shapes of DeepSeek-V3."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.formats import abstract_experts

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="libtpu exists for Linux on x86-64 only"
)

CASES = [
    *[f"1,bfloat16,int{bits}g64[2048,7168]" for bits in range(1, 9)],
    "1,bfloat16,int2g128e8[2048,7168]",
    "1,bfloat16,sint4g32f16[2048,7168]",
    "256,bfloat16,int3g64e8[7168,16384]",
    "7,bfloat16,int5g128[1536,7168]",
    "64,float32,int3g32[7168,2048]",
    "256,bfloat16,int1g32[24576,1536]",
    "256,bfloat16,int6g64[7168,16384]",
    "256,bfloat16,int8g128[18432,7168]",
    "256,bfloat16,int7g32[7168,18432]",
    "48,float32,int8g32[7168,18432]",
    "1,bfloat16,ternaryg128[2048,7168]",
    "64,float32,ternaryg64e8[7168,2048]",
    "256,bfloat16,ternaryg32[7168,18432]",
    "256,bfloat16,ternaryg128[24576,1536]",
]
# Few rows, which are blocks of one row; many, which come in blocks of their expert; buckets of several formats.
EXPERTS = [
    *[f"8,bfloat16,int{bits}g128[32,2048,7168]" for bits in range(1, 9)],
    "8,bfloat16,int2g128e8[32,7168,2048]",
    "8,float32,sint4g32f16[32,2048,7168]",
    "64,bfloat16,int1g128e8[4,2048,7168]+int2g128e8[16,2048,7168]+int3g128[4,2048,7168]",
    "4096,bfloat16,int2g128e8[16,7168,2048]+int4g64[16,7168,2048]",
    "2048,float32,int4g128[4,2048,24576]",
    "8,bfloat16,ternaryg128[32,2048,7168]",
    "8,float32,ternaryg128e8[23,7168,2048]",
    "8,bfloat16,ternaryg128[64,1408,2048]",
    "64,bfloat16,ternaryg128[16,2048,7168]+int2g128[4,2048,7168]+ternaryg64e8[4,2048,7168]",
]


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    program = Path(__file__).parents[2] / "tools" / "bench" / "tpu_compile.py"
    command = [sys.executable, str(program), "--chips", "v5e:2x4", "--cases", *CASES, *EXPERTS]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def compiled(case: str, run: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Kernels, and bytes of temporaries."""
    found = {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert case in found, run.stderr[-4000:]
    return found[case]["mosaic_kernels"], found[case]["temporary_bytes"]


@pytest.mark.parametrize("case", CASES)
def test_compiles(case: str, run: subprocess.CompletedProcess[str]) -> None:
    """Weights are unpacked in VMEM and read where they lie: nothing is copied in HBM."""
    kernels, temporary_bytes = compiled(case, run)
    assert kernels == 1 and temporary_bytes < 1 << 20


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_compile(case: str, run: subprocess.CompletedProcess[str]) -> None:
    """A kernel a bucket. Rows and results are copied to blocks and back, no weights."""
    rows, dtype, spec = case.split(",", maxsplit=2)
    w = abstract_experts(spec)
    _, outputs, inputs = w.shape
    kernels, temporary_bytes = compiled(case, run)
    blocks = 2 * (int(rows) + w.num_experts * min(256, int(rows)))
    assert kernels == len(w.buckets)
    assert temporary_bytes < 2 * blocks * (inputs + outputs) * np.dtype(dtype).itemsize + (1 << 20)
    if int(rows) == 8:
        assert temporary_bytes < 1 << 20
