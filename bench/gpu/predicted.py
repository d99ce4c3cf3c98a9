"""The Triton kernels of the table compiled for an architecture, read, and timed by the issue-slot model."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

from bench.gpu import devices, disassembly, model
from bench.gpu.plans import COPIED_TYPES, DIRECTIONS, SMALL_BATCH, Plan, Work, cublas_seconds, plan

BATCHES = (64, 256, 1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True)
class KernelReport:
    """One kernel as compiled for one architecture. ``clocks`` are one step's, by device and unit, as calibrated;
    ``predicted`` are :class:`bench.gpu.model.Prediction` by device and batch size.
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
    clocks = {device.name: dict(model.calibrated(model.work(binary, device)[0], device)) for device in on}
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
                        parts += timed_parts(work, by_name, device)
                        found[work] = sum(seconds for seconds, _ in parts), max(parts)[1]
    return found


def timed_parts(work: Work, by_name: dict[str, KernelReport], device: devices.Device) -> list[tuple[float, str]]:
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
