"""What the kernels must reach on an H100 or H200, beside what is predicted and what was measured."""

from dataclasses import asdict, dataclass

from bench import report
from bench.cases import Case
from bench.gpu import devices, measured, predicted
from bench.gpu.plans import Plan, Work, plan, wide_seconds

DEVICE = "H200"


@dataclass(frozen=True)
class Target:
    """Device time of forward and backward, gradients to students (nodes and messages), in ms; ``first``: what the first
    version took on an H200, ``peer``: what another library takes, and which.
    """

    case: Case
    wanted: float
    first: float | None
    peer: str = ""
    teachers_wanted: bool = False

    def work(self, device: str = DEVICE) -> Work:
        from bench.gpu.expected import product_type

        case = self.case
        normalization = case.normalization or "symmetric"
        return Work(device, case.op, "backward", product_type(case), case.dim, case.stages, case.batch, normalization,
                    self.teachers_wanted)  # fmt: skip

    def name(self) -> str:
        parts = [self.case.op, self.case.normalization, self.case.dtype]
        if self.case.dtype == "float32":
            parts.append(f'("{self.case.precision}")')
        parts.append(f"B = {self.case.batch:,}, D = {self.case.dim}")
        return " ".join(part for part in parts if part) + (", both gradients" if self.teachers_wanted else "")


def _target(
    op: str, wanted: float, first: float | None, *, batch=16_384, dim=128, dtype="bfloat16", precision="highest",
    normalization="symmetric", **options,
) -> Target:  # fmt: skip
    normalization = normalization if op == "graph_conv" else None
    return Target(Case(op, batch, dim, 1, normalization, dtype, "cuda", precision=precision), wanted, first, **options)


TARGETS = (
    _target("relation_kl", 0.85, 1.02),
    _target("relation_kl", 0.70, 0.86, dim=64),
    _target("relation_kl", 1.9, 2.74, dim=256),
    _target("node_contrast", 0.21, 0.262),
    _target("node_contrast", 0.52, 0.98, dim=256),
    _target("graph_conv", 1.15, 1.52),
    _target("graph_conv", 3.5, 5.68, dim=256),
    _target("graph_conv", 1.21, None, normalization="row", peer="scaled_dot_product_attention 1.21"),
    _target("relation_kl", 8, 22.0, dtype="float32", peer="eager 18.7"),
    _target("node_contrast", 3.5, 10.2, dtype="float32", peer="eager 5.5"),
    _target("graph_conv", 10, 51.7, dtype="float32", peer="eager 13.4"),
    _target("relation_kl", 2.4, 3.54, dtype="float32", precision="high", peer="torch.compile, tf32 5.6"),
    _target("node_contrast", 1.2, 2.24, dtype="float32", precision="high", peer="torch.compile, tf32 2.6"),
    _target("graph_conv", 3.5, 7.99, dtype="float32", precision="high", peer="torch.compile, tf32 3.5"),
    _target("node_contrast", 55, 1437, batch=65_536, dim=768, teachers_wanted=True,
            peer="siglip-kernel 0.1.1 on a GH200, published 48.8"),
    _target("relation_kl", 4.5, 15.4, dim=512),
    _target("graph_conv", 7, 38.9, dim=512),
    _target("relation_kl", 0.020, 0.034, batch=1024),
    _target("graph_conv", 0.045, 0.082, batch=1024),
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """In seconds; ``limit``: what the longest part waits for."""

    seconds: float
    limit: str
    kernels: float  # of which the kernels and cuBLAS's products take so many
    launches: int
    clocks: str = ""  # of a step of the longest kernel, by unit


def predictions(works: list[Work]) -> dict[Work, Prediction]:
    """Of forward and backward, each kernel compiled once."""
    from bench.gpu import launches

    found: dict[Work, Prediction] = {}
    for work in works:
        device = next(d for d in devices.DEVICES if d.name == work.device)
        timed = _tile_seconds(work, device)
        seconds, limit, clocks = timed or (wide_seconds(work, device), "cuBLAS and memory", "")
        count = launches.of(work)
        found[work] = Prediction(seconds + count * devices.LAUNCH_SECONDS, limit, seconds, count, clocks)
    return found


def _tile_seconds(work: Work, device: devices.Device) -> tuple[float, str, str] | None:
    """Seconds, what the longest kernel waits for, and a step of it in words; None of rows that go in strips."""
    both = [Work(**(asdict(work) | {"direction": direction})) for direction in ("forward", "backward")]
    needed = {name for of_one in both for name in plan(of_one).kernels}
    specs = predicted.chosen(device.arch, work.dtype, work.dim, work.stages, [work.op], None)
    specs = [spec for spec in specs if spec.kernel in needed and spec.products + (spec.exemption is not None)]
    if plan(work) == Plan() or {spec.kernel for spec in specs} != needed:
        return None
    kernels = [predicted.read_kernel(spec, work.stages, [work.batch]) for spec in specs]
    by_name = {kernel.kernel: kernel for kernel in kernels}
    parts = [part for of_one in both for part in predicted.timed_parts(of_one, by_name, device)]
    longest = max(kernels, key=lambda kernel: kernel.predicted[device.name][work.batch]["seconds"])
    clocks = longest.clocks[device.name]
    step = ", ".join(f"{count:,.0f} {unit}" for unit, count in sorted(clocks.items(), key=lambda x: -x[1])[:5])
    told = f"; a step of `{longest.kernel}` ({longest.tile[0]}×{longest.tile[1]}) is {step} clocks"
    return sum(seconds for seconds, _ in parts), max(parts)[1], told


def table(predicted_times: dict[Work, Prediction], times: list[dict]) -> tuple[list[str], list[list[str]]]:
    headers = ["forward + backward", "must reach, ms", "predicted", "of which kernels", "launches", "limited by",
               "measured", "first version, measured", "others, measured"]  # fmt: skip
    rows = []
    for target in TARGETS:
        prediction, cells = predicted_times.get(target.work()), ["–"] * 4
        if prediction is not None:
            met = "" if prediction.seconds * 1e3 <= target.wanted else " **missed**"
            cells = [f"*{report.milliseconds(x)}*" for x in (prediction.seconds, prediction.kernels)]
            cells = [cells[0] + met, cells[1], str(prediction.launches), prediction.limit]
        rows.append([
            target.name(), f"{target.wanted:g}", *cells,
            measured.cell(target.work(), times) or "not yet", "–" if target.first is None else f"{target.first:g}",
            target.peer,
        ])  # fmt: skip
    return headers, rows


def reasons(found: dict[Work, Prediction]) -> list[str]:
    """Of each target that the prediction misses, what the time is made of."""
    lines = []
    for target in TARGETS:
        prediction = found.get(target.work())
        if prediction is None or prediction.seconds * 1e3 <= target.wanted:
            continue
        waits = report.milliseconds(prediction.seconds - prediction.kernels)
        lines.append(
            f"{target.name()}: the kernels take *{report.milliseconds(prediction.kernels)} ms*, the longest for "
            f"{prediction.limit}, and {prediction.launches} launches *{waits} ms*{prediction.clocks}."
        )
    return lines
