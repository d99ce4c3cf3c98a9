import dataclasses
import json
import re
import sys

import pytest
import torch

import gkd_fast
from bench import __main__ as command
from bench import floor, machine, measure, memory, peers, report, results, standard, timing
from bench import truth as oracle
from bench.cases import STEP, Case, problem
from bench.commands import forms, targets

CASES = [
    Case("relation_kl", 37, 16, stages=2, dtype="float64"),
    Case("node_contrast", 37, 16, stages=2, dtype="float64"),
    Case("graph_conv", 37, 16, normalization="symmetric", dtype="float64"),
    Case("graph_conv", 37, 16, normalization="row", dtype="float64"),
    Case("graph_conv", 37, 16, normalization="symmetric", dtype="float64", self_weight=0.3),
    Case("graph_conv", 37, 16, normalization="row", dtype="float64", self_weight=0.3),
]
IDS = [case.name() for case in CASES]


@pytest.fixture(autouse=True)
def several_strips(monkeypatch):
    monkeypatch.setattr(oracle, "STRIP_ELEMENTS", 37 * 10)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return command.main()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_truth_is_the_reference(case, order):
    case = dataclasses.replace(case, order=order)
    inputs = problem(case)
    found = oracle.errors(inputs.results(peers.build("reference", case)), oracle.truth(case, inputs))
    assert max(found.values()) < (1e-12 if order == 1 else 1e-7), found


@pytest.mark.parametrize("backend", ["eager", "published", "attention", "keops", "geometric"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_peers_agree_with_the_reference(case, backend):
    try:
        function = peers.build(backend, case)
    except peers.Unavailable as reason:
        pytest.skip(f"{backend}: {reason}")
    inputs = problem(case)
    expected = inputs.results(peers.build("reference", case))
    found = oracle.errors(inputs.results(function), expected)
    assert found.keys() == expected.keys()
    assert max(found.values()) < 1e-12, found


def test_every_op_has_its_peers():
    for case in CASES[:4]:
        for backend in ("eager", "published"):
            assert callable(peers.build(backend, case))
    assert callable(peers.build("attention", CASES[3]))
    with pytest.raises(peers.Unavailable, match="rows alone"):
        peers.build("attention", CASES[2])
    with pytest.raises(peers.Unavailable, match="has no relation_kl"):
        peers.build("attention", CASES[0])
    with pytest.raises(peers.Unavailable, match="has no graph over the others"):
        peers.build("eager", CASES[4])


def spoiled(monkeypatch, spoil):
    """Makes the published peer the reference with ``spoil`` applied to its losses."""

    def build(backend, case):
        function = library(case)
        return function if backend == "eager" else lambda *a, **o: spoil(function(*a, **o))

    def library(case, right=peers.build):
        return right("reference", case)

    monkeypatch.setattr(peers, "build", build)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda loss: loss + 1e-3, r"output is off"),
        (lambda loss: loss.detach() * -1e-3 + loss * 1.001, r"d students\[[01]\] is off by 1\.0e-03"),
        (lambda loss: loss * torch.nan, r"off by inf"),
    ],
    ids=["output", "gradient", "nan"],
)
def test_a_wrong_result_gets_no_time(monkeypatch, spoil, reason):
    spoiled(monkeypatch, spoil)
    wrong, eager, _ = measure.time_case(dataclasses.replace(CASES[0], dtype="float32"), ["published"], repeats=1)
    assert wrong.status == "wrong" and re.search(reason, wrong.reason), wrong.reason
    assert wrong.forward_backward is None and wrong.speedup is None
    assert eager.status == "ok" and eager.forward_backward["least"] > 0


def test_a_refusal_is_shown(monkeypatch):
    def refuse(loss):
        raise NotImplementedError("no such thing\nand more")

    spoiled(monkeypatch, refuse)
    refused, _, _ = measure.time_case(CASES[0], ["published"], repeats=1)
    assert (refused.status, refused.reason) == ("refused", "NotImplementedError: no such thing")


def test_second_order_times_the_double_backward_alone():
    case = dataclasses.replace(CASES[3], order=2)
    attention, eager = measure.time_case(case, ["attention"], repeats=2)
    assert attention.status == "refused" and "not implemented" in attention.reason
    assert eager.double_backward["least"] > 0 and len(eager.double_backward["samples"]) == 2
    assert eager.forward is None and eager.forward_backward is None


# (forward, backward) in units of 2·B²·D, as the derivation counts them.
UNITS = [
    (Case("relation_kl", 64), 1, 2),
    (Case("relation_kl", 64, stages=3), 3, 6),
    (Case("node_contrast", 64), 2, 0),
    (Case("node_contrast", 64, stages=3), 18, 0),
    (Case("graph_conv", 64, normalization="row"), 1.5, 3.5),
    (Case("graph_conv", 64, normalization="symmetric"), 2, 4),
]


