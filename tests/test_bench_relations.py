"""The measured losses over relations, beside torchdistill's."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "bench").exists():
    pytest.skip("the benchmarks are no part of the installed package", allow_module_level=True)

from bench import __main__ as command  # noqa: E402
from bench import relations  # noqa: E402
from bench.relations import WORK, Measured, Wrong  # noqa: E402

SMALL = "pkt"


@pytest.fixture
def small(monkeypatch):
    """One loss at a small batch."""
    work = dataclasses.replace(WORK[SMALL], batch=96, times=1e-6)
    monkeypatch.setitem(WORK, SMALL, work)
    return work


@pytest.mark.parametrize("name", [name for name, work in WORK.items() if work.peer is not None])
def test_both_compute_the_same(name):
    pytest.importorskip("torchdistill")
    work = WORK[name]
    inputs = relations.rows(48, torch.float64)
    ours, theirs = (relations.step(function, inputs, work.both) for function in (work.ours, work.peer))
    assert len(ours) == (3 if work.both else 2) and relations.error(ours, theirs) < 1e-12


def test_errors_are_the_largest_and_those_of_nothing_infinite():
    truth = [torch.tensor(2.0), torch.tensor([4.0, 3.0])]
    assert relations.error([torch.tensor(2.1), torch.tensor([4.0, 4.0])], truth) == pytest.approx(0.2)
    assert relations.error([torch.tensor(float("nan")), truth[1]], truth) == float("inf")


@pytest.mark.parametrize("spoilt", ["ours", "ours in float32"])
def test_what_is_wrong_gets_no_time(monkeypatch, small, spoilt):
    pytest.importorskip("torchdistill")

    def wrong(students, teachers):
        loss = small.ours(students, teachers)
        return loss * 1.001 if spoilt == "ours" or students.dtype == torch.float32 else loss

    monkeypatch.setitem(WORK, SMALL, dataclasses.replace(small, ours=wrong))
    monkeypatch.setattr(relations, "interleave", lambda *arguments: pytest.fail("timed"))
    with pytest.raises(Wrong, match="peer computes" if spoilt == "ours" else "in float32"):
        relations.measure(SMALL, repeats=1)


def test_command_keeps_what_was_measured_before(monkeypatch, small, tmp_path, capsys):
    pytest.importorskip("torchdistill")
    document, figures = tmp_path / "table.md", tmp_path / "figures.json"
    document.write_text("<!-- relations: begin -->\n<!-- relations: end -->\n")
    monkeypatch.setattr(relations.memory, "request", lambda message, module: 3_000_000)
    words = ["relations", "--only", SMALL, "--repeats", "1", "--json", str(figures), "--markdown", str(document)]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert command.main() == 0
    monkeypatch.setitem(WORK, "rkd_angle", dataclasses.replace(WORK["rkd_angle"], batch=24, times=1e9))
    monkeypatch.setattr(sys, "argv", ["bench", *words[:2], "rkd_angle", *words[3:]])
    assert command.main() == 0
    pkt, angle = (line for line in document.read_text().splitlines() if line.startswith(("| pkt", "| rkd_angle")))
    assert pkt.endswith("| ≥ 1e-06 ×, ≤ 64 MB: holds |") and " 3.0 " in pkt
    assert angle.endswith("does not hold |")


def test_what_was_wanted_holds_within_its_bounds():
    row = Measured(1.0, 1.0, 8.0, 8.0, 64_000_000, 0.0, 0.0, "")
    for times, size, expected in (
        (8.0, 64_000_000, "holds"),
        (7.9, 0, "does not hold"),
        (9.0, 64_000_001, "does not hold"),
    ):
        found = dataclasses.replace(row, peer=times, extra_bytes=size)
        assert relations.holds(WORK["pkt"], found) == f"≥ 8 ×, ≤ 64 MB: {expected}"
