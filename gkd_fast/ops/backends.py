"""Which library implements the ops on which device, decided once, when this module is imported.

PyTorch's dispatcher is the registry: an op's CUDA kernels are the Triton launchers, its CPU kernels those of the C++
extension. Under ``TRITON_INTERPRET=1`` the Triton launchers take the CPU key instead, for the whole process, so that
forward and backward never come from two libraries.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkd_fast.kernels import REGISTERED, Launchers, register

PACKAGE = Path(__file__).resolve().parents[1]
BUILT_FOR = PACKAGE / "_C.torch-version.txt"
HOW_TO_BUILD = (
    "build the C++ extension with `make install`, or in the source folder with "
    "`pip install --no-build-isolation --no-deps --force-reinstall .` (needs a C++20 compiler, setuptools, wheel, "
    "ninja), or install the platform wheel that `make wheel` builds on a machine with a compiler, the same Python and "
    "the same PyTorch"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load_extension() -> str | None:
    """Load the C++ kernels; the reason if they cannot be used.

    The PyTorch version they were built for is compared before they are opened, because a library built for
    another version may crash instead of failing.
    """
    if not any(PACKAGE.glob("_C.*so")) and not any(PACKAGE.glob("_C.*pyd")):
        return f"the C++ extension is not built: {HOW_TO_BUILD}"
    built_for = BUILT_FOR.read_text().strip() if BUILT_FOR.exists() else "an unknown version"
    if built_for != torch.__version__:
        return (
            f"the C++ extension was built for PyTorch {built_for}, but {torch.__version__} is installed: "
            f"{HOW_TO_BUILD.replace('build', 'rebuild', 1)}"
        )
    try:
        import_module("gkd_fast._C")
    except ImportError as error:
        return f"the C++ extension does not load ({error}): {HOW_TO_BUILD.replace('build', 'rebuild', 1)}"
    return None


def _load_triton(key: str) -> str | None:
    """Give the Triton launchers the dispatch key ``key``; the reason if they cannot be used.

    Triton itself is imported with the first call that goes there.
    """
    if find_spec("triton") is None:
        return "Triton is missing: install the triton package"
    register(key)
    return None


# The reason why a backend cannot run in this process, or None where it can.
if INTERPRETED:
    CPP_MISSING = "TRITON_INTERPRET=1 gives the CPU to the interpreted Triton kernels"
    TRITON_MISSING = _load_triton("CPU")
else:
    CPP_MISSING = _load_extension()
    TRITON_MISSING = _load_triton("CUDA")


def missing(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` ("cpp" or "triton") cannot compute on ``device``, or None if it can."""
    if backend == "cpp":
        return CPP_MISSING if device.type == "cpu" else f"it computes on the CPU, the tensors are on {device}"
    if TRITON_MISSING is None and device.type not in REGISTERED:
        return f"it computes on {'CPU' if INTERPRETED else 'CUDA'} devices here, the tensors are on {device}"
    return TRITON_MISSING


def has_kernels(op: str, device: torch.device) -> bool:
    """Whether the library that computes on ``device`` has kernels of ``op``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gkd_fast::{op}", device.type.upper())


has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in gkd_fast._arguments


def implementation(tensors: Sequence[Tensor], *kept: tuple) -> Any:
    """What has the ops of these tensors by name, below autograd: ``torch.ops.gkd_fast``, or the Triton launchers that
    it would come to, without the way through the dispatcher, which takes as long as two launches.

    Only where nothing on that way could be for somebody else: subclasses and modes of tensors, transforms, a profiler.
    ``kept``: what :func:`kept_by` gave in the forward pass.
    """
    direct = (
        tensors[0].device.type in REGISTERED
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()
        and _PLAIN.issuperset(map(type, tensors))
    )
    return Launchers(*kept) if direct else torch.ops.gkd_fast


def kept_by(ops: Any) -> tuple[list, list[Tensor]]:
    """Names and tensors of what an implementation of ops prepared and its backward pass can have again."""
    return ops.kept() if isinstance(ops, Launchers) else ([], [])


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
