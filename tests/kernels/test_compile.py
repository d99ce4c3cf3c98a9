"""Every kernel's default configuration, compiled without a GPU for every architecture, judged by its binary."""

import os

import pytest

from bench.gpu import disassembly
from bench.gpu.devices import LIMITS
from gkd_fast.kernels import ARCHITECTURES, Specialization, compile, specializations
from gkd_fast.kernels.catalog.pairs import OF_GRAPHS

# Shared memory that one program may take, in bytes.
SHARED_MEMORY = {arch: limits.shared_memory - limits.reserved_shared for arch, limits in LIMITS.items()}

# The instructions of each architecture's matrix units, by the products' type. Hopper's warpgroup instruction reads the
# second operand of 32-bit products in one order only; the other products of these use the older one.
MATRIX = {
    "sm_80": {"float64": "DMMA", None: "HMMA"},
    "sm_86": {None: "HMMA"},
    "sm_90": {"float64": "DMMA", "tf32": "HGMMA|HMMA", "tf32x3": "HGMMA|HMMA", None: "HGMMA"},
    "sm_100": {"float64": "DMMA", None: r"UTC\w*MMA"},
    "gfx942": {None: "v_mfma_"},
}
WIDE_LOADS = r"LDG\.E\.128|LDG\.E\.\w*\.?128|LDGSTS\.E\.(\w+\.)*128|UTMALDG|(global|buffer)_load_dwordx4"

FULL_TYPES, FULL_WIDTHS = ("bfloat16", "float16", "tf32"), (64, 128, 256)
SHORT_TYPES = ("bfloat16", "float16")
# Of the short types, whose two exponentials in neighbor_gradients take the registers (64; gfx942: 128). Rows that are
# two numbers, and the sums of their tiles beside the totals, have smaller tiles anywhere.
_NEIGHBORS = (
    *((a, t, 64) for a in ("sm_80", "sm_86") for t in SHORT_TYPES), *(("gfx942", t, 128) for t in SHORT_TYPES)
)  # fmt: skip
SMALLER_TILES = tuple((*key, f"neighbor_gradients, {kind}") for key in _NEIGHBORS for kind in ("symmetric", "row"))

# All combinations take long: `make test-kernels` compiles them, `make test` these.
ALWAYS = [("sm_90", "bfloat16", 128), ("gfx942", "bfloat16", 64), ("sm_90", "float16", 512)]
ALL = [(arch, dtype, dim) for arch in ARCHITECTURES for dtype in FULL_TYPES for dim in FULL_WIDTHS] + [
    (arch, dtype, 64) for arch in ARCHITECTURES for dtype in ("float32" if arch == "gfx942" else "tf32x3", "float64")
]
CASES = ALL if os.environ.get("GKD_FAST_COMPILE_ALL") == "1" else ALWAYS


def complaints(spec: Specialization) -> list[str]:
    binary = disassembly.read(compile(spec))
    found = []
    if binary.stack_bytes or binary.spills():
        found.append(f"{binary.stack_bytes} bytes of stack, {binary.spills()} spill instructions")
    if binary.shared_bytes > SHARED_MEMORY[spec.arch]:
        found.append(f"{binary.shared_bytes} bytes of shared memory, limit {SHARED_MEMORY[spec.arch]}")
    matrix = MATRIX[spec.arch].get(spec.dtype, MATRIX[spec.arch][None])
    if spec.arch in ("sm_90", "sm_100") and spec.block_rows < 64 and spec.dtype != "float64":
        matrix = "HMMA"  # the wider instructions take 64 rows
    if spec.exemption is None and not binary.has(matrix):
        found.append(f"no {matrix} instruction")
    if spec.products and not binary.has(WIDE_LOADS):
        found.append("no load of 16 bytes")
    # A small batch is divided among as many programs as can be: 16 rows are the least that a matrix instruction takes.
    may_be_small = spec.small or (spec.arch, spec.dtype, spec.dim, spec.kernel) in SMALLER_TILES
    if (
        spec.products
        and not may_be_small
        and spec.dtype in SHORT_TYPES
        and spec.dim <= 128
        and min(spec.block_rows, spec.block_columns) < 64
    ):
        found.append(f"tile {spec.block_rows}×{spec.block_columns}")
    return [f"{spec.kernel}: {complaint}" for complaint in found]


@pytest.mark.parametrize(("arch", "dtype", "dim"), CASES)
def test_default_configurations(arch, dtype, dim):
    specs = specializations(arch, dtype, dim)
    ops = {"relation_kl", "node_contrast", "graph_conv", "neighbor_conv", "unit_rows"}
    # float16 rows of pair_sums are multiplied as tf32, all short types of rkd_angle in float32.
    ops |= {"pair_sums"} if dtype != "float16" else set()
    ops |= {"rkd_angle"} if dtype not in FULL_TYPES else set()
    assert {spec.op for spec in specs} == ops
    assert {spec.op for spec in specs if spec.small} == {"relation_kl", "node_contrast", "graph_conv", "neighbor_conv"}
    assert [complaint for spec in specs for complaint in complaints(spec)] == []


def test_exemptions_are_few_and_named():
    """A kernel without products, and types that an architecture's matrix units do not multiply."""
    for arch, dtype, dim in ALL:
        for spec in specializations(arch, dtype, dim):
            exempt_type = dtype == "float64" and arch == "sm_86"
            assert (spec.exemption is not None) == (spec.products == 0 or exempt_type), spec.kernel


def test_an_architecture_multiplies_float32_in_one_way():
    for arch, dtype, wanted in (("sm_90", "float32", "tf32x3"), ("gfx942", "tf32x3", "float32")):
        with pytest.raises(ValueError, match=f"dtype must be '{wanted}' on {arch}"):
            specializations(arch, dtype, 64)


def test_losses_over_pairs_come_for_many_graphs_too():
    """Each kind whose tokens make a graph per sample has the same kernels for these, the second order's among them."""
    for dtype in ("bfloat16", "tf32x3", "float64"):
        kernels = {False: set(), True: set()}
        for spec in specializations("sm_90", dtype, 64):
            if spec.op == "pair_sums" and spec.constexprs["KIND"] in OF_GRAPHS:
                constants = tuple(spec.constexprs[key] for key in ("KIND", "MOVING", "TANGENT"))
                kernels[spec.constexprs["GRAPHS"]].add((spec.fn.__name__, *constants))
        assert kernels[True] == kernels[False]
        assert any(tangent for *_, tangent in kernels[True]) == (dtype != "bfloat16")


def test_stages_share_a_launch():
    """relation_kl's groups of stages that share a launch fit as well, and kernels that serve all stages."""
    found = specializations("sm_90", "bfloat16", 128, (3, 3))
    specs = [s for s in found if s.products and (s.small or s.op in ("relation_kl", "graph_conv"))]
    assert max(spec.products for spec in specs) > 3 and sum(spec.small for spec in specs) >= 6
    assert [complaint for spec in specs for complaint in complaints(spec)] == []
