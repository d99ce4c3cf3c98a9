"""What ``import gkd_fast`` brings along."""

import subprocess
import sys

# Each takes a quarter of a second or more; what needs them imports them when it is used.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torchvision", "matplotlib")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_heavy_is_imported():
    code = f"""
import sys
import torch
before = {{name for name in {HEAVY} if name in sys.modules}}
import gkd_fast
print(*sorted(set({HEAVY}) & set(sys.modules) - before))
"""
    assert run(code) == ""


def test_what_is_imported_late_is_there():
    code = """
import gkd_fast
from gkd_fast import *
from gkd_fast.micro_batch import micro_batched as same
assert micro_batched is same is gkd_fast.micro_batched
assert gkd_fast.micro_batch.micro_batched is same
assert not hasattr(gkd_fast, "nothing")
from gkd_fast import kernels
assert "sm_90" in kernels.ARCHITECTURES and callable(kernels.specializations)
print("there")
"""
    assert run(code) == "there"
