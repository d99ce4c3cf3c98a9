"""``python -m bench gpu`` without a GPU: the plan of a run, its file, its tables, its list, and the cache before it."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report
from bench.cases import Case
from bench.gpu import measured
from bench.gpu.plans import Work, wide_seconds

pytest.importorskip("gkd_fast.kernels.common.table", reason="Triton is not installed")
from bench.commands import gpu  # noqa: E402
from bench.gpu import launches, session, small_cases, targets  # noqa: E402
from bench.gpu.devices import DEVICES  # noqa: E402

H200 = next(device for device in DEVICES if device.name == "H200")
PREDICTED = {
    target.work(): targets.Prediction(target.wanted / 1e3 * 1.1, "matrix", target.wanted / 1e3, 9, "; a step")
    for target in targets.TARGETS
}


def content(**others) -> dict:
    made = session.Session(session.kept(PREDICTED), "abc", fresh=False)
    return made.content | others


def taken(target: targets.Target, factor: float) -> dict:
    """A time of ``factor`` times what is predicted."""
    work = target.work()
    seconds = PREDICTED[work].seconds * factor
    return dataclasses.asdict(work) | {"name": "NVIDIA H200", "seconds": seconds}


def test_a_run_takes_six_minutes_and_its_times_come_first():
    steps = session.steps()
    assert [step.name for step in steps] == ["times", "peers", "tiles", "tests"]
    assert sum(step.seconds for step in steps) <= session.SECONDS == 360
    assert len(PREDICTED) == len(targets.TARGETS)  # none is another's work


def test_a_step_that_raises_is_told_and_the_next_one_runs(capsys):
    made = session.Session([], "abc", fresh=False)

    def broken(session):
        raise RuntimeError("no such tile\nmore")

    def slow(session):
        for item in session.each(["first", "second"]):
            session.content["times"].append(item)
            session.deadline = time.monotonic() - 1

    session.run(made, [session.Step("tiles", 9, broken), session.Step("times", 9, slow)], report.console())
    assert made.content["failed"] == ["tiles: RuntimeError: no such tile", "no time left for second"]
    assert made.content["times"] == ["first"] and set(made.content["seconds"]) == {"tiles", "times"}


def test_commands_that_fail_are_told_by_their_tests(monkeypatch):
    made = session.Session([], "abc", fresh=False)
    made.deadline = time.monotonic() + 60
    monkeypatch.setattr(session, "TESTS", ("-c", "print('FAILED tests/gpu/a.py::b'); print('1 failed'); exit(1)"))
    monkeypatch.setattr(session, "SANITIZER", "no-such-sanitizer")
    session.tests(made)
    missing, failed = made.content["failed"]
    assert "no-such-sanitizer: FileNotFoundError" in missing and failed == "FAILED tests/gpu/a.py::b"
    assert made.content["tests"] == "1 failed"


def test_commands_end_with_their_time(monkeypatch):
    made = session.Session([], "abc", fresh=False)
    monkeypatch.setattr(session, "TESTS", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(session, "SANITIZER", "true")
    start = time.monotonic()
    session.tests(made)
    assert time.monotonic() - start < 30 and made.content["failed"] == ["tests/gpu: not done within its time"]


def test_what_takes_a_fifth_longer_than_predicted_is_in_the_list():
    first, second = targets.TARGETS[:2]
    found = content(times=[taken(first, 1.19), taken(second, 1.3)])
    (line,) = session.exceeded(found)
    assert line.startswith(second.name()) and "1.30 × the predicted" in line and "9 launches" in line


def test_the_tables_of_a_file(tmp_path):
    target = targets.TARGETS[0]
    tile = {"kernel": "relation_sums", "dim": 128, "seconds": 5e-4, "tile": "64x64w4s2", "chosen": True}
    peer = {"case": "relation_kl B=9", "backend": "eager", "status": "ok", "seconds": 0.0187}
    found = content(
        times=[taken(target, 1.0)], tiles=[tile, tile | {"seconds": 4e-4, "tile": "64x32w4s2", "chosen": False}],
        peers=[peer, peer | {"backend": "triton", "status": "wrong", "seconds": None}], failed=["tests/gpu: 1"],
    )  # fmt: skip
    page = tmp_path / "gpu.md"
    begin, end = report.marks(gpu.SECTION)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter")
    gpu.write(page, found, report.console())
    text = page.read_text()
    row = next(line for line in text.splitlines() if target.name() in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["0.85", "*0.935* **missed**"] and cells[7] == "0.935 (NVIDIA H200)"
    assert sum("not yet" in line for line in text.splitlines()) == len(targets.TARGETS) - 1
    assert "| relation_kl B=9 | wrong | 18.7 | – |" in text
    assert "| relation_sums | 128 | 64x64w4s2 0.5 | 64x32w4s2 0.4 |" in text
    assert (
        "Predicted from commit abc." in text
        and "- tests/gpu: 1" in text
        and "old" not in text
        and text.startswith("before")
        and text.endswith("after")
    )
    assert f"- {target.name()}: the kernels take *0.85 ms*, the longest for matrix, and 9 launches" in text


def test_every_kernel_of_a_call_is_timed_in_every_tile_size(monkeypatch):
    from bench.gpu.allocations import kernels_left_out, op_run
    from gkd_fast.kernels.common import table

    seen = []

    def seconds(call) -> float:
        call()
        seen.append(dict(table.overrides))
        if any(tile.columns == 32 for tile in table.overrides.values()):
            raise RuntimeError("out of resources")
        return 1e-3

    monkeypatch.setattr(measured, "prepared", lambda work: op_run(work.op, 1024, work.dim, 1, work.dtype))
    monkeypatch.setattr(measured, "device_seconds", seconds)
    monkeypatch.setattr(session, "TILED", session.TILED[:1])
    made = session.Session([], "abc", fresh=False)
    made.deadline = time.monotonic() + 60
    with kernels_left_out([]):
        session.tiles(made)
    tiles = made.content["tiles"]
    assert {entry["kernel"] for entry in tiles} == {"relation_sums", "relation_gradients"}
    assert all(len(of_one) == 1 for of_one in seen) and not table.overrides
    assert sum(entry["chosen"] for entry in tiles) == 2 and len(tiles) + len(made.content["failed"]) == len(seen)
    assert len(made.content["failed"]) == 4 and "relation_sums 128x32w8s2 D=128" in made.content["failed"][2]


def command(monkeypatch, *arguments) -> int:
    from bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench", "gpu", *arguments])
    return main()


def test_without_a_gpu_it_says_so_and_stops(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch, "--json", str(tmp_path / "gpu.json")) == 1
    assert "no CUDA device here" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_without_a_filled_cache_it_says_so_and_stops(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert command(monkeypatch, "--json", str(tmp_path / "gpu.json")) == 1
    assert "--fill makes it" in capsys.readouterr().out.replace("\n", " ")


FILL = """
from bench.gpu import filling, targets
from bench.cases import Case
target = targets.Target(Case("node_contrast", 16384, 16, 1, None, "bfloat16", "cuda"), 1.0, None)
print(len(filling.fill("sm_90", (target,), tiles=False)))
"""


def test_a_filled_cache_compiles_nothing_again(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def fill() -> tuple[int, set[Path]]:
        done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]), {path for path in tmp_path.rglob("*") if path.is_file()}

    (made, before), (again, after) = fill(), fill()
    assert made == again >= 5 and after == before
    assert sum(path.suffix == ".cubin" for path in before) == made


def test_launches_are_counted():
    """Means and rows of both stages, p, q and own similarities, sums, and what is made of the kept weighted sums."""
    work = Work("H200", "node_contrast", "backward", "bfloat16", 128, 1, 16_384)
    assert launches.of(work) == 5
    assert launches.of(dataclasses.replace(work, batch=1024)) == 6  # few rows: the parts of the columns are added
    assert launches.of(dataclasses.replace(work, op="relation_kl", batch=1024)) > launches.of(
        dataclasses.replace(work, op="relation_kl")
    )


def test_launches_that_find_graph_conv_s_powers():
    """Lengths and powers of messages, and of messages with upstream; then the thirteen that make those of M."""
    work = Work("H200", "graph_conv", "backward", "bfloat16", 128, 1, 16_384)
    found = [launches.of(dataclasses.replace(work, dtype=name)) for name in ("float16", "tf32x3")]
    assert found == [launches.of(work) + 4 + 13] * 2


def test_wide_rows_are_predicted_by_their_products_and_their_strips():
    work = Work("H200", "node_contrast", "backward", "bfloat16", 768, 1, 65_536, teachers_wanted=True)
    products = 4 * 2 * 65_536**2 * 768 / (2 * 2048 * 132 * 1.83e9 * 0.64)
    assert wide_seconds(work, H200) == pytest.approx(products + 10 * 65_536**2 / 4.8e12, rel=1e-6)
    alone = dataclasses.replace(work, teachers_wanted=False)
    assert 0.4 < wide_seconds(alone, H200) / wide_seconds(work, H200) < 0.6


def test_small_cases_take_small_and_large_kernels_and_strips():
    from gkd_fast.kernels.common import small, table

    found = small_cases.small_cases("cpu")
    assert {case.op for case in found} == {"relation_kl", "node_contrast", "graph_conv"}
    assert min(case.batch for case in found) <= small.SMALL_BATCH < max(case.batch for case in found)
    assert max(case.dim for case in found) > table.largest_width("sm_90", "bfloat16")
    assert all(isinstance(case, Case) for case in found)


def test_measured_calls_ask_for_what_is_predicted():
    """Gradients of teachers where the target has them, and no kept sums then."""
    for target in targets.TARGETS:
        assert measured.prepared(dataclasses.replace(target.work(), batch=40, dim=8), "cpu")()
    target = next(target for target in targets.TARGETS if target.teachers_wanted)
    work = dataclasses.replace(target.work(), batch=40, dim=8)
    assert len(measured.prepared(work, "cpu")()) == 2
    assert len(measured.prepared(dataclasses.replace(work, teachers_wanted=False), "cpu")()) == 1