@pytest.mark.parametrize(("case", "forward", "backward"), UNITS)
def test_floor_counts_the_units_of_the_derivation(case, forward, backward):
    assert [part.units() for part in floor.products(case)] == [forward, backward]


def test_floor_adds_the_faster_product_of_each_kind():
    least = {
        "floor similarity whole": 5.0,
        "floor similarity strips": 2.0,
        "floor gather whole": 3.0,
        "floor gather strips": 4.0,
    }
    case = Case("graph_conv", 64, normalization="row")
    assert floor.floor_seconds(case, least) == (0.5 * 2 + 1 * 3, 2 * 2 + 3 * 3)


def test_floor_products_cover_every_row(monkeypatch):
    monkeypatch.setattr(floor, "STRIP_ROWS", 16)
    operations = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1]))
    case = Case("relation_kl", 37, 16)
    for name, run_products in floor.contenders(case).items():
        operations.clear()
        run_products(timing.Clock("cpu"))
        assert sum(operations) == 2 * 37**2 * 16, name
        assert len(operations) == (1 if "whole" in name else 3), name


def test_rounds_are_interleaved():
    order = []

    def contender(name):
        def run_once(clock):
            order.append(name)
            return [0.0, 1.0, 3.0]

        return run_once

    parts = timing.interleave({"a": contender("a"), "b": contender("b")}, 3, "cpu")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [samples.seconds for samples in parts["a"]] == [[1.0] * 3, [2.0] * 3]


def test_a_fast_contender_is_called_often_enough():
    calls = []

    def run_once(clock):
        calls.append(None)
        return [0.01 * (len(calls) - 1), 0.01 * len(calls)]

    timing.interleave({"fast": run_once}, 2, "cpu")
    assert len(calls) == (1 + 2 + 4) + 4  # 4 calls last for the 30 ms of a sample


@pytest.mark.parametrize("kept", [False, True])
def test_peak_memory_is_that_of_the_run(kept):
    size = 64_000_000

    def work():
        block = torch.ones(size // 4)
        return [block] if kept else [block[:10].clone()]

    found = memory.extra_peak(work)
    assert abs(found - (0 if kept else size)) < 2_000_000


def test_memory_in_a_process_of_its_own():
    """Eager relation_kl at B = 1,024 holds at least three B×B matrices of 4.2 MB at its peak, and not twenty."""
    matrix = 4 * 1024**2
    assert 3 * matrix < memory.measure(Case("relation_kl", 1024, 16), "eager", threads=1) < 20 * matrix


def test_memory_reports_the_last_words_of_a_failed_process():
    with pytest.raises(memory.MemoryUnknown, match="has no relation_kl"):
        memory.measure(CASES[0], "attention", threads=1)


def test_command_writes_json_and_plot(monkeypatch, tmp_path, capsys):
    file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    arguments = ["ops", "--op", "graph_conv", "--normalization", "row", "--batch", 16, 32, "--dim", 8]
    arguments += ["--backend", "reference", "attention", "keops", "--repeats", 2, "--threads", 1, "--no-memory"]
    for _ in range(2):  # the second run replaces the rows of the first
        assert run(monkeypatch, *arguments, "--json", file, "--plot", picture) == 0
    assert "graph_conv row B=32" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")

    content = json.loads(file.read_text())
    assert content["schema"] == results.SCHEMA and content["repeats"] == 2
    assert {"cpu", "threads", "torch", "python", "commit", "instruction_sets"} <= content["machine"].keys()
    assert {"AVX2", "AVX-512", "AMX BF16"} <= content["machine"]["instruction_sets"].keys()
    assert len(content["rows"]) == 2 * len(("reference", "attention", "keops", "eager", "floor"))
    row = next(row for row in content["rows"] if row["backend"] == "attention")
    assert row["case"] == Case("graph_conv", 16, 8, normalization="row").to_dict()
    assert row["status"] == "ok" and row["error"] < 1e-5
    for part in ("forward", "forward_backward"):
        summary = row[part]
        assert summary["least"] <= summary["median"] and len(summary["samples"]) == 2
        assert summary["spread"] == max(summary["samples"]) / summary["least"] - 1
    assert row["speedup"] > 0 and row["floor_ratio"] > 0

    loaded = results.load(file)
    loaded.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    here = machine.describe()
    results.Results(here | {"cpu": "another"}, 5).save(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="cpu 'another'"):
        results.load_or_new(tmp_path / "rows.json", here, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "must hold JSON that this command wrote, got 0 bytes"), ("[1]", "must have schema 1, got None"),
     ('{"schema": 7}', "must have schema 1, got 7")],
)  # fmt: skip
@pytest.mark.parametrize("command", [["ops", "--no-memory"], ["targets", "--no-memory", "--no-times"], ["gpu-static"]])
def test_a_file_that_is_no_result_gives_one_clear_line(monkeypatch, tmp_path, capsys, command, content, message):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *command, "--json", file)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.count("\n") == 1 and f"{file} {message}" in printed
    assert file.read_text() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_skipped_with_a_reason(monkeypatch, capsys):
    assert run(monkeypatch, "ops", "--device", "cuda") == 0
    assert "no CUDA device here" in capsys.readouterr().out


