"""``python -m bench gpu-static``: the Triton kernels compiled, read and timed on paper; needs no GPU.

For each kernel in its default configuration: registers, shared memory, occupancy, spills and the instructions of one
step of its loop; and from the issue-slot model (``bench/gpu/model.py``) the predicted time on A100, H100, H200 and
B200 with the unit that limits it. ``--check`` holds the model against published times of attention kernels,
``--calibration`` against tiles that were timed. On a GPU, ``--measure`` times the same work and says where it takes
more than 1.5 × what was predicted.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from bench import cases, files, machine, report
from bench.gpu import calibration, measured, tables
from bench.gpu.predicted import BATCHES, KernelReport, chosen, read_kernel, time_rows

DTYPES = ("bfloat16", "float16", "tf32", "tf32x3", "float32", "float64")
SECTION = "predicted"
SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="sm_86 and gfx942 get no times")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of products; float32: AMD's")
    parser.add_argument("--dim", nargs="+", type=int, default=[128])
    parser.add_argument("--stages", nargs="+", type=int, default=[1], help="S = T; graph_conv has none")
    parser.add_argument("--op", nargs="+", choices=(*cases.OPS, "unit_rows"), help="only these ops")
    parser.add_argument("--tiles", metavar="RxCwWsS", help="instead of the table: rows x columns w warps s stages")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--mix", action="store_true", help="print each kernel's instructions and clocks per step too")
    parser.add_argument("--check", action="store_true", help="only the model's error on kernels with published times")
    parser.add_argument("--calibration", action="store_true", help="only the model beside the tiles that were timed")
    parser.add_argument("--measure", action="store_true", help="on a GPU: time what was predicted")
    parser.add_argument("--json", type=Path, help="writes everything to this file; measured times in it are kept")
    parser.add_argument("--markdown", type=Path, help=f"writes the tables between the marks {report.marks(SECTION)}")


def run(arguments: argparse.Namespace) -> int:
    console = report.console()
    if arguments.check:
        console.print(report.rich_table(*tables.check_table(), "predicted against published, TFLOP/s"))
        return 0
    if arguments.calibration:
        console.print(report.rich_table(*calibration.table(), f"measured within {calibration.NEAR} × of predicted"))
        return 0
    times = load_measured(arguments.json)
    kernels = [
        read_kernel(spec, stages, arguments.batch)
        for arch in arguments.arch
        for dtype in arguments.dtype
        for dim in arguments.dim
        for stages in arguments.stages
        for spec in chosen(arch, dtype, dim, stages, arguments.op, arguments.tiles)
    ]
    if not kernels:
        console.print("no kernel was chosen")
        return 1
    if arguments.measure:
        times += measured.measure(list(time_rows(kernels)), console)
    console.print(report.rich_table(*tables.resource_table(kernels), "resources"))
    if arguments.mix:
        console.print(
            report.rich_table(*tables.clock_table(kernels), "multiprocessor clocks per step and program, by unit")
        )
        for kernel in kernels:
            console.print(
                f"{kernel.arch} {kernel.kernel}: " + ", ".join(f"{n} {name}" for name, n in kernel.mix.items())
            )
    console.print(report.rich_table(*tables.time_table(kernels, times), "predicted times"))
    for line in measured.exceeded(time_rows(kernels), times):
        console.print(line)
    if arguments.json:
        save(arguments.json, kernels, times)
    if arguments.markdown:
        report.write_section(arguments.markdown, SECTION, tables.markdown(kernels, times, arguments.tiles))
    return 0


def save(path: Path, kernels: list[KernelReport], times: list[dict]) -> None:
    content = {"commit": machine.commit(), "kernels": [asdict(k) for k in kernels], "measured": times}
    files.write(path, SCHEMA, content)


def load_measured(path: Path | None) -> list[dict]:
    return files.read(path, SCHEMA)["measured"] if path is not None and path.exists() else []
