"""A GPU's few minutes: what is run on it, in which order and for how long, and what the file of results holds.

``filled`` makes beforehand, without a GPU, all that would be compiled.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import cases, machine, measure, report
from bench.gpu import measured
from bench.gpu.plans import Work
from bench.gpu.targets import TARGETS, Prediction

SCHEMA = 1
SECONDS = 360
EXCESS = 1.2  # what takes more than this multiple of the predicted time is in the list
REPEATS = 3
PEERS = ("triton", "eager", "attention")
PEER_CASES = tuple(
    cases.Case(op, 16_384, 128, 1, normalization, dtype, "cuda")
    for dtype in ("bfloat16", "float32")
    for op, normalization in (("relation_kl", None), ("node_contrast", None), ("graph_conv", "symmetric"),
                              ("graph_conv", "row"))
)  # fmt: skip
# Beside the table's own: those that were the fastest of some kernel when all were timed.
TILES = ("64x64w4s2", "64x64w4s3", "64x128w4s3", "128x64w8s2", "128x32w8s2", "64x32w4s2", "64x64w4s1")
TILED = tuple(
    Work(device, op, "backward", "bfloat16", dim, 1, 16_384)
    for device in ("H200",) for dim in (128, 256) for op in cases.OPS
)  # fmt: skip
SANITIZER = "compute-sanitizer"
TESTS = ("-m", "pytest", "-q", "-n", "4", "tests/gpu")
SMALL_CASES = ("-m", "bench.gpu.small_cases")


@dataclass(frozen=True)
class Step:
    """Part of a run, which ends after so many seconds if it has not by itself."""

    name: str
    seconds: float
    run: Callable[["Session"], None]


class Session:
    """What a run has found so far; ``content`` is what its file holds."""

    def __init__(self, predicted: list[dict], predicted_at: str, fresh: bool = True):
        self.deadline = 0.0
        self.content: dict = {
            "machine": machine.describe("cuda") if fresh else {}, "predicted": predicted,
            "predicted_at": predicted_at, "seconds": {}, "times": [],
            "peers": [], "tiles": [], "tests": "", "failed": [],
        }  # fmt: skip

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def each(self, items: Iterable) -> Iterable:
        """The items for which there is time; the others are failures."""
        for item in items:
            if self.left() > 0:
                yield item
            else:
                self.content["failed"].append(f"no time left for {item}")

    @contextmanager
    def noted(self, what: str):
        """What is raised is a failure of ``what``, and the run goes on."""
        try:
            yield
        except Exception as error:  # whatever it is, it belongs in the list
            message = str(error).strip().splitlines() or [""]
            self.content["failed"].append(f"{what}: {type(error).__name__}: {message[0]}")


def steps() -> list[Step]:
    """Times first, while nothing else runs on the GPU; the tests and the sanitizer then share it."""
    return [Step("times", 50, times), Step("peers", 60, peers), Step("tiles", 40, tiles), Step("tests", 200, tests)]


def run(session: Session, chosen: list[Step], console) -> None:
    for step in chosen:
        start = time.monotonic()
        session.deadline = start + step.seconds
        with session.noted(step.name):
            step.run(session)
        session.content["seconds"][step.name] = round(time.monotonic() - start, 1)
        console.print(f"{step.name}: {session.content['seconds'][step.name]} s")


def times(session: Session) -> None:
    name = torch.cuda.get_device_name()
    for target in session.each(TARGETS):
        with session.noted(target.name()):
            torch.set_float32_matmul_precision(target.case.precision)
            work = target.work()
            seconds = measured.device_seconds(measured.prepared(work))
            session.content["times"].append(asdict(work) | {"name": name, "seconds": seconds})


def peers(session: Session) -> None:
    """Public functions as called, host time included."""
    for case in session.each(PEER_CASES):
        with session.noted(case.name()):
            for row in measure.time_case(case, list(PEERS), REPEATS):
                if row.backend == "triton" and row.status != "ok":
                    session.content["failed"].append(f"{case.name()}: {row.status}: {row.reason}")
                taken = {"case": case.name(), "backend": row.backend, "status": row.status, "seconds": row.least()}
                session.content["peers"].append(taken)
    torch.set_float32_matmul_precision("highest")


def tiles(session: Session) -> None:
    """Each kernel of a call in every tile size, the others in the table's."""
    from gkd_fast.kernels.common import table

    for work in session.each(TILED):
        with session.noted(f"tiles of {work.op} D={work.dim}"):
            call = measured.prepared(work)
            for key, tile in tile_sizes(call):
                table.overrides[key] = tile
                with session.noted(f"{key[0]} {tile} D={work.dim}"):
                    try:
                        seconds = measured.device_seconds(call)
                    finally:
                        del table.overrides[key]
                    session.content["tiles"].append(
                        {"kernel": key[0], "dim": work.dim, "tile": str(tile), "seconds": seconds,
                         "chosen": tile == table.tiles(*key)}
                    )  # fmt: skip
                if session.left() <= 0:
                    break


