#!/usr/bin/env bash
# Triton 3.8.0 specializes integers inside tuple arguments that do_not_specialize names.
#
# do_not_specialize keeps a kernel from being compiled anew for an integer that is 1 or a multiple of 16. For an argument
# that is a tuple of integers it does nothing: (1, 3) makes the first a constant, (16, 3) marks it divisible, and each is a
# kernel of its own, so that a batch size passed in a tuple compiles again and again. A plain integer is left alone. Shown
# by the key that the JIT looks kernels up with; no GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet triton==3.8.0

cat > "$folder/kernel.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


@triton.jit(do_not_specialize=["size", "sizes"])
def kernel(size, sizes):
    tl.device_print("", size + sizes[0])


backend = make_backend(GPUTarget("cuda", 90, 32))
binder = create_function_from_signature(kernel.signature, kernel.params, backend)
keys = {n: binder(n, (n, 3))[1] for n in (1, 16, 17)}
for n, (plain, inside) in keys.items():
    print(f"size={n}, sizes=({n}, 3): {plain}, {inside}")
plain, inside = ({repr(key[k]) for key in keys.values()} for k in (0, 1))
assert len(plain) == 1 and len(inside) == 3, "integers in a tuple are no longer specialized"
PYTHON
"$folder/venv/bin/python" "$folder/kernel.py"
