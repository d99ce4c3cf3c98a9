"""What ``bench ops`` says on a GPU beside its times: what the issue-slot model predicts for the fused kernels."""

from dataclasses import asdict

import torch

from bench import report
from bench.cases import Case
from bench.gpu import measured, predicted
from bench.gpu.devices import DEVICES, Device
from bench.gpu.plans import Work, plan
from bench.measure import Row


def remarks(rows: list[Row], name: str) -> list[str]:
    """A line for each row of backend "triton": its time beside the predicted one, and where it exceeds that."""
    device = next((device for device in DEVICES if device.name in name), None)
    if device is None:
        return [f"no times are predicted for {name}"]
    lines = []
    for row in rows:
        if row.backend != "triton" or row.forward_backward is None:
            continue
        seconds = predicted_seconds(row.case, device)
        if seconds is None:
            lines.append(f"{row.case.name()}: no time is predicted for it")
            continue
        taken = row.least()
        line = f"{row.case.name()} on {name}: {report.milliseconds(taken)} ms, predicted "
        line += f"{report.milliseconds(seconds)} ms without launches"
        if taken > measured.EXCESS * seconds:
            line += f": measured exceeds {measured.EXCESS} × predicted"
        lines.append(line)
    return lines


def predicted_seconds(case: Case, device: Device) -> float | None:
    """Forward and backward of the op and of its unit rows; None for what has no plan: wide rows, graph_conv by rows."""
    dtype = product_type(case)
    specs = predicted.chosen(device.arch, dtype, case.dim, case.stages, [case.op, "unit_rows"], None)
    works = [
        Work(device.name, op, "backward", dtype, case.dim, case.stages, case.batch) for op in (case.op, "unit_rows")
    ]
    needed = {
        name
        for work in works
        for direction in ("forward", "backward")
        for name in plan(Work(**(asdict(work) | {"direction": direction}))).kernels
    }
    specs = [spec for spec in specs if spec.kernel in needed]
    if case.normalization == "row" or {spec.kernel for spec in specs} != needed:
        return None
    kernels = [predicted.read_kernel(spec, case.stages, [case.batch]) for spec in specs]
    times = predicted.time_rows(kernels, directions=("forward", "backward"))
    return sum(times[work][0] for work in works)


def product_type(case: Case) -> str:
    """How the case's tiles are multiplied."""
    from gkd_fast._arguments import product_precision
    from gkd_fast.kernels.common.launch import product_of

    torch.set_float32_matmul_precision(case.precision)
    dtype = getattr(torch, case.dtype)
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    return product_of(product_precision(torch.empty(0, dtype=dtype)), torch.empty(0, dtype=rows)).name