def tile_sizes(call: Callable[[], object]) -> list[tuple]:
    """The keys of the table that a call asks for, with the table's tile sizes and ``TILES``."""
    from gkd_fast.kernels.common import table

    with table.recorded() as keys:
        call()
    wanted = [table.Tiles.parse(text) for text in TILES]
    return [(key, tile) for key in sorted(keys) for tile in dict.fromkeys([table.tiles(*key), *wanted])]


def tests(session: Session) -> None:
    """tests/gpu, and beside them the small cases under the sanitizer."""
    commands = {"tests/gpu": [sys.executable, *TESTS]}
    commands[SANITIZER] = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, *SMALL_CASES]
    started = {}
    for name, command in commands.items():
        with session.noted(name):
            started[name] = subprocess.Popen(
                command, cwd=machine.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    for name, process in started.items():
        try:
            output, _ = process.communicate(timeout=max(session.left(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            session.content["failed"].append(f"{name}: not done within its time")
        lines = output.strip().splitlines() or [""]
        found = failures_of(name, process.returncode, lines)
        session.content["failed"] += found
        if name == "tests/gpu":
            session.content["tests"] = lines[-1].strip("= ")


def failures_of(name: str, code: int, lines: list[str]) -> list[str]:
    """Each failed test by its line, or the last line of what failed otherwise."""
    told = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if not told and code > 0:
        told = [f"{name}: exit status {code}: {lines[-1]}"]
    return told


def exceeded(content: dict) -> list[str]:
    """What took more than ``EXCESS`` times what is predicted."""
    found = predictions(content)
    lines = []
    for target in TARGETS:
        work = next((w for w in found if same_work(w, target)), None)
        taken = work and measured.seconds_of(work, content["times"])
        if taken and taken["seconds"] > EXCESS * found[work].seconds:
            ratio = taken["seconds"] / found[work].seconds
            lines.append(
                f"{target.name()}: {report.milliseconds(taken['seconds'])} ms, {ratio:.2f} × the predicted "
                f"{report.milliseconds(found[work].seconds)} ({found[work].limit}, {found[work].launches} launches)"
            )
    return lines


def same_work(work: Work, target) -> bool:
    return work == target.work(work.device)


def predictions(content: dict) -> dict[Work, Prediction]:
    return {Work(**entry["work"]): Prediction(**entry["prediction"]) for entry in content["predicted"]}


def kept(found: dict[Work, Prediction]) -> list[dict]:
    """As the file holds them."""
    return [{"work": asdict(work), "prediction": asdict(prediction)} for work, prediction in found.items()]


def peer_table(content: dict) -> tuple[list[str], list[list[str]]]:
    rows: dict[str, dict[str, str]] = {}
    for entry in content["peers"]:
        text = report.milliseconds(entry["seconds"]) if entry["status"] == "ok" else entry["status"]
        rows.setdefault(entry["case"], {})[entry["backend"]] = text
    return ["as called, ms", *PEERS], [[case, *(of.get(name, "–") for name in PEERS)] for case, of in rows.items()]


def tile_table(content: dict) -> tuple[list[str], list[list[str]]]:
    """By kernel: the table's tile and the fastest, times of the whole call."""
    groups: dict[tuple, list[dict]] = {}
    for entry in content["tiles"]:
        groups.setdefault((entry["kernel"], entry["dim"]), []).append(entry)
    rows = []
    for (kernel, dim), entries in groups.items():
        best = min(entries, key=lambda entry: entry["seconds"])
        own = next((entry for entry in entries if entry["chosen"]), None)
        cells = [f"{e['tile']} {report.milliseconds(e['seconds'])}" if e else "–" for e in (own, best)]
        rows.append([kernel, str(dim), *cells])
    return ["kernel", "D", "the table's, ms", "fastest, ms"], rows


def cache_folder() -> Path:
    import os

    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
