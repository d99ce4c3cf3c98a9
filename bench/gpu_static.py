"""``python -m bench gpu-static``: the Triton kernels compiled, read and timed on paper; needs no GPU.

For each kernel in its default configuration: registers, shared memory, occupancy, spills and the instructions of one
step of its loop; and from the issue-slot model (``bench/gpu/model.py``) the predicted time on A100, H100, H200 and
B200 with the unit that limits it. ``--check`` holds the model against published times of attention kernels. On a GPU,
``--measure`` times the same work and says where it takes more than 1.5 × what was predicted.
"""

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from bench import cases, machine, report
from bench.gpu import devices, disassembly, model, units
from bench.gpu import measured as measuring
from bench.gpu.plans import COPIED_TYPES, DIRECTIONS, SMALL_BATCH, Plan, Work, cublas_seconds, plan

DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")
BATCHES = (64, 256, 1024, 4096, 16384, 65536, 262144)
SECTION = "predicted"
SCHEMA = 1


@dataclass(frozen=True)
class KernelReport:
    """One kernel as compiled for one architecture. ``clocks`` are one step's, by device and unit; ``predicted`` are
    :class:`bench.gpu.model.Prediction` by device and batch size.
    """

    op: str
    kernel: str
    direction: str
    arch: str
    dtype: str
    dim: int
    stages: int
    tile: tuple[int, int]
    warps: int
    registers: int
    shared_bytes: int
    resident_programs: int
    occupancy: float
    stack_bytes: int
    spills: int
    exemption: str | None
    mix: dict[str, int]
    clocks: dict[str, dict[str, float]]
    launches: dict[int, int]
    programs: dict[int, int]
    steps: dict[int, int]
    predicted: dict[str, dict[int, dict]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="sm_86 and gfx942 get no times")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="type of the products")
    parser.add_argument("--dim", nargs="+", type=int, default=[128])
    parser.add_argument("--stages", nargs="+", type=int, default=[1], help="S = T; graph_conv has none")
    parser.add_argument("--op", nargs="+", choices=(*cases.OPS, "unit_rows"), help="only these ops")
    parser.add_argument("--tiles", metavar="RxCwWsS", help="instead of the table: rows x columns w warps s stages")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--mix", action="store_true", help="print each kernel's instructions and clocks per step too")
    parser.add_argument("--check", action="store_true", help="only the model's error on kernels with published times")
    parser.add_argument("--measure", action="store_true", help="on a GPU: time what was predicted")
    parser.add_argument("--json", type=Path, help="writes everything to this file; measured times in it are kept")
    parser.add_argument("--markdown", type=Path, help=f"writes the tables between the marks {report.marks(SECTION)}")


def run(arguments: argparse.Namespace) -> int:
    console = report.console()
    if arguments.check:
        console.print(rich_table(*check_table(), "predicted against published, TFLOP/s"))
        return 0
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
    times = load_measured(arguments.json)
    if arguments.measure:
        times += measuring.measure(list(time_rows(kernels)), console)
    console.print(rich_table(*resource_table(kernels), "resources"))
    if arguments.mix:
        console.print(rich_table(*clock_table(kernels), "multiprocessor clocks per step and program, by unit"))
        for kernel in kernels:
            console.print(
                f"{kernel.arch} {kernel.kernel}: " + ", ".join(f"{n} {name}" for name, n in kernel.mix.items())
            )
    console.print(rich_table(*time_table(kernels, times), "predicted times"))
    for line in measuring.exceeded(time_rows(kernels), times):
        console.print(line)
    if arguments.json:
        save(arguments.json, kernels, times)
    if arguments.markdown:
        report.write_section(arguments.markdown, SECTION, markdown(kernels, times, arguments.tiles))
    return 0


def chosen(arch: str, dtype: str, dim: int, stages: int, ops: list[str] | None, tiles: str | None) -> list:
    from gkd_fast.kernels import specializations
    from gkd_fast.kernels.common import table

    with table.forced(**vars(table.Tiles.parse(tiles))) if tiles else nullcontext():
        specs = specializations(arch, dtype, dim, (stages, stages))
    return [spec for spec in specs if ops is None or spec.op in ops]


