"""The reader of compiled kernels, the issue-slot model and the command around them, none of which needs a GPU."""

import dataclasses
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench import cases, measure, report
from bench.commands import gpu_static
from bench.gpu import measured, model, plans, predicted, tables, units
from bench.gpu.devices import DEVICES, LIMITS, Calibration
from bench.gpu.disassembly import Binary, Instruction, _amd_flow, _nvidia_flow, inner_loop, parse_amd, parse_nvidia

kernels = pytest.importorskip("gkd_fast.kernels", reason="Triton is not installed")
table = pytest.importorskip("gkd_fast.kernels.common.table")
attention = pytest.importorskip("bench.gpu.attention")

A100, H100, H200, B200 = DEVICES
PUBLISHED_H100 = dataclasses.replace(H100, calibration=Calibration())
BOTH_ARCHITECTURES = pytest.mark.parametrize(
    "published", [attention.PUBLISHED[0], attention.PUBLISHED[2], attention.PUBLISHED[5]]
)

# An outer loop; in it a loop with a product, a conditional part, and a wait whose failures are dealt with at the end.
NVIDIA = """
	.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   UMOV UR5, 0x1 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   FMUL R4, R4, R5 ;
        /*0070*/                   FMUL R4, R4, R5 ;
.L_x_3:
        /*0080*/                   MUFU.EX2 R6, R4 ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
        /*00b0*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_9:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00e0*/              @!P0 BRA `(.L_x_9) ;
        /*00f0*/                   BRA `(.L_x_2) ;
"""
AMD = """
kernel:
.LBB0_0:
\ts_mov_b32 s0, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_vccnz .LBB0_3
; %bb.2:
\tv_mul_f32_e32 v1, v2, v3
.LBB0_3:
\tv_exp_f32_e32 v1, v1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\t.section .rodata
\t.p2align 6
"""


def opcodes(instructions, indices) -> list[str]:
    return [instructions[k].opcode.split(".")[0] for k in sorted(indices)]


def test_a_step_is_the_inner_loops_ordinary_path():
    instructions, labels = parse_nvidia(NVIDIA)
    assert len(instructions) == 16 and instructions[3] == Instruction("BRA", "`(.L_x_9)", "@!P0")
    step, rare = inner_loop(instructions, labels, _nvidia_flow)
    assert opcodes(instructions, step) == ["SYNCS", "BRA", "HMMA", "BRA", "MUFU", "BRA"]
    assert opcodes(instructions, rare) == ["FMUL", "FMUL", "SYNCS", "BRA", "BRA"]


def test_amd_assembly_is_read_alike():
    instructions, labels = parse_amd(AMD)
    step, rare = inner_loop(instructions, labels, _amd_flow)
    assert opcodes(instructions, step) == [
        "v_mfma_f32_32x32x8_bf16_1k",
        "s_cbranch_vccnz",
        "v_exp_f32_e32",
        "s_cbranch_scc1",
    ]
    assert opcodes(instructions, rare) == ["v_mul_f32_e32"]


def test_without_products_there_is_no_loop():
    instructions, labels = parse_nvidia(NVIDIA.replace("HMMA.16816.F32.BF16", "FADD"))
    assert inner_loop(instructions, labels, _nvidia_flow) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("device", "instruction", "unit", "clocks"),
    [
        (A100, Instruction("HMMA.16816.F32.BF16"), "matrix", 2),  # 2,048 multiply-adds of 1,024 a clock
        (A100, Instruction("HMMA.1688.F32.TF32"), "matrix", 2),
        (A100, Instruction("DMMA.884"), "matrix", 4),
        (H100, Instruction("HGMMA.64x128x16.F32.BF16", "R24, R120, gdesc[UR8], R24"), "matrix", 16),
        (H100, Instruction("HGMMA.64x128x16.F32.BF16", "R24, R120, gdesc[UR8], R24"), "copies", 8),
        (H100, Instruction("HGMMA.64x32x16.F32.BF16", "R24, gdesc[UR8], R24"), "matrix", 6),  # waits for its operands
        (H100, Instruction("HGMMA.64x128x8.F32.TF32", "R24, R120, gdesc[UR8], R24"), "matrix", 16),
        (A100, Instruction("FFMA"), "float", 0.5),
        (H100, Instruction("FFMA"), "float", 0.25),
        (B200, Instruction("FFMA2"), "float", 0.5),
        (H100, Instruction("DFMA"), "float", 0.5),
        (H100, Instruction("MUFU.EX2"), "exponential", 2),
        (H100, Instruction("IADD3.X"), "integer", 0.5),
        (H100, Instruction("F2FP.BF16.F32.PACK_AB"), "integer", 0.5),
        (H100, Instruction("LDSM.16.M88.4"), "shared", 4),
        (H100, Instruction("LDS.128"), "shared", 4),
        (H100, Instruction("SHFL.BFLY"), "shared", 1),
        (H100, Instruction("LDGSTS.E.BYPASS.128"), "copies", 4),
        (A100, Instruction("LDG.E.128"), "cache", 512 * 108 / 5120),
        (B200, Instruction("LDTM.x64"), "shared", 16),
        (H100, Instruction("UIADD3"), "other", 0.25),
        (H100, Instruction("BAR.SYNC"), "issue", 0.25),
    ],
)  # fmt: skip
def test_clocks_of_instructions(device, instruction, unit, clocks):
    assert units.costs(instruction, device)[unit] == pytest.approx(clocks)


