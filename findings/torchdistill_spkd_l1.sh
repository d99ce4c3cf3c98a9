#!/usr/bin/env bash
# torchdistill 1.1.5's SPKDLoss normalises rows by their sums (L1), where the paper it names has L2.
#
# Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019, normalise every row of the Gram matrix to unit L2
# length. SPKDLoss calls torch.nn.functional.normalize(G, 1), whose second argument is p, not the dimension, so the rows
# get unit L1 length: an entry is then of the order 1/B instead of 1/√B, and the loss smaller by a factor of the order of
# the batch size, with other proportions between samples. Weights published for the loss (3,000) are then far too small.
# PYTHON: an interpreter with torch, scipy and torchvision; torchdistill itself is installed into a folder of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip install --quiet --no-deps --target "$folder" torchdistill==1.1.5

PYTHONPATH="$folder" "$PYTHON" - <<'PYTHON'
import torch
from torch.nn.functional import normalize
from torchdistill.losses.mid_level import SPKDLoss

torch.manual_seed(0)
student, teacher = torch.randn(256, 64), torch.randn(256, 128)
loss = SPKDLoss("s", "t", reduction="batchmean")
found = loss({"s": {"output": student}}, {"t": {"output": teacher}}).item()


def by(p):
    students, teachers = (normalize(x @ x.T, p=p, dim=1) for x in (student, teacher))
    return (students - teachers).square().mean().item()


print(f"SPKDLoss {found:.4g}; rows of unit L1 length {by(1):.4g}; of unit L2 length, the paper's {by(2):.4g}")
assert abs(found / by(1) - 1) < 1e-4 and by(2) > 10 * found, "SPKDLoss is no longer that of rows of unit L1 length"
PYTHON
