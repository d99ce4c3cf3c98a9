"""The machine code of every kernel with matrix products for Hopper, read for what ptxas may have made of right PTX."""

import dataclasses
import os
import textwrap

import pytest
import torch
from triton.compiler import CompiledKernel

from gkd_fast.kernels import catalog, compile, specializations
from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.launch import PRODUCTS, walk_product_of
from gkd_fast.kernels.graph_conv import launches as graph_conv

from .launched import assembler, launches, ptxas_version
from .machine_code import faults
from .sass import disassemble

TYPES = ("bfloat16", "float16", "tf32", "tf32x3", "float64")
WIDTHS = (16, 32, 64, 128, 256)
# All of them take about an hour: `make test-machine-code` reads them, `make test` these.
ALL = os.environ.get("GKD_FAST_MACHINE_CODE_ALL") == "1"
SQUARE = [(dtype, dim) for dtype in TYPES for dim in WIDTHS] if ALL else [("bfloat16", 64)]
PAIRS = (
    [
        (t, d, k) for t in TYPES for d in WIDTHS for k in WIDTHS
        if d != k and walk_product_of(PRODUCTS[t], "sm_90", max(d, k))
    ]
    if ALL else [("bfloat16", 16, 64), ("bfloat16", 32, 128), ("tf32x3", 16, 64), ("float16", 16, 32)]
)  # fmt: skip
# In the quick run: the kernels with most products, first order.
QUICK = ("relation_gradients", "contrast_gradients of students", "graph_gradients", "graph_sums, row")
# Beyond what the kernels of small batches take.
ROWS = 300


def faults_of(kernel: CompiledKernel, folder) -> list[str]:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    listing = disassemble(path)
    if "HGMMA" not in listing and "HMMA" not in listing and "DMMA" not in listing:
        return []
    return [f"{kernel.metadata.name}, {assembler()}: {fault}" for fault in faults(listing)]


@pytest.mark.parametrize(("dtype", "dim"), SQUARE)
def test_default_configurations(dtype, dim, tmp_path):
    specs = [s for s in specializations("sm_90", dtype, dim) if s.products and (ALL or s.kernel in QUICK)]
    assert len(specs) >= len(QUICK)
    assert [fault for spec in specs for fault in faults_of(compile(spec), tmp_path)] == []


@pytest.mark.parametrize(("dtype", "dim", "width"), PAIRS)
def test_graph_conv_at_unequal_widths(dtype, dim, width, tmp_path):
    """Whatever the launchers launch."""
    precision = {"tf32x3": "float32"}.get(dtype, dtype)
    row_type = torch.float64 if dtype == "float64" else torch.float32
    nodes, messages = (torch.zeros(ROWS, k, dtype=row_type) for k in (dim, width))
    variance, degrees = torch.ones((), dtype=row_type), torch.ones(ROWS, dtype=row_type)
    found, names = [], []

    def read(kernel, grid, values):
        names.append(kernel.metadata.name)
        found.extend(faults_of(kernel, tmp_path))

    with launches(read):
        for normalization in ("symmetric", "row") if ALL else ("symmetric",):
            graph_conv.graph_conv(nodes, messages, variance, normalization, precision)
            graph_conv.graph_conv_backward(
                messages, nodes, messages, messages, degrees, variance, normalization, precision, [True, True]
            )
    assert {"graph_sums", "graph_gradients"} <= {*names}
    assert found == []


def test_names_what_ptxas_12_8_makes_of_narrow_nodes_beside_wide_values(tmp_path):
    """In tf32x3, as the kernel once multiplied float32: what a GPU got wrong by a quarter."""
    if ptxas_version() != (12, 8):
        pytest.skip(f"{assembler()} makes right code of it")
    with table.forced(64, 32, 8):
        specs = catalog._Builder("sm_90", PRODUCTS["tf32x3"], 64).graph_conv(1)
        (spec,) = (s for s in specs if s.kernel == "graph_gradients")
    spec = dataclasses.replace(spec, constexprs=spec.constexprs | {"WIDTH": 16, "VALUE_WIDTH": 64})
    found = faults_of(compile(spec), tmp_path)
    assert len([fault for fault in found if "descriptor not set on every path" in fault]) == 12


def listing(*lines: str) -> str:
    """As nvdisasm prints it; lines that end in a colon are labels."""
    printed = [
        x if x.endswith(":") else f"        /*{16 * k:04x}*/                   {x} ;" for k, x in enumerate(lines)
    ]
    return textwrap.dedent("\n".join(printed))


DESCRIPTOR = ("S2UR UR4, SR_CTAID.X", "USHF.R.U32.HI UR4, URZ, 0x4, UR4", "USGXT.U32 UR4, UR4, 0xe")
UPPER = "UMOV UR5, 0x40000040"
PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
OTHER = ("UMOV UR6, UR4", "UMOV UR7, UR5")
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
LOOP = ("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x4, PT")


def test_descriptors_set_before_the_loop_are_right():
    assert (
        faults(listing(*LOOP, *DESCRIPTOR, UPPER, *OTHER, ".L_x_0:", PRODUCT, WAIT, "@!P0 BRA `(.L_x_0)", "EXIT")) == []
    )


