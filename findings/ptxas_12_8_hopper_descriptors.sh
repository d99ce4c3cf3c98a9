#!/usr/bin/env bash
# ptxas 12.8.93 (in the wheels of Triton 3.4 to 3.7) reads registers of a wgmma's matrix descriptor before it sets them.
#
# A loop over tiles, num_stages=1, whose last product takes its second operand (16 columns) from the tile loaded last.
# Compiled for sm_90 by Triton 3.6.0, the loop's first step copies the descriptor of that tile from uniform registers
# that only the end of the step sets: the first step multiplies with whatever they hold, a wrong result or an illegal
# access on a GPU. The PTX is right, and Triton 3.8.0, whose ptxas is 12.9.86, makes right machine code of the same
# source. Seen with 3.6.0: "UR10, UR11 read before they are set"; with 3.8.0: none. No GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/kernel.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def weighted(nodes, values, out, count, WIDTH: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    i, k, w = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, VALUES)
    start = tl.program_id(0) * BLOCK
    x = tl.load(nodes + (start + i)[:, None] * WIDTH + k[None, :])
    g = tl.load(values + (start + i)[:, None] * VALUES + w[None, :])
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for j in tl.range(0, count, BLOCK, num_stages=1):
        other = tl.load(values + (j + i)[:, None] * VALUES + w[None, :])
        m = tl.dot(g, tl.trans(other))
        m = tl.dot(g, tl.trans(other), m)
        columns = tl.load(nodes + (j + i)[:, None] * WIDTH + k[None, :])
        c = tl.dot(x, tl.trans(columns))
        total = tl.dot((tl.exp2(c) * m).to(tl.bfloat16), columns, total)
    tl.store(out + (start + i)[:, None] * WIDTH + k[None, :], total)


def instructions(listing):
    """[(predicated, opcode, operands)] and {label: index}."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+ +)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            code.append((bool(found[1]), found[2], found[3].split(", ")))
    return code, labels


def read_before_set(code, labels):
    """Uniform registers that an unpredicated sum or move reads and that some path from the entry has not written."""

    def pair(name, opcode):
        number = int(name[2:])
        return {f"UR{number}", f"UR{number + 1}"} if ".64" in opcode or ".WIDE" in opcode else {name}

    everything = frozenset(f"UR{k}" for k in range(64))
    before, pending, found = {0: everything}, [0], set()
    while pending:
        at = pending.pop()
        predicated, opcode, operands = code[at]
        unset = before[at]
        result = re.fullmatch(r"UR\d+", operands[0]) is not None
        if opcode.split(".")[0] in ("UIADD3", "UMOV") and not predicated:
            names = [x.lstrip("-") for x in operands[1:] if re.fullmatch(r"-?UR\d+", x)]
            found |= {r for name in names for r in pair(name, opcode)} & unset
        if result and not predicated:
            unset -= pair(operands[0], opcode)
        following = [labels[m[0]] for x in operands if opcode == "BRA" and (m := re.search(r"\.L\w+", x))]
        if not (opcode in ("BRA", "EXIT") and not predicated and len(operands) == 1):
            following.append(at + 1)
        for to in following:
            if to < len(code) and not unset <= before.get(to, frozenset()):
                before[to] = before.get(to, frozenset()) | unset
                pending.append(to)
            elif to < len(code) and to not in before:
                before[to] = unset
                pending.append(to)
    return sorted(found)


types = dict.fromkeys(("nodes", "values"), "*bf16") | {"out": "*fp32", "count": "i32"}
constants = {"WIDTH": 16, "VALUES": 32, "BLOCK": 64}
aligned = {(k,): [["tt.divisibility", 16]] for k in range(4)}
source = ASTSource(weighted, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
file, tools = Path(sys.argv[1]), Path(triton.__file__).parent / "backends/nvidia/bin"
file.write_bytes(kernel.asm["cubin"])
listing = subprocess.run([tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
version = subprocess.run([tools / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
assert "HGMMA" in listing
print(re.search(r"V([\d.]+)", version)[1], *read_before_set(*instructions(listing)))
PYTHON

see() {  # Triton's version → ptxas' version and the registers
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/python" -m pip install --quiet "triton==$1"
    TRITON_CACHE_DIR="$folder/cache-$1" "$folder/$1/bin/python" "$folder/kernel.py" "$folder/$1.cubin"
}

old=$(see 3.6.0)
new=$(see 3.8.0)
echo "Triton 3.6.0: ptxas and the registers read before they are set: $old"
echo "Triton 3.8.0: $new"
[ "$old" = "12.8.93 UR10 UR11" ] && [ "$new" = "12.9.86" ]
