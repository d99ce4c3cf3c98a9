#!/usr/bin/env bash
# torch.compile takes the first argument of autograd.Function.forward for a context that is not there, where no input
# needs a gradient and the variable part of the arguments holds two tensors.
#
# forward(ctx, kind, count, *tensors) is the old form, with ctx. Where no tensor needs a gradient, Dynamo of PyTorch 2.14.1
# leaves the context out if the call's arguments are as many as forward's parameters, ctx and *tensors counted as one each
# (torch/_dynamo/variables/misc.py: `if len(args) - 1 == len(sig.parameters)`). With two tensors they are: every argument
# then takes the place of the one before it. The same call works eagerly, and compiled where an input needs a gradient.
# PYTHON: an interpreter with that PyTorch; else one is installed in a folder of its own.
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder"
  "$folder/bin/pip" install --quiet torch==2.14.1 numpy
  PYTHON=$folder/bin/python
fi
"$PYTHON" - <<'PYTHON'
import torch


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind, count, *tensors):
        first, *others = tensors
        ctx.save_for_backward(first, *others)
        return 2 * first

    @staticmethod
    def backward(ctx, upstream):
        return None, None, 2 * upstream, None


def call(x, y):
    return Doubled.apply("kind", 1, x, y)


def compiled(needs_gradient):
    torch.compiler.reset()
    x, y = torch.ones(3, requires_grad=needs_gradient), torch.ones(3)
    assert torch.equal(call(x, y), torch.full((3,), 2.0))
    return torch.compile(call, fullgraph=True, backend="eager")(x, y)


assert torch.equal(compiled(True), torch.full((3,), 2.0))
try:
    found = compiled(False)
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(f"PyTorch {torch.__version__}, no input needs a gradient: {type(error).__name__}: {lines[0]}")
else:
    raise SystemExit(f"it returns {found} now")
PYTHON