def compiled(spec) -> disassembly.Binary:
    from gkd_fast.kernels import compile

    return disassembly.read(compile(spec))


def read_kernel(spec, stages: int, batches: list[int]) -> KernelReport:
    """Compiles one specialization, reads it and predicts its times."""
    binary = compiled(spec)
    batches = [batch for batch in batches if not spec.small or batch <= SMALL_BATCH]
    on = devices.of_arch(spec.arch)
    predicted = {
        device.name: {
            batch: asdict(model.predict(binary, device, spec.programs(batch), spec.trips(batch))) for batch in batches
        }
        for device in on
    }
    clocks = {device.name: dict(model.work(binary, device)[0]) for device in on}
    return KernelReport(
        spec.op, spec.kernel, spec.direction, spec.arch, spec.dtype, spec.dim, stages,
        (spec.block_rows, spec.block_columns),
        binary.warps, binary.registers, binary.shared_bytes, binary.resident_programs(), binary.occupancy(),
        binary.stack_bytes, binary.spills(), spec.exemption, dict(binary.mix().most_common()), clocks,
        {batch: launches(spec, stages) * spec.launches(batch) for batch in batches},
        {batch: spec.programs(batch) for batch in batches},
        {batch: spec.trips(batch) for batch in batches}, predicted,
    )  # fmt: skip


