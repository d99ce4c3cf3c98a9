#!/usr/bin/env bash
# torch.cuda.is_current_stream_capturing() raises in a CUDA build on a machine without a driver, where it promises False.
#
# "If a CUDA context does not exist on the current device, returns False without initializing the context." In PyTorch
# 2.14.1 from PyPI (CUDA 13.0) on a machine without an NVIDIA driver it raises AcceleratorError, "CUDA driver version is
# insufficient for CUDA runtime version". So code that asks whether it is being captured, and runs on CPUs too, has to
# ask torch.cuda.is_available() first.
# PYTHON: an interpreter with that PyTorch.
set -euo pipefail
"${PYTHON:-python3}" - <<'PYTHON'
import torch

assert torch.__version__.startswith("2.14.1") and torch.version.cuda, f"PyTorch 2.14.1 with CUDA, not {torch.__version__}"
assert not torch.cuda.is_available(), "a machine without a driver is needed"
try:
    found = torch.cuda.is_current_stream_capturing()
except RuntimeError as error:
    print(f"PyTorch {torch.__version__}: {type(error).__name__}: {str(error).splitlines()[0]}")
else:
    raise SystemExit(f"it returns {found} now")
PYTHON