def test_a_descriptor_set_at_the_end_of_a_step_alone():
    lines = (*LOOP, *DESCRIPTOR, UPPER, ".L_x_0:", PRODUCT, WAIT, *OTHER, "@!P0 BRA `(.L_x_0)", "EXIT")
    found = faults(listing(*lines))
    assert [x.split(":")[0] for x in found] == ["descriptor not set on every path", "read before it is set"]
    assert "UR6 varies, UR7 varies" in found[0] and found[1].endswith("UR6, UR7")


def test_a_descriptor_with_a_left_over_upper_half():
    lines = (*LOOP, *DESCRIPTOR, UPPER, "UMOV UR6, UR4", "UMOV UR7, 0x80000020", ".L_x_0:", PRODUCT, WAIT, *OTHER,
             "@!P0 BRA `(.L_x_0)", "EXIT")  # fmt: skip
    (found,) = faults(listing(*lines))
    assert found.startswith("descriptor not set on every path") and "UR7 varies" in found


def test_descriptors_by_sums_masks_and_exchanges():
    moved = ("UIADD3.64 UR8, UR4, UR6, URZ", "UIADD3 UR4, UP0, UR8, 0x2, URZ", "UIADD3.X UR5, UR9, 0x1, URZ, UP0, !UPT",
             "ULOP3.LUT UR4, UR4, 0x4000, URZ, 0xfc, !UPT")  # fmt: skip
    swaps = ("ULOP3.LUT UR4, UR4, UR5, URZ, 0x3c, !UPT", "ULOP3.LUT UR5, UR5, UR4, URZ, 0x3c, !UPT",
             "ULOP3.LUT UR4, UR4, UR5, URZ, 0x3c, !UPT")  # fmt: skip
    constant = ("UMOV UR6, 0x10", "UMOV UR7, 0x0")
    assert faults(listing(*DESCRIPTOR, UPPER, *constant, *moved, *OTHER, *swaps, *swaps, PRODUCT, WAIT, "EXIT")) == []
    found = faults(listing(*DESCRIPTOR, UPPER, *OTHER, *swaps, PRODUCT, WAIT, "EXIT"))
    assert len(found) == 1 and "UR4 1073741888, UR5 address" in found[0]


@pytest.mark.parametrize(
    ("between", "touched"),
    [("FADD R0, R24, R24", "R24"), ("MOV R31, R0", "R31"), ("MOV R32, R0", ""), ("MOV R16, R0", "R16"),
     ("FADD R0, R16, R16", ""), ("@P0 MOV R19, R0", "R19")],
)  # fmt: skip
def test_registers_of_a_product_in_flight(between, touched):
    product = "HGMMA.64x16x16.F32.BF16 R24, R16, gdesc[UR4], RZ, !UPT, gsb0"
    lines = (*LOOP, "LDG.E.128 R16, desc[UR10][R2.64]", *DESCRIPTOR, UPPER, *OTHER, product)
    expected = ["touches a product in flight"] if touched else []
    found = [x for x in faults(listing(*lines, between, WAIT, "EXIT")) if "read before" not in x]
    assert [x.split(":")[0] for x in found] == expected and all(x.endswith(touched) for x in found)
    assert [x for x in faults(listing(*lines, WAIT, between, "EXIT")) if "read before" not in x] == []


def test_a_wait_for_all_but_the_last_group():
    second = PRODUCT.replace("R24", "R40")
    lines = (*LOOP, *DESCRIPTOR, UPPER, *OTHER, PRODUCT, second, "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert faults(listing(*lines, "MOV R24, R0", WAIT, "EXIT")) == []
    (found,) = faults(listing(*lines, "MOV R40, R0", WAIT, "EXIT"))
    assert found.startswith("touches a product in flight")


@pytest.mark.parametrize(
    ("lines", "unset"),
    [
        (("MOV R1, R2",), "R2"),
        (("@P0 MOV R2, 0x1", "MOV R3, R2"), "R2"),
        (("@P0 MOV R2, 0x1", "@P0 MOV R3, R2"), ""),
        (("@P0 MOV R2, 0x1", "@!P0 MOV R2, 0x2", "MOV R3, R2"), ""),
        (("@P0 MOV R2, 0x1", "ISETP.GE.AND P0, PT, R0, 0x5, PT", "@P0 MOV R3, R2"), "R2"),
        (("@!P0 BRA `(.L_x_0)", "MOV R2, 0x1", ".L_x_0:", "@P0 MOV R3, R2"), "R2"),
        (("@P0 MOV R2, 0x1", "@!P0 BRA `(.L_x_0)", "MOV R3, R2", ".L_x_0:"), ""),
        (("CS2R R2, SRZ", "DADD R4, R2, R2", "STG.E.64 desc[UR4][R2.64], R4"), "UR4, UR5"),
        (("LOP3.LUT R2, R2, 0xfffffffe, RZ, 0xc0, !PT", "MOV R3, R2"), ""),
        (("PRMT R2, R0, 0x7632, R2", "MOV R3, R2"), ""),
        (("PRMT R2, R0, 0x3210, R3", "MOV R4, R2"), "R3"),
        (("{ MOV R2, 0x1", "MOV R3, R2"), ""),
    ],
)
def test_registers_read_before_they_are_set(lines, unset):
    found = faults(listing(*LOOP, *lines, "EXIT"))
    assert [x.rpartition(": ")[2] for x in found] == ([unset] if unset else [])
