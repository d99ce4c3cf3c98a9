"""Tables and paragraphs about the compiled kernels: resources, clocks, predicted and measured times, memory."""

from dataclasses import asdict

from bench import machine, report
from bench.gpu import devices, measured, units
from bench.gpu.plans import COPIED_TYPES, DIRECTIONS, Work, plan
from bench.gpu.predicted import BATCHES, KernelReport, time_rows, timed_parts

SPELLED_OUT = Work("H100", "relation_kl", "backward", "bfloat16", 128, 1, 16384)


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
    names = [*units.TURNS, *units.BESIDE, "issue", "waits", "shallow"]
    rows = [
        [device, k.op, k.kernel, f"{k.tile[0]}×{k.tile[1]}", *(f"{clocks.get(name, 0):,.0f}" for name in names)]
        for k in kernels
        for device, clocks in k.clocks.items()
    ]
    return ["device", "op", "kernel", "tile", *names], rows


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
            row.append(measured.cell(same, times))
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
        parts = timed_parts(of_direction, by_name, device)
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
    waits = f"{clocks.get('waits', 0):,.0f} of waits"
    alone = [unit for unit in (*units.TURNS, "shallow") if clocks.get(unit)]
    in_turn = " + ".join(f"{clocks[unit]:,.0f} {unit}" for unit in alone)
    total = sum(clocks[unit] for unit in alone)
    busiest = max((*units.TURNS, "issue"), key=lambda unit: clocks.get(unit, 0))
    beside = ", ".join(f"{clocks[unit]:,.0f} {unit}" for unit in units.BESIDE if clocks.get(unit))
    return (
        f"{kernel.tile[0]} rows × {kernel.tile[1]} columns, {grid}, {steps:,} steps each. "
        f"A step: {in_turn} = {total:,.0f} clocks, of "
        f"which the busiest unit ({busiest}) takes {clocks[busiest]:,.0f}, so step(k) = {total:,.0f} + max((k − 1) · "
        f"{clocks[busiest]:,.0f}, {waits}); beside it {beside}. At {device.gigahertz} GHz, with what stands outside "
        f"the loop, *{seconds * 1e3:.3f} ms*."
    )


def triton_version() -> str:
    import triton

    return triton.__version__


def memory_table(batch: int, dim: int) -> tuple[list[str], list[list[str]]]:
    """Of each op in each type."""
    from bench.gpu import allocations

    variants: dict[str, list[tuple[str, dict]]] = {
        "relation_kl": [("", {})],
        "node_contrast": [(", weighted sums kept", {}), (", recomputed", {"keep_weighted": False})],
        "graph_conv": [(f", {name}", {"normalization": name}) for name in ("symmetric", "row")],
    }
    rows = []
    for op, options in variants.items():
        for name, option in options:
            for dtype in ("bfloat16", "float16", "float32"):
                extra = allocations.op_peak(op, batch, dim, 1, dtype, **option)
                unit = allocations.unit_row_bytes(op, batch, dim, 1)
                sizes = f"{batch:,}", str(dim), report.megabytes(extra), report.megabytes(unit)
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