def test_blackwell_products_take_their_shape_from_the_descriptor():
    # M = 128, N = 64, bfloat16: 128 · 64 · 16 multiply-adds of 4,096 a clock; 192 rows of 32 bytes at 128 a clock.
    listing = [
        Instruction("UMOV", "UR55, 0x8100490"),
        Instruction("UTCHMMA", "gdesc[UR6], gdesc[UR16], tmem[UR14], tmem[UR54], idesc[UR55], !UPT"),
        Instruction("UTCHMMA", "tmem[UR6], gdesc[UR16], tmem[UR14], tmem[UR54], idesc[UR55], UPT"),
    ]
    binary = Binary("sm_100", tuple(listing), frozenset({0, 1, 2}), frozenset(), 64, 0, 1024, 4)
    costs = [clocks for _, clocks in units.walk(binary, B200)]
    assert [c["copies"] for c in costs[1:]] == [48, 16]
    assert [c["matrix"] for c in costs[1:]] == [48, 32]  # the first waits for its operands


def binary(instructions: list[Instruction], warps: int = 4, registers: int = 128, shared: int = 0) -> Binary:
    return Binary(
        "sm_90", tuple(instructions), frozenset(range(len(instructions))), frozenset(), registers, 0, shared, warps
    )


def test_programs_take_turns_on_the_units():
    clocks = Counter(matrix=10, float=6, issue=4)
    assert [model.makespan(clocks, k) for k in (1, 2, 3)] == [16, 26, 36]
    issue_bound = Counter(matrix=2, float=2, issue=3)
    assert [model.makespan(issue_bound, k) for k in (1, 2)] == [4, 7]
    clocks["cache"] = 20  # beside the units, but never faster than the copies
    assert [model.makespan(clocks, k) for k in (1, 2, 3)] == [20, 40, 60]
    assert model.limiting_unit(clocks, 1) == "cache" and model.limiting_unit(issue_bound, 1) == "issue"


def test_groups_of_a_program_are_out_of_step_for_a_share_of_it():
    clocks = Counter(matrix=10, float=6, issue=4)
    assert model.makespan(clocks, 1, groups=2, apart=0) == 16
    assert model.makespan(clocks, 1, groups=2, apart=1) == 8 + 5  # two jobs of half the size
    assert model.makespan(clocks, 1, groups=2, apart=0.5) == (16 + 13) / 2
    assert model.makespan(clocks, 2, groups=2, apart=1) == 13 + 10
    assert model.makespan(Counter(matrix=2, float=2, issue=4), 1, groups=2, apart=1) == 4  # the slots are shared


def test_a_share_of_what_resident_programs_load_comes_once():
    """Of a step's loads, not of those outside."""
    steps, once = Counter(matrix=10, cache=40), Counter(cache=100)
    programs = 2 * H100.multiprocessors
    for share, clocks in ((0, 200 + 7 * 80), (0.5, 200 + 7 * 60), (1, 200 + 7 * 40)):
        device = dataclasses.replace(H100, calibration=Calibration(together=share))
        predicted = model.predict_clocks(steps, once, device, 4, 2, programs, 7, loops=True)
        assert predicted.seconds == pytest.approx(device.seconds(clocks))
        assert predicted.limit == "cache"


def test_waits_pass_where_other_programs_keep_the_busiest_unit_busy():
    clocks = Counter(matrix=10, float=6, waits=15, shallow=3)
    assert [model.makespan(clocks, k) for k in (1, 2, 3)] == [16 + 3 + 15, 16 + 3 + 15, 16 + 3 + 20]


