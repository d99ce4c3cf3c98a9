#!/usr/bin/env bash
# Triton 3.8.0 rounds a constant to float32 in comparisons, tl.maximum, tl.minimum and tl.clamp beside float64 numbers.
#
# Arithmetic and tl.where take a Python constant in the type of the other operand: x * 0.1 of float64 x holds 0.1.
# x > 0.1 and tl.maximum(x, 0.1) hold 0.10000000149011612, so that a bound in float64 is off by 1.5e-8 of itself, silently.
# Shown by the kernels' intermediate code for Hopper; no GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet triton==3.8.0

cat > "$folder/kernel.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def times(x, y):
    tl.store(y, tl.load(x) * 0.1)


@triton.jit
def compare(x, y):
    tl.store(y, tl.load(x), mask=tl.load(x) > 0.1)


@triton.jit
def where(x, y):
    tl.store(y, tl.where(tl.load(x) > 0, tl.load(x), 0.1))


@triton.jit
def maximum(x, y):
    tl.store(y, tl.maximum(tl.load(x), 0.1))


@triton.jit
def minimum(x, y):
    tl.store(y, tl.minimum(tl.load(x), 0.1))


@triton.jit
def clamp(x, y):
    tl.store(y, tl.clamp(tl.load(x), 0.1, 5.0))


constants = {}
for kernel in (times, compare, where, maximum, minimum, clamp):
    source = ASTSource(kernel, {"x": "*fp64", "y": "*fp64"}, {})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    found = {float(text) for text in re.findall(r"arith\.constant (\S+) : f64", code)} - {0.0, 5.0}
    constants[kernel.__name__] = found
    print(f"{kernel.__name__}: {found}")
exact = {name for name, found in constants.items() if found == {0.1}}
rounded = {name for name, found in constants.items() if found == {0.10000000149011612}}
assert exact == {"times", "where"} and rounded == {"compare", "maximum", "minimum", "clamp"}, "no longer so"
PYTHON
"$folder/venv/bin/python" "$folder/kernel.py"