def test_a_missing_subcommand_is_not_offered(monkeypatch, capsys):
    monkeypatch.setitem(command.SUBCOMMANDS, "other", ("bench.not_there", "nothing"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    offered = capsys.readouterr().out
    assert "targets" in offered and "other" not in offered


def row(case, backend, least, **fields):
    return measure.Row(case, backend, forward_backward={"least": least}, **fields)


def test_targets_say_what_holds():
    case = standard.RELATION.at(8192)
    found = results.Results(machine.describe() | {"instruction_sets": {"AMX BF16": False}}, 5)
    found.add([row(case, "cpp", 1.0), row(case, "eager", 12.9), row(case, "floor", 0.9)])
    verdicts = {(work, wanted): rest for work, wanted, *rest in targets.target_rows(found)}
    assert verdicts[case.name(), "≥ 13 × eager"] == ["12.9 ×", "does not hold"]
    assert verdicts[case.name(), "≤ 1.2 × product floor"] == ["1.11 ×", "holds"]
    assert verdicts[standard.NODE.at(8192).name(), "≥ 3 × eager"] == ["not measured yet", "not measured"]
    low = f"{standard.NODE.at(standard.BFLOAT16_BATCH).name()} → bfloat16"
    assert verdicts[low, "≥ 2 × its own float32"] == ["this CPU has no bfloat16 matrix units", "not measured"]
    found.add([measure.Row(case, "cpp", status="wrong", reason="output is off")])
    verdicts = {(work, wanted): rest for work, wanted, *rest in targets.target_rows(found)}
    assert verdicts[case.name(), "≥ 13 × eager"] == ["cpp: wrong: output is off", "not measured"]


def test_every_target_is_in_the_standard_table():
    everything = results.Results(machine.describe() | {"instruction_sets": {"AMX BF16": True}}, 5)
    for case, backends in standard.cases().items():
        for backend in {*backends, case.base(), "floor"}:
            times = {"double_backward" if case.order == 2 else "forward_backward": {"least": 1.0}}
            everything.add([measure.Row(case, backend, peak_bytes=1, **times)])
    assert {target.measured(everything)[1] for target in standard.targets()} == {"holds", "does not hold"}


def test_markdown_is_written_between_the_marks(tmp_path):
    file = tmp_path / "performance.md"
    found = results.Results(machine.describe(), 5)
    case = standard.RELATION.at(64)
    found.add([row(case, "eager", 0.002, speedup=1.0)])
    begin, end = report.marks(targets.SECTION)
    file.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        report.write_section(file, targets.SECTION, targets.markdown(found))
    text = file.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"\n{end}\nafter\n")
    assert "old" not in text and text.count(f"| {case.name()} | eager |") == 1
    file.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        report.write_section(file, targets.SECTION, targets.markdown(found))


@pytest.mark.skipif(not hasattr(gkd_fast, "GraphKDLoss"), reason="this version has no GraphKDLoss")
@pytest.mark.parametrize("form", [{}, {"neighbors": 5, "self_weight": 0.8}], ids=["own node", "others"])
def test_step_truth_is_the_reference(form):
    case = Case(STEP, 37, 16, stages=2, dtype="float64", **form)
    inputs = problem(case)
    expected = oracle.truth(case, inputs)
    found = oracle.errors(inputs.results(peers.build("reference", case)), expected)
    assert {"output", "d students[0]", "d classifier.weight", "d teacher_heads.1.linears.0.weight"} <= found.keys()
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("wrong", [False, True])
def test_forms_of_a_step_side_by_side(monkeypatch, capsys, wrong):
    """Each against its own truth: one form's is not the other's."""
    if wrong:
        right = oracle.truth
        monkeypatch.setattr(
            oracle, "truth", lambda case, inputs: right(dataclasses.replace(case, self_weight=0.5), inputs)
        )
    monkeypatch.setattr(forms, "LARGE", 38)
    sizes = "--batch", 37, "--dim", 16, "--stages", 2
    assert run(monkeypatch, "forms", *sizes, "--threads", torch.get_num_threads(), "--repeats", 2) == wrong
    assert ("is off by" in capsys.readouterr().out) == wrong


def test_the_picture_of_measured_figures_names_their_device(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run(monkeypatch, "picture", "--output", tmp_path / "picture.png")
    (figure,) = drawn
    assert (tmp_path / "picture.png").stat().st_size > 10_000 and "NVIDIA H200" in figure.get_suptitle()
    shown = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert shown["fused"] == [[4096, 113], [16384, 420], [65536, 1400]]