def test_a_device_calibrates_clocks_and_waits():
    listing = [Instruction("LDGSTS.E.128"), Instruction("BAR.SYNC"), Instruction("LDL.64"), Instruction("MUFU.EX2")]
    kernel = dataclasses.replace(binary(listing), pipeline_stages=2)
    device = dataclasses.replace(H100, calibration=Calibration({"exponential": 0.5}, wait=30, shallow=100))
    inside, outside = model.work(kernel, device)
    assert inside["waits"] == 2 and inside["shallow"] == 1 and not outside
    clocks = model.calibrated(inside, device)
    assert clocks["waits"] == 60 and clocks["shallow"] == 100
    assert clocks["exponential"] == inside["exponential"] / 2 and clocks["shared"] == inside["shared"]
    deeper = model.work(dataclasses.replace(kernel, pipeline_stages=3), device)[0]
    assert not deeper["shallow"] and not model.work(dataclasses.replace(kernel, step=frozenset()), device)[0]["waits"]


def test_conflicts_are_counted_in_the_clocks_of_their_accesses():
    kernel = binary([Instruction("STS.64"), Instruction("STS"), Instruction("LDSM.16.M88.4")])
    slow = dataclasses.replace(kernel, conflicts={("STS", 8): 8.0, ("LDSM", 0): 2.0})
    assert model.work(kernel, H100)[0]["shared"] == 4 * (2 + 1 + 4)
    assert model.work(slow, H100)[0]["shared"] == 4 * (8 * 2 + 1 + 2 * 4)


def test_what_a_program_loads_several_times_comes_once_from_the_cache():
    kernel = binary([Instruction("LDG.E"), Instruction("LDG.E.64"), Instruction("LDGSTS.E.BYPASS.128")])
    shared = dataclasses.replace(kernel, fetched={("LDG", 8): 0.125})
    clocks = lambda found: model.work(found, H100)[0]["cache"] * H100.cache_bytes()  # noqa: E731
    assert clocks(kernel) == pytest.approx(4 * 32 * (4 + 8 + 16))
    assert clocks(shared) == pytest.approx(4 * 32 * (4 + 1 + 16))
    assert model.work(kernel, H100)[0]["shared"] == model.work(shared, H100)[0]["shared"]


