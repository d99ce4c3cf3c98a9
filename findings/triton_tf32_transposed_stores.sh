#!/usr/bin/env bash
# Triton 3.8.0 (3.6.0 too) transposes a tf32 operand of Hopper's matrix unit by stores of which 8 or 16 meet in one bank.
#
# The warpgroup instruction reads the second operand of 32-bit products in one order only. A tile that a loop multiplies
# both ways, q·kᵀ and then (q·kᵀ)·k, as attention and similarity losses do, is written to shared memory once as it came and
# once transposed; the transposed copy goes by stores of 4 bytes a thread. With 64 columns 8 threads of a warp meet in each
# bank that they use, with 128 columns 16: a store takes 8 or 16 passes, where the layout's swizzle could have spread it
# over all 32 banks. Counted from the PTX, whose addresses depend on the thread alone; no GPU is needed. On an H200
# (Triton 3.6.0) kernels of this form took 2.1 (64 columns) and 3.4 (128 columns, 64×64 tiles) times as long as the
# same count of clocks without conflicts predicts, and 1.0 to 1.1 times as long with them.
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
def kernel(queries, keys, out, steps, WIDTH: tl.constexpr):
    rows, columns = tl.arange(0, 64), tl.arange(0, WIDTH)
    q = tl.load(queries + rows[:, None] * WIDTH + columns)
    sums = tl.zeros((64, WIDTH), tl.float32)
    for step in range(steps):
        k = tl.load(keys + (step * 64 + rows)[:, None] * WIDTH + columns)
        similarities = tl.dot(q, k.T, input_precision="tf32")
        sums = tl.dot(similarities, k, sums, input_precision="tf32")
    tl.store(out + rows[:, None] * WIDTH + columns, sums)


OPERATIONS = {
    "mov": lambda x: x,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "mad": lambda x, y, z: x * y + z,
    "shl": lambda x, y: x << y & 0xFFFFFFFF,
    "shr": lambda x, y: (x & 0xFFFFFFFF) >> y,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "neg": lambda x: -x,
    "not": lambda x: ~x,
    "bfe": lambda x, at, bits: (x & 0xFFFFFFFF) >> at & (1 << bits) - 1,
    "setp.eq": lambda x, y: int(x == y),
    "setp.ne": lambda x, y: int(x != y),
    "selp": lambda x, y, which: x if which else y,
}


def address(register, thread, lines):
    """The value of a PTX register that depends on the thread alone; what is not known, the buffer's base, is 0."""
    if re.fullmatch(r"-?\d+", register):
        return int(register)
    if register == "%tid.x":
        return thread
    for line in lines:
        match = re.match(rf"\s*(\S+)\s+{re.escape(register)}, (.*);", line)
        if match:
            name = match[1].split(".")
            operation = OPERATIONS.get(".".join(name[:2])) or OPERATIONS.get(name[0])
            if operation is None:
                return 0
            return operation(*(address(x, thread, lines) for x in match[2].split(", ")))
    return 0


def passes(store, lines):
    """In how many passes a warp's store of 4 bytes a thread goes: the most threads that meet in one of 32 banks."""
    register, offset = re.search(r"\[\s*(%\w+)\s*(?:\+\s*(\d+))?", store).groups()
    words = {(address(register, thread, lines) + int(offset or 0)) // 4 for thread in range(32)}
    return max(sum(word % 32 == bank for word in words) for bank in range(32))


found = {}
for width in (64, 128):
    source = ASTSource(kernel, {"queries": "*fp32", "keys": "*fp32", "out": "*fp32", "steps": "i32"}, {"WIDTH": width},
                       {(k,): [["tt.divisibility", 16]] for k in range(3)})  # fmt: skip
    lines = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"].splitlines()
    products = sorted({x for line in lines for x in re.findall(r"wgmma\.mma_async\S+tf32", line)})
    stores = [line for line in lines if re.search(r"st\.shared(::cta)?\.b32", line)]
    found[width] = {passes(store, lines) for store in stores}
    print(f"{width} columns: {products}; {len(stores)} stores of 4 bytes, passes of a warp's store: {found[width]}")
assert found == {64: {8}, 128: {16}}, found
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernel.py"
