"""The kernels as they are compiled for an architecture by default, to be compiled and read without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Specialization:
    """One kernel with the types, constants and tile sizes of a default launch at large batch sizes.

    Attributes:
        op: the op it belongs to ("relation_kl", …).
        kernel: its name, unique within an architecture, product type, width and number of stages.
        direction: "forward", "backward" or "normalization".
        arch, dtype, dim: as asked for; ``dtype`` is the product precision, ``dim`` the width of every matrix.
        signature: argument → Triton type (a tuple of types for a list of stages); constexprs: argument → value.
        block_rows, block_columns: the rows that a program owns and the columns of one step of its walk.
        products: matrix products per step, each block_rows × block_columns × dim.
        exponentials: exponentials per entry of the tile and step that the hardware's unit computes;
        polynomials: those that the float units compute.
        exemption: why no matrix instruction is expected, or None.
    """

    op: str
    kernel: str
    direction: str
    arch: str
    dtype: str
    dim: int
    fn: JITFunction
    signature: dict
    constexprs: dict
    num_warps: int
    num_stages: int
    block_rows: int
    block_columns: int
    products: int
    exponentials: float
    polynomials: float
    exemption: str | None
    grid: Callable[[int], tuple[int, int]] = field(compare=False)

    def programs(self, batch: int) -> int:
        """Programs of one launch at this batch size."""
        return self.grid(batch)[0]

    def trips(self, batch: int) -> int:
        """Steps of the walk over the columns per program."""
        return self.grid(batch)[1]


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture ("sm_90", "gfx942")."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch!r}")
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compile(spec: Specialization, arch: str | None = None) -> triton.compiler.CompiledKernel:
    """Compile for ``arch`` (default: the specialization's); needs no GPU. ``.asm`` holds "cubin" or "amdgcn"."""
    source = ASTSource(spec.fn, spec.signature, spec.constexprs, _alignments(spec))
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=target(arch or spec.arch), options=options)


def _alignments(spec: Specialization) -> dict:
    """Pointers are aligned to 16 bytes and widths are multiples of 16, which a launch finds out for itself."""
    aligned = {}
    for place, name in enumerate(spec.fn.arg_names):
        kind = spec.signature[name]
        if isinstance(kind, tuple):
            aligned.update({(place, k): [["tt.divisibility", 16]] for k in range(len(kind))})
        elif kind.startswith("*") or name in ("width", "dim"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    return aligned


def specializations(arch: str, dtype: str, dim: int, stages: tuple[int, int] = (1, 1)) -> list[Specialization]:
    """Every kernel that a forward and backward pass launches at large batch sizes, in the default configuration.

    Args:
        arch: one of ``ARCHITECTURES``.
        dtype: product precision: "float64", "float32", "tf32", "bfloat16" or "float16".
        dim: width of the unit rows and of the messages.
        stages: number of student and of teacher stages.
    """
    target(arch)
    return []