def test_whole_waves_are_counted():
    # One step: 4 warps · 2 clocks of the exponential unit and 4 · 0.25 of the float units; four programs fit.
    kernel = binary([Instruction("MUFU.EX2"), Instruction("FMUL")])
    assert kernel.resident_programs() == 4 and kernel.occupancy() == 0.25
    one, four = 8 + 1, 8 + 1 + 3 * 8
    for programs, steps, clocks in (
        (1, 10, one),
        (132, 10, one),
        (528, 10, four),
        (529, 10, four + one),
        (1056, 1, 2 * four),
    ):
        prediction = model.predict(kernel, PUBLISHED_H100, programs, steps)
        assert prediction.seconds == pytest.approx(steps * clocks / 1.83e9)
        assert prediction.limit == "exponential" and prediction.waves == -(-programs // 528)
    assert model.predict(kernel, PUBLISHED_H100, 528, 10).busy == pytest.approx(32 / 33)


def test_without_a_loop_memory_sets_the_pace():
    copy = Binary("sm_90", (Instruction("LDG.E.128"), Instruction("STG.E.128")), frozenset(), frozenset(), 16, 0, 0, 4)
    size = 2 * 4 * 32 * 16 * 132 * 1000
    assert model.predict(copy, H100, 132 * 1000, 1).seconds == pytest.approx(size / 3.35e12)
    assert model.predict(copy, H200, 132 * 1000, 1).seconds < model.predict(copy, H100, 132 * 1000, 1).seconds


@pytest.mark.parametrize(
    ("arch", "registers", "shared_kib", "warps", "columns", "programs"),
    [
        ("sm_90", 255, 16, 8, 0, 1),
        ("sm_90", 128, 16, 4, 0, 4),
        ("sm_90", 129, 16, 4, 0, 3),  # registers are allotted in eights
        ("sm_80", 64, 82, 4, 0, 1),  # and a kibibyte is the driver's
        ("sm_80", 64, 81, 4, 0, 2),
        ("sm_90", 32, 1, 1, 0, 32),
        ("sm_100", 64, 16, 4, 256, 2),
        ("sm_90", 255, 228, 4, 0, 0),
        ("gfx942", 256, 32, 4, 0, 2),
    ],
)
def test_resident_programs(arch, registers, shared_kib, warps, columns, programs):
    assert LIMITS[arch].resident_programs(registers, shared_kib * 1024, warps, columns) == programs


def test_a_program_that_does_not_fit_is_an_error():
    with pytest.raises(model.DoesNotFit, match=r"300000 bytes on H100"):
        model.predict(binary([Instruction("FADD")], shared=300000), H100, 1, 1)


@BOTH_ARCHITECTURES
def test_the_model_is_near_published_attention_times(published):
    """The documentation tells the errors: none beyond a fifth but the H100's at 64 columns."""
    assert 0.8 < attention.check(published).predicted / published.teraflops < 1.25


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_step_holds_all_the_products(arch):
    """The matrix instructions that were read multiply what the tile sizes say, where a step is a tile and no piece of
    the width."""
    device = next(device for device in DEVICES if device.arch == arch)
    device = dataclasses.replace(device, shared_bytes=10**9)  # operands come at once
    with table.forced(64, 64, 4, 2):
        specs = kernels.specializations(arch, "bfloat16", 128)
    specs = [spec for spec in specs if spec.op in cases.OPS]  # a step of the losses over pairs is such a piece
    for spec in [attention.attention(arch, 128, 128, 128, 8, 2), *specs]:
        if spec.products and not spec.exemption and not spec.small and spec.direction != "double backward":
            kernel = predicted.compiled(spec)
            expected = spec.products * spec.block_rows * spec.block_columns * spec.dim / device.products["16-bit"]
            assert model.work(kernel, device)[0]["matrix"] == pytest.approx(expected), spec.kernel


@pytest.mark.parametrize("stages", [1, 3])
def test_the_plans_name_kernels_of_the_catalogue(stages):
    with table.forced(64, 64, 4, 2):
        specs = kernels.specializations("sm_90", "bfloat16", 128, (stages, stages))
    assert {spec.op for spec in specs} >= set(plans.PLANNED) == {*cases.OPS, "unit_rows"}
    for op in plans.PLANNED:
        names = {spec.kernel for spec in specs if spec.op == op}
        for direction in plans.DIRECTIONS:
            for batch in (64, 1024, 2**20):
                plan = plans.plan(plans.Work("H100", op, direction, "bfloat16", 128, stages, batch))
                assert set(plan.kernels) <= names
                assert plan.kernels or (op, direction) == ("unit_rows", "double backward")


@pytest.mark.parametrize(
    ("op", "megabytes"),
    [
        ("relation_kl", 32 + 2 * 262_144 * 128 * 2 / 1e6),
        ("graph_conv", 32 + 3 * 262_144 * 128 * 2 / 1e6),
        ("node_contrast", 32 + 262_144 * 128 * (4 + 2 * 2) / 1e6),
    ],  # fmt: skip
)
def test_memory_of_a_large_batch_is_bounded(op, megabytes):
    """Beyond inputs, outputs and gradients; node_contrast keeps its weighted sums [B, D], as its operator says, and
    graph_conv holds nodes, messages and upstream in the products' type, relation_kl and node_contrast their stages."""
    allocations = pytest.importorskip("bench.gpu.allocations")
    with table.forced(64, 64, 4, 2):
        assert allocations.op_peak(op, 262_144, 128, 1, "bfloat16") < megabytes * 1e6


@pytest.mark.parametrize(("op", "held", "options"), [("relation_kl", 2, {}), ("graph_conv", 3, {}),
                                                     ("node_contrast", 2, {"keep_weighted": False})])  # fmt: skip
def test_memory_of_wide_rows_does_not_grow_with_the_batch(op, held, options, monkeypatch):
    """But for a few numbers per row and ``held`` matrices of the products; beside these it is what strips may take."""
    allocations = pytest.importorskip("bench.gpu.allocations")
    strips = pytest.importorskip("gkd_fast.kernels.common.strips")
    monkeypatch.setattr(strips, "STRIP_BYTES", 32 * 2**20)
    few, many = (allocations.op_peak(op, batch, 512, 1, "bfloat16", **options) for batch in (4096, 8192))
    rows = 64 + held * 512 * 2
    assert many - few <= 4096 * rows
    assert 24 * 2**20 < many - 8192 * held * 512 * 2 < 32 * 2**20 + 8192 * 64 + 2e6


def test_memory_of_both_gradients_of_wide_rows():
    """With float32 unit rows and their gradients node_contrast takes less than 1.4 GB at 65,536 rows of 768."""
    allocations = pytest.importorskip("bench.gpu.allocations")
    options = {"keep_weighted": False, "teachers_wanted": True}
    extra = allocations.op_peak("node_contrast", 65_536, 768, 1, "bfloat16", **options)
    assert extra + 4 * 65_536 * 768 * 4 < 1.4e9


def test_allocations_are_counted_while_they_live():
    allocations = pytest.importorskip("bench.gpu.allocations")

    def run() -> list[torch.Tensor]:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(2000).add_(1)
        return [kept, kept.view(10, 100)]

    assert allocations.extra_peak(run) == 8000


def test_the_command(monkeypatch, tmp_path, capsys):
    spec = attention.attention("sm_90", 128, 128, 64, 8, 2)
    names = {
        "relation_sums": "forward", "relation_factors": "backward", "relation_gradients": "backward",
        "relation_tangent_sums, students moving": "double backward",
        "relation_double_gradients of students, students moving": "double backward",
    }  # fmt: skip
    specs = [
        dataclasses.replace(spec, op="relation_kl", kernel=name, direction=direction, dtype="bfloat16")
        for name, direction in names.items()
    ]
    monkeypatch.setattr(kernels, "specializations", lambda *arguments: specs)
    file, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    begin, end = report.marks(gpu_static.SECTION)
    page.write_text(f"{begin}\n{end}\n")
    command = ["bench", "gpu-static", "--arch", "sm_90", "--batch", "1024", "16384", "--mix", "--measure"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file), "--markdown", str(page)])
    monkeypatch.setattr(tables, "check_table", lambda: (["device"], [["H100"]]))
    monkeypatch.setattr(tables, "memory_table", lambda batch, dim: (["op"], [["relation_kl"]]))
    from bench.__main__ import main

    assert main() == 0
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and "HGMMA.64x64x16" in printed
    kernel = json.loads(file.read_text())["kernels"][0]
    assert kernel["registers"] > 100 and kernel["spills"] == 0 and kernel["stack_bytes"] == 0
    assert kernel["mix"]["MUFU.EX2"] == 34 and kernel["programs"] == {"1024": 8, "16384": 128}
    assert set(kernel["predicted"]) == {"H100", "H200"}
    assert kernel["clocks"]["H100"]["shallow"] == H100.calibration.shallow  # two stages; waits stand beside it
    assert kernel["clocks"]["H100"]["waits"] >= H100.calibration.wait
    row = next(line for line in page.read_text().splitlines() if "| H100 | 16,384 |" in line)
    assert row.count("*") == 6 and "matrix" in row
    forward, both, all_three = (float(row.split("|")[k].strip(" *")) for k in (7, 9, 12))
    assert all_three > both + 2 * forward  # two kernels, and cuBLAS's products
    assert both == pytest.approx(3 * forward, rel=0.01)  # three times the same kernel and as many copies
    together = re.search(r"Together \*(\d\.\d{3}) ms\*", page.read_text())
    assert "step(k) = " in page.read_text() and float(together[1]) == pytest.approx(both, abs=0.006)