def launches(spec, stages: int) -> int:
    """How often a pass takes the kernel for S = T = ``stages``: relation_kl's take groups of stages, node_contrast's of
    the second order a pair.
    """
    if spec.op == "node_contrast" and spec.direction == "double backward":
        return stages**2
    if spec.op != "relation_kl" or "S" not in spec.constexprs:
        return 1
    return -(-stages // spec.constexprs["S"]) * -(-stages // spec.constexprs["T"])


def resource_table(kernels: list[KernelReport]) -> tuple[list[str], list[list[str]]]:
    headers = ["arch", "type", "D", "S=T", "op", "kernel", "tile", "warps", "registers", "shared KiB",
               "programs", "occupancy",
               "stack", "spills", "exempt"]  # fmt: skip
    rows = [
        [
            k.arch, k.dtype, str(k.dim), str(k.stages), k.op, k.kernel, f"{k.tile[0]}×{k.tile[1]}", str(k.warps),
            str(k.registers), f"{k.shared_bytes / 1024:.0f}", str(k.resident_programs), report.percent(k.occupancy),
            str(k.stack_bytes), str(k.spills), k.exemption or "",
        ]
        for k in kernels
    ]  # fmt: skip
    return headers, rows


def clock_table(kernels: list[KernelReport]) -> tuple[list[str], list[list[str]]]:
    names = [*units.TURNS, *units.BESIDE, "issue"]
    rows = [
        [device, k.op, k.kernel, f"{k.tile[0]}×{k.tile[1]}", *(f"{clocks.get(name, 0):,.0f}" for name in names)]
        for k in kernels
        for device, clocks in k.clocks.items()
    ]
    return ["device", "op", "kernel", "tile", *names], rows


def time_rows(kernels: list[KernelReport], directions: tuple[str, ...] = DIRECTIONS) -> dict[Work, tuple[float, str]]:
    """(predicted seconds, limiting unit of the longest kernel) of each op's directions.

    relation_kl with more stages than share a launch counts every launch as a whole group.
    """
    found: dict[Work, tuple[float, str]] = {}
    by_setting: dict[tuple, dict[str, KernelReport]] = {}
    for kernel in kernels:
        by_setting.setdefault((kernel.op, kernel.arch, kernel.dtype, kernel.dim, kernel.stages), {})[kernel.kernel] = (
            kernel
        )
    for (op, arch, dtype, dim, stages), by_name in by_setting.items():
        for device in devices.of_arch(arch):
            for batch in sorted({batch for kernel in by_name.values() for batch in kernel.programs}):
                parts = []
                for direction in directions:
                    work = Work(device.name, op, direction, dtype, dim, stages, batch)
                    if plan(work) != Plan():
                        parts += _parts(work, by_name, device)
                        found[work] = sum(seconds for seconds, _ in parts), max(parts)[1]
    return found


def _parts(work: Work, by_name: dict[str, KernelReport], device: devices.Device) -> list[tuple[float, str]]:
    """(seconds, limiting unit) of each kernel of one direction, and of cuBLAS's products and the copies if any."""
    steps = plan(work)
    chosen = [by_name[name] for name in steps.kernels]
    parts = []
    for kernel in chosen:
        prediction = kernel.predicted[device.name][work.batch]
        parts.append((prediction["seconds"] * kernel.launches[work.batch], prediction["limit"]))
    if steps.products:
        parts.append(cublas_seconds(work, device, steps.products))
    if work.dtype in COPIED_TYPES and steps.copies:
        moved = steps.copies * work.batch * work.dim * (4 + COPIED_TYPES[work.dtype])
        parts.append((moved / device.memory_bandwidth, "memory"))
    return parts


def time_table(kernels: list[KernelReport], times: list[dict]) -> tuple[list[str], list[list[str]]]:
    headers = ["op", "type", "D", "S=T", "device", "B", "forward, predicted ms", "measured ms",
               "forward + backward, predicted ms", "measured ms", "limited by",
               "forward + backward + double backward, predicted ms", "measured ms", "limited by"]  # fmt: skip
    predicted = time_rows(kernels)
    rows = []
    for work in predicted:
        if work.direction != "backward":
            continue
        row = [work.op, work.dtype, str(work.dim), str(work.stages), work.device, f"{work.batch:,}"]
        for direction in DIRECTIONS:
            same = Work(**(asdict(work) | {"direction": direction}))
            row.append(f"*{report.milliseconds(predicted[same][0])}*" if same in predicted else "–")
            row.append(measuring.cell(same, times))
            if direction != "forward":
                row.append(predicted[same][1] if same in predicted else "–")
        rows.append(row)
    return headers, rows


def check_table() -> tuple[list[str], list[list[str]]]:
    from bench.gpu import attention

    rows = []
    for published in attention.PUBLISHED:
        found = attention.check(published)
        tile = f"{found.tile[0]}×{found.tile[1]}, {found.tile[2]} warps"
        ratio = found.published.teraflops / found.predicted  # of times
        rows.append([
            published.device, str(published.head), f"{published.length:,}", f"{published.teraflops:.0f}",
            f"{found.predicted:.0f}", tile, f"{ratio:.2f}", published.source,
        ])  # fmt: skip
    return ["device", "D", "length", "published", "predicted", "tile", "predicted time / published", "source"], rows


def arithmetic(kernels: list[KernelReport], work: Work) -> list[str]:
    """How the model comes to the time of a forward and backward pass, a paragraph for each kernel."""
    wanted = work.op, work.dtype, work.dim, work.stages
    by_name = {k.kernel: k for k in kernels if (k.op, k.dtype, k.dim, k.stages) == wanted
               and work.device in k.predicted}  # fmt: skip
    if not by_name or work.batch not in next(iter(by_name.values())).programs:
        return []
    device = next(device for device in devices.DEVICES if device.name == work.device)
    lines, total = [], 0.0
    for direction in ("forward", "backward"):
        of_direction = Work(**(asdict(work) | {"direction": direction}))
        parts = _parts(of_direction, by_name, device)
        total += sum(seconds for seconds, _ in parts)
        for name, (seconds, _) in zip(plan(of_direction).kernels, parts):
            lines.append(f"- {direction}, `{name}`: " + _kernel_arithmetic(by_name[name], work, device, seconds))
        if len(parts) > len(plan(of_direction).kernels):
            copies = plan(of_direction).copies
            lines.append(
                f"- {direction}, the columns of {copies} matrices copied in {work.dtype}: {copies} · {work.batch:,} · "
                f"{work.dim} · {4 + COPIED_TYPES[work.dtype]} bytes at {device.memory_bandwidth / 1e12:.2f} TB/s = "
                f"{parts[-1][0] * 1e3:.4f} ms."
            )
    lines.append(f"- Together *{total * 1e3:.3f} ms*.")
    return lines


def _kernel_arithmetic(kernel: KernelReport, work: Work, device: devices.Device, seconds: float) -> str:
    programs, steps = kernel.programs[work.batch], kernel.steps[work.batch]
    prediction, clocks = kernel.predicted[work.device][work.batch], kernel.clocks[work.device]
    at_a_time = f"{device.multiprocessors} · {prediction['resident']} at a time"
    grid = f"{programs:,} programs, {at_a_time} ({prediction['waves']} in turn)"
    if not kernel.tile[1]:
        return f"{grid}; {seconds * 1e3:.4f} ms."
    in_turn = " + ".join(f"{clocks[unit]:,.0f} {unit}" for unit in units.TURNS if clocks.get(unit))
    total = sum(clocks.get(unit, 0) for unit in units.TURNS)
    busiest = max((*units.TURNS, "issue"), key=lambda unit: clocks.get(unit, 0))
    beside = ", ".join(f"{clocks[unit]:,.0f} {unit}" for unit in units.BESIDE if clocks.get(unit))
    return (
        f"{kernel.tile[0]} rows × {kernel.tile[1]} columns, {grid}, {steps:,} steps each. "
        f"A step: {in_turn} = {total:,.0f} clocks, of "
        f"which the busiest unit ({busiest}) takes {clocks[busiest]:,.0f}, so step(k) = {total:,.0f} + (k − 1) · "
        f"{clocks[busiest]:,.0f}; beside it {beside}. At {device.gigahertz} GHz, with what stands outside the loop, "
        f"*{seconds * 1e3:.3f} ms*."
    )


def triton_version() -> str:
    import triton

    return triton.__version__


def memory_table(batch: int, dim: int) -> tuple[list[str], list[list[str]]]:
    """At ``batch`` in the types whose columns are copied; float32, whose rows of this width go in strips, at a quarter:
    its strips are counted one by one, and are many.
    """
    from bench.gpu import allocations

    variants: dict[str, list[tuple[str, dict]]] = {
        "relation_kl": [("", {})],
        "node_contrast": [(", weighted sums kept", {}), (", recomputed", {"keep_weighted": False})],
        "graph_conv": [(f", {name}", {"normalization": name}) for name in ("symmetric", "row")],
    }
    rows = []
    for op, options in variants.items():
        for name, option in options:
            for dtype, rows_of in (("bfloat16", batch), ("float16", batch), ("float32", batch // 4)):
                extra = allocations.op_peak(op, rows_of, dim, 1, dtype, **option)
                unit = allocations.unit_row_bytes(op, rows_of, dim, 1)
                sizes = f"{rows_of:,}", str(dim), report.megabytes(extra), report.megabytes(unit)
                rows.append([op + name, dtype, *sizes])
    return ["op", "type", "B", "D", "op alone, MB", "float32 unit rows, MB"], rows


def markdown(kernels: list[KernelReport], times: list[dict], tiles: str | None) -> str:
    sizes = f"all with the tile sizes {tiles}" if tiles else "with the tile sizes of the table"
    parts = [f"Commit {machine.commit()}, Triton {triton_version()}, {sizes}."]
    parts += ["### Predicted and measured times", report.markdown_table(*time_table(kernels, times))]
    if lines := arithmetic(kernels, SPELLED_OUT):
        parts += ["### relation_kl on an H100, B = 16,384, D = 128, bfloat16, spelled out", "\n".join(lines)]
        parts += ["### Memory", report.markdown_table(*memory_table(max(BATCHES), SPELLED_OUT.dim))]
    parts += ["### Clocks per step", report.markdown_table(*clock_table(kernels))]
    parts += ["### Resources", report.markdown_table(*resource_table(kernels))]
    parts += ["### The model against published times", report.markdown_table(*check_table())]
    return "\n\n".join(parts)


def rich_table(headers: list[str], rows: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header)
    for row in rows:
        table.add_row(*row)
    return table


def save(path: Path, kernels: list[KernelReport], times: list[dict]) -> None:
    content = {"schema": SCHEMA, "commit": machine.commit(), "kernels": [asdict(k) for k in kernels], "measured": times}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


SPELLED_OUT = Work("H100", "relation_kl", "backward", "bfloat16", 128, 1, 16384)


def load_measured(path: Path | None) -> list[dict]:
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {content.get('schema')!r}")
    return content["measured"]
