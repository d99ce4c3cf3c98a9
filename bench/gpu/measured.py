"""What was predicted, timed on a GPU: the ops on unit rows, in a CUDA graph, so that only the device's time counts."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from bench import cases
from bench.gpu.devices import DEVICES
from bench.report import milliseconds
from bench.timing import Clock

RUNS = 10
WARM_UP_RUNS = 3
EXCESS = 1.5  # measured times beyond this multiple of the predicted are pointed out
# Types of inputs and settings of PyTorch; of other products inputs have the type.
PRECISIONS = {"tf32": ("float32", "high"), "tf32x3": ("float32", "highest"), "float32": ("float32", "highest")}


def measure(works: list, console) -> list[dict]:
    """The works' fields with ``seconds`` and the device's full name, for the device that is here."""
    if not torch.cuda.is_available():
        console.print("nothing measured: no CUDA device here (torch.cuda.is_available() is False)")
        return []
    name = torch.cuda.get_device_name()
    known = next((device.name for device in DEVICES if device.name in name), None)
    if known is None:
        console.print(f"nothing measured: no times are predicted for {name}")
        return []
    found = []
    for work in works:
        if work.device == known:
            found.append(asdict(work) | {"name": name, "seconds": device_seconds(prepared(work))})
            console.print(f"{work}: {milliseconds(found[-1]['seconds'])} ms")
    return found


def prepared(work, device: str = "cuda") -> Callable[[], object]:
    """One run of the work."""
    from gkd_fast import ops

    dtype, precision = PRECISIONS.get(work.dtype, (work.dtype, "highest"))
    product = "float32" if work.dtype == "tf32x3" else work.dtype  # as the op names it
    normalization = work.normalization if work.op == "graph_conv" else None
    case = cases.Case(work.op, work.batch, work.dim, work.stages, normalization, dtype, device, precision=precision)
    problem = cases.problem(case)
    rows = torch.float64 if dtype == "float64" else torch.float32

    def unit(stages: list[torch.Tensor]) -> list[torch.Tensor]:
        return [x.detach().requires_grad_(x.requires_grad) for x in ops.unit_rows(stages, rows)]

    if work.op == "graph_conv":
        (nodes,), messages = unit([problem.arguments[0]]), problem.arguments[1].detach().to(rows).requires_grad_()
        variance = torch.full((), problem.options["bandwidth"] ** -2, dtype=rows, device=device)
        wanted, upstream = [nodes, messages], problem.upstream.to(rows)

        def forward() -> torch.Tensor:
            return torch.ops.gkd_fast.graph_conv(nodes, messages, variance, case.normalization, product)[0]
    else:
        students, teachers = map(unit, problem.arguments)
        for x in teachers:
            x.requires_grad_(work.teachers_wanted)
        wanted, upstream = [*students, *(x for x in teachers if x.requires_grad)], problem.upstream
        op = getattr(torch.ops.gkd_fast, work.op)
        options = problem.options | {"product_precision": product}
        if work.op == "node_contrast":
            options |= {"wanted": [True] * (work.stages**2), "keep_weighted": not work.teachers_wanted}

        def forward() -> torch.Tensor:
            return op(students, teachers, **options)[0]

    def double_backward() -> tuple[torch.Tensor, ...]:
        gradients = torch.autograd.grad(forward(), wanted, upstream, create_graph=True)
        return torch.autograd.grad(gradients, [*wanted, upstream], cotangents)

    if work.direction == "forward":
        return forward
    if work.direction == "backward":
        return lambda: torch.autograd.grad(forward(), wanted, upstream)
    upstream.requires_grad_()
    cotangents = [torch.randn_like(x) for x in wanted]
    return double_backward


def device_seconds(run: Callable[[], object]) -> float:
    """The least time of a replay over several."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    clock = Clock("cuda")
    marks = [clock.mark()]
    for _ in range(RUNS):
        graph.replay()
        marks.append(clock.mark())
    return min(clock.seconds(a, b) for a, b in zip(marks, marks[1:]))


def seconds_of(work, times: list[dict]) -> dict | None:
    """The last measurement of this work."""
    return next((t for t in reversed(times) if asdict(work).items() <= t.items()), None)


def cell(work, times: list[dict]) -> str:
    time = seconds_of(work, times)
    return f"{milliseconds(time['seconds'])} ({time['name']})" if time else ""


def exceeded(predicted: dict, times: list[dict]) -> list[str]:
    """A line for each work that took more than ``EXCESS`` times what was predicted."""
    lines = []
    for work, (seconds, limit) in predicted.items():
        time = seconds_of(work, times)
        if time and time["seconds"] > EXCESS * seconds:
            lines.append(
                f"{work.op} {work.direction} B={work.batch} D={work.dim} {work.dtype} on {time['name']}: measured "
                f"{milliseconds(time['seconds'])} ms, {time['seconds'] / seconds:.1f} × predicted (limited by {limit})"
            )
    return lines