def test_measured_times_fill_their_column_and_excess_is_told():
    work = plans.Work("H100", "relation_kl", "backward", "bfloat16", 128, 1, 1024)
    predicted = {work: (1e-3, "matrix")}
    time = {**vars(work), "name": "NVIDIA H100 80GB HBM3", "seconds": 1.4e-3}
    assert measured.cell(work, [time]) == "1.4 (NVIDIA H100 80GB HBM3)"
    assert measured.exceeded(predicted, [time]) == []
    (line,) = measured.exceeded(predicted, [time, time | {"seconds": 1.6e-3}])
    assert "measured 1.6 ms, 1.6 × predicted" in line and "NVIDIA H100" in line
    other = SimpleNamespace(**(vars(work) | {"batch": 2048}))
    assert measured.seconds_of(plans.Work(**vars(other)), [time]) is None


@pytest.mark.parametrize(("seconds", "told"), [(1e-9, False), (1.0, True)])
def test_the_ops_bench_tells_what_is_predicted(seconds, told):
    expected = pytest.importorskip("bench.gpu.expected")
    case = cases.Case("node_contrast", 64, 128, dtype="bfloat16", device="cuda")
    row = measure.Row(case, "triton", forward_backward={"least": seconds})
    (line,) = expected.remarks([row, measure.Row(case, "eager")], "NVIDIA H100 80GB HBM3")
    assert "predicted 0.0" in line and ("measured exceeds 1.5 × predicted" in line) == told
    assert expected.remarks([row], "NVIDIA L4") == ["no times are predicted for NVIDIA L4"]
    wide = measure.Row(dataclasses.replace(case, batch=1024, dim=512), "triton", forward_backward={"least": 1.0})
    assert expected.remarks([wide], "NVIDIA H100")[0].endswith("no time is predicted for it")
