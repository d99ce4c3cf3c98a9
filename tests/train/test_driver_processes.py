"""The driver in several processes: the same training as in one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gkd_fast.train import build, cli
from tests.train import group_norm
from tests.train.test_driver import options

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_two_processes_train_as_one_does(tiny, tmp_path, monkeypatch):
    """Without batch statistics; training steps, meta-steps with a held-out batch, bank, diagnostics and result; the two
    processes in micro-batches."""
    monkeypatch.setattr(build, "build_network", group_norm.without_batch_norm(build.build_network))
    teacher = replace(tiny, output=str(tmp_path / "teacher"))
    assert cli.main(options(teacher, "teacher")) == 0
    meta = replace(tiny.meta, outer_batch="held-out")
    graph = replace(tiny.graph, column_bank=100)
    config = replace(tiny, method="gkd", teacher=teacher.output, meta=meta, graph=graph)
    runs = [replace(config, output=str(tmp_path / name)) for name in ("one", "two")]
    assert cli.main(options(runs[0], "student")) == 0
    runs[1] = replace(runs[1], micro_batch=9)
    done = subprocess.run(
        [*LAUNCH, "tests.train.group_norm", *options(runs[1], "student")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1

    one, two = (Path(run.output) for run in runs)
    manifest = json.loads((two / "checkpoints/step-000000008/manifest.json").read_text())
    assert manifest["processes"] == 2
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= manifest["files"].keys()
    states = [torch.load(folder / "weights.pt", weights_only=True)["model"] for folder in (one, two)]
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, atol=1e-4, rtol=0)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    changes = [torch.tensor(result["pair_weights"]["trained"]) for result in results]
    torch.testing.assert_close(*changes, atol=1e-4, rtol=0)
    assert results[1]["pair_weights"]["images"] == results[0]["pair_weights"]["images"] // 2 * 2
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    for expected, found in zip(*logs, strict=True):
        assert found.keys() == expected.keys()
        for name in ("student_neighbors", "teacher_neighbors", "student_cosine", "weight_mean"):
            pair = (torch.tensor(x["diagnostics"][name]) for x in (found, expected))
            torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-3)
        shares = (torch.tensor(list(x["gradient_shares"].values())) for x in (found, expected))
        torch.testing.assert_close(*shares, atol=1e-3, rtol=0)
