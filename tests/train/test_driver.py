"""Arms, comparison, command line and what a run writes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from rich.console import Console

from gkd_fast.meta import SECOND_DERIVATIVES
from gkd_fast.train import cli, compare
from gkd_fast.train.build import build_distiller, build_network_for
from gkd_fast.train.config import METHOD_NAMES, RELATION_NAMES, Config
from gkd_fast.train.cost import available_backends, measure_costs, peak_bytes
from gkd_fast.train.data import load_splits
from gkd_fast.train.engine import Distiller
from gkd_fast.train.methods import METHODS, PermutedWeights, batch_permutation, held_out, stream_seed
from gkd_fast.train.metrics import MetricsLog, read_metrics
from gkd_fast.train.run import train
from tests.train.conftest import quiet

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(20, 1, 8, 8, generator=generator), torch.randint(10, (20,), generator=generator)


def distiller_for(config: Config, method: str) -> Distiller:
    splits = load_splits(config.data, config.seed)
    teacher = build_network_for(config.teacher_network, splits, seed=99)
    return build_distiller(config, splits, method, config.student_network, config.student_training, teacher)


def run_cli(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_every_method_has_its_arm():
    assert tuple(METHODS) == METHOD_NAMES


EXPECTED_TERMS = {
    "ce": {"cross_entropy"},
    "kd": {"cross_entropy", "kd"},
    "gkd-nokd": {"cross_entropy", "node", "relation", "teacher_graph"},
    **{name: {"cross_entropy", "relations"} for name in RELATION_NAMES},
    **{f"kd+{name}": {"cross_entropy", "kd", "relations"} for name in RELATION_NAMES},
}
ALL_TERMS = {"cross_entropy", "kd", "node", "relation", "teacher_graph"}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_arms_train_on_their_terms(tiny, batch, method):
    distiller = distiller_for(tiny, method)
    before = [p.clone() for p in distiller.student.parameters()]
    terms = distiller.train_step(*batch)
    assert terms.keys() == EXPECTED_TERMS.get(method, ALL_TERMS)
    assert all(not torch.equal(p, q) for p, q in zip(distiller.student.parameters(), before))
    assert distiller.meta_due(0) == METHODS[method].meta and not distiller.meta_due(1)
    if METHODS[method].meta:
        weights = [p.clone() for p in distiller.pair_weights.parameters()]
        assert distiller.meta_step(*batch)["meta_gradient_norm"] > 0
        assert any(not torch.equal(p, q) for p, q in zip(distiller.pair_weights.parameters(), weights))


@pytest.mark.parametrize("name", RELATION_NAMES)
def test_losses_over_relations_have_the_weights_that_are_set(tiny, batch, name):
    option = f"--distillation.relation_weights.{name.replace('-', '_')}"
    chosen = cli.read_arguments(["student", option, "0.25"])[1].distillation
    published = distiller_for(tiny, name).module
    weighted = distiller_for(replace(tiny, distillation=chosen), f"kd+{name}").module
    factor = published.extra_losses["relations"].weight / 0.25
    terms = [module.terms(*batch)[0]["relations"] for module in (published, weighted)]
    torch.testing.assert_close(terms[0], factor * terms[1])
    assert factor >= 4


def test_arms_start_alike(tiny):
    distillers = {method: distiller_for(tiny, method) for method in METHOD_NAMES}
    first = distillers["gkd"]
    for method, other in distillers.items():
        pairs = zip(first.student.state_dict().values(), other.student.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), method
        if other.criterion is not None and method != "gkd-nograph":
            pairs = zip(first.criterion.state_dict().values(), other.criterion.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), method
        if other.pair_weights is not None:
            pairs = zip(first.pair_weights.parameters(), other.pair_weights.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), method
    other_seed = distiller_for(replace(tiny, seed=1), "gkd").student
    assert not torch.equal(next(first.student.parameters()), next(other_seed.parameters()))


def test_plain_arm_leaves_features_of_the_right_width_alone(tiny, batch):
    distiller = distiller_for(tiny, "gkd-nograph")  # features of 8 and 16 channels, embeddings of 16
    students, teachers = distiller.student(batch[0]).features, distiller.teacher(batch[0]).features
    student_embeddings, teacher_embeddings = distiller.criterion.embed(students, teachers)
    for feature, embedding in zip(teachers, teacher_embeddings, strict=True):
        assert torch.equal(feature, embedding)
    for feature, embedding, convolution in zip(
        students, student_embeddings, distiller_for(tiny, "gkd").criterion.student_heads, strict=True
    ):
        torch.testing.assert_close(embedding, convolution.linears[0](feature), rtol=0, atol=0)
    distiller.train_step(*batch)
    assert distiller.criterion.diagnostics()["node_loss_minus_log_batch"] != 0


def test_permuted_arm_deals_the_same_weights_to_others(tiny, batch):
    distiller = distiller_for(tiny, "gkd-permuted")
    embeddings = [torch.randn(20, 16) for _ in range(3)], [torch.randn(20, 16) for _ in range(3)]
    weights = distiller._weights(20, torch.device("cpu"))
    assert isinstance(weights, PermutedWeights)
    own, dealt = distiller.pair_weights(*embeddings), weights(*embeddings)
    torch.testing.assert_close(dealt, own[batch_permutation(20, tiny.seed, 0, torch.device("cpu"))])
    assert not torch.equal(dealt, own)
    distiller.train_step(*batch)
    later = distiller._weights(20, torch.device("cpu")).permutation
    assert not torch.equal(later, weights.permutation) and torch.equal(later.sort().values, torch.arange(20))


def test_streams_differ():
    seeds = {stream_seed(s, purpose, i) for s in range(3) for purpose in ("heads", "initialisation") for i in range(3)}
    assert len(seeds) == 18


def test_kd_pairs_branches_or_takes_the_teachers_own_logits(tiny, batch):
    """By hand: KL at temperature 3, mean over the student's branches, times 9."""
    distiller = distiller_for(tiny, "kd")
    images, labels = batch
    outputs = distiller.student(images)
    for auxiliary in (True, False):
        splits = load_splits(tiny.data, 0)
        teacher = build_network_for(tiny.teacher_network, splits, seed=9, auxiliary=auxiliary)
        teacher_outputs = teacher(images)
        assert len(teacher_outputs.logits) == (3 if auxiliary else 1)
        terms = distiller.module.label_terms(outputs, teacher_outputs, labels)
        expected = 0.0
        for k, logits in enumerate(outputs.logits):
            p = (teacher_outputs.logits[k if auxiliary else 0] / 3).softmax(dim=1)
            q = (logits / 3).softmax(dim=1)
            expected += 9 * (p * (p / q).log()).sum(dim=1).mean() / 3
        torch.testing.assert_close(terms["kd"], expected)


def test_gradient_shares_leave_no_trace(tiny, batch):
    distiller = distiller_for(tiny, "gkd")
    before = {n: t.clone() for n, t in distiller.module.state_dict().items()}
    shares = distiller.gradient_shares(*batch)
    assert shares.keys() == ALL_TERMS and sum(shares.values()) == pytest.approx(1) and shares["teacher_graph"] == 0
    assert all(shares[name] > 0 for name in ALL_TERMS - {"teacher_graph"})
    for name, tensor in distiller.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in distiller.module.parameters())


def test_run_writes_its_results(tiny, tiny_teacher):
    result = train(replace(tiny, method="gkd", teacher=tiny_teacher), "student", quiet())
    folder = Path(tiny.output)
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["meta_step_over_train_step"] == result["meta_step_seconds"] / result["train_step_seconds"]
    change = result["pair_weights"]
    assert 0 < change["mean_absolute_change"] <= change["largest_absolute_change"] < 0.5
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1] and records[1]["learning_rate"] == pytest.approx(0.005)
    assert records[0].keys() >= ALL_TERMS | {"gradient_shares", "diagnostics", "validation_accuracy"}
    assert max(r["validation_accuracy"] for r in records) == result["best"]["validation_accuracy"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"] == asdict(tiny.data)


def test_graphs_are_diagnosed_on_a_whole_batch(tiny, tiny_teacher):
    training = replace(tiny.student_training, epochs=1, batch_size=64)  # 200 images: the last batch has 8
    train(replace(tiny, method="gkd-constant", teacher=tiny_teacher, student_training=training), "student", quiet())
    (record,) = read_metrics(Path(tiny.output))
    # Of a batch of 8 they would be 7 at most.
    assert record["diagnostics"]["student_neighbors"] == pytest.approx([8.0] * 3, rel=0.1)


def test_two_runs_of_a_seed_are_equal(tiny, tiny_teacher, tmp_path):
    states = []
    for name in ("a", "b"):
        output = tmp_path / name
        train(replace(tiny, method="gkd", teacher=tiny_teacher, output=str(output)), "student", quiet())
        states.append(torch.load(output / "weights.pt", weights_only=True)["model"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_bfloat16_training_and_meta_step(tiny, tiny_teacher):
    result = train(replace(tiny, method="gkd", teacher=tiny_teacher, precision="bf16"), "student", quiet())
    assert result["pair_weights"]["mean_absolute_change"] > 0
    state = torch.load(Path(tiny.output) / "weights.pt", weights_only=True)["model"]
    assert all(t.dtype != torch.bfloat16 and t.isfinite().all() for t in state.values())


def test_the_frozen_teacher_runs_once_in_a_meta_step(tiny, batch):
    distiller = distiller_for(tiny, "gkd")
    calls = []
    distiller.teacher.register_forward_hook(lambda *_: calls.append(1))
    distiller.meta_step(*batch)
    assert len(calls) == 1
    distiller.meta_step(*batch, outer_batch=batch)
    assert len(calls) == 3


@pytest.mark.parametrize("second_derivatives", SECOND_DERIVATIVES)
def test_meta_steps_with_a_held_out_outer_batch(tiny, tiny_teacher, second_derivatives, monkeypatch):
    seen = []
    meta_step = Distiller.meta_step

    def watched(self, images, labels, outer_batch):
        seen.append((images, outer_batch[0]))
        return meta_step(self, images, labels, outer_batch)

    monkeypatch.setattr(Distiller, "meta_step", watched)
    meta = replace(tiny.meta, outer_batch="held-out", second_derivatives=second_derivatives)
    result = train(replace(tiny, method="gkd", teacher=tiny_teacher, meta=meta), "student", quiet())
    assert result["pair_weights"]["mean_absolute_change"] > 0
    assert len({tuple(outer.flatten()[:5].tolist()) for _, outer in seen}) == len(seen)
    for images, outer in seen:
        assert outer.shape == images.shape


def test_a_held_out_batch_has_other_images():
    batch = [3, 8, 1, 0]
    chosen = [held_out(12, batch, seed) for seed in range(3)]
    assert all(len(set(c)) == 4 and not set(c) & set(batch) for c in chosen)
    assert chosen[0] == held_out(12, batch, 0) and len({tuple(c) for c in chosen}) == 3
    assert sorted(held_out(6, batch, 0)) == [2, 4, 5]


def test_a_term_that_is_not_finite_stops_the_run(tiny, capsys):
    code = run_cli(*options(replace(tiny, teacher_training=replace(tiny.teacher_training, lr=1e30)), "teacher"))
    assert code == 1
    assert "the cross_entropy term is" in capsys.readouterr().err


def test_metrics_after_the_resumed_epoch_are_forgotten(tmp_path):
    """So is the line that a killed process did not finish."""
    lines = [json.dumps({"epoch": epoch}) for epoch in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"epoch": 3, "k')
    MetricsLog(tmp_path, 2, Accelerator(cpu=True), {}).write({"epoch": 2, "again": True})
    assert read_metrics(tmp_path) == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2, "again": True}]


def options(config: Config, command: str) -> list[str]:
    """The command line of a configuration, by way of a file."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump({k: v for k, v in asdict(config).items() if k != "resume"}))
    return [command, "--config", str(path)]


def test_commands(tiny, tiny_teacher, capsys):
    student = options(tiny, "student")
    assert run_cli(*student, "--method", "kd", "--teacher", tiny_teacher) == 0
    told = capsys.readouterr().out
    assert "epoch 2/2" in told and "small_2: test " in told
    assert run_cli("evaluate", tiny.output) == 0
    test = json.loads((Path(tiny.output) / "result.json").read_text())["test_accuracy"]
    assert f"small_2: test {test:.2f} %" in capsys.readouterr().out
    assert run_cli("evaluate", tiny_teacher) == 0
    assert capsys.readouterr().out.startswith("small_4: test ")
    assert run_cli(*student, "--method", "kd", "--teacher", tiny_teacher) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert run_cli(*student, "--method", "kd", "--teacher", tiny_teacher, "--resume") == 0


def test_user_mistakes_get_one_line(tiny, tmp_path, capsys):
    student = options(tiny, "student")
    (tmp_path / "text").write_text("no weights")
    for arguments, message in (
        (["--method", "gkd"], "method gkd needs a teacher: name its weights with --teacher"),
        (["--teacher", str(tmp_path / "none")], "there are no weights in"),
        (["--teacher", str(tmp_path / "text")], "cannot be read as a checkpoint"),
        (["--method", "ce", "--data.name", "cifar10", "--data.data_dir", str(tmp_path)], "--data.download true"),
        (["--method", "ce", "--student_network.name", "tiny"], "there is no network 'tiny'"),
        (["--method", "ce", "--precision", "fp16"], "precision fp16 cannot be had here"),
        (["--method", "ce", "--student_training", '{"batch_size": 500, "drop_last": true}'], "no batch"),
        (["--method", "ce", "--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
    ):
        assert run_cli(*student, *arguments) == 1, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["student", "--method", "none"], "Got value: none"),
        (["student", "--student_training.epochs", "0"], "epochs must be at least 1"),
        (["student", "--student_training.epochs", "many"], "student_training.epochs"),
        (["compare", "--compare.methods", "ce,kd,kd"], "different methods"),
        (["compare", "--compare.variants", "{kd: {graph.layers: 2}}"], "names of their own"),
        (["compare", "--compare.variants", "{wide: {graph.embed_dims: 2}}"], "option 'embed_dims'"),
        (
            ["compare", "--compare.variants", "{cold: {distillation.temperature: 0}}"],
            "cold: temperature must be above 0",
        ),
        (["student", "--no.such", "1"], "no.such"),
        ([], "command"),
    ],
)
def test_bad_options_name_themselves(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        code = run_cli(*arguments)
        raise SystemExit(code)
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(command, "--help")
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--student_training.milestones" in told
    assert "epochs at which the learning rate is multiplied by gamma" in told


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_read(path):
    _, config, _ = cli.read_arguments(["compare", "--config", str(path)])
    assert config.output.startswith("runs/")
    assert compare.arms_of(config).keys() == {*config.compare.methods, *config.compare.variants}


def test_published_recipe_is_the_default():
    _, config, _ = cli.read_arguments(["compare", "--config", str(CONFIGS / "cifar100_wrn40_2_wrn16_2.yaml")])
    defaults = Config()
    for part in ("teacher_network", "teacher_training", "student_network", "student_training"):
        assert getattr(config, part) == getattr(defaults, part), part
    for part in ("distillation", "graph", "meta", "compare"):
        assert getattr(config, part) == getattr(defaults, part), part


def test_missing_package_is_named(tmp_path):
    (tmp_path / "accelerate.py").write_text("raise ModuleNotFoundError('gone', name='accelerate')")
    done = subprocess.run(
        [sys.executable, "-m", "gkd_fast.train", "teacher"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""},
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "gkd-train needs the package accelerate: pip install 'gkd_fast[train]'"


def test_compare(tiny, capsys):
    settings = replace(
        tiny.compare, methods=["kd", "gkd"], variants={"gkd-soft": {"method": "gkd", "distillation.temperature": 8.0}},
        seeds=2, cost_batch_sizes=[16], cost_repeats=1,
    )  # fmt: skip
    summary = compare.compare_methods(replace(tiny, compare=settings), Console())
    told = capsys.readouterr().out
    folder = Path(tiny.output)
    for method in (*settings.methods, "gkd-soft"):
        for seed in (0, 1):
            result = json.loads((folder / method / f"seed-{seed}" / "result.json").read_text())
            assert summary["arms"][method]["test_accuracy"]["values"][seed] == result["test_accuracy"]
        assert method in told
    assert json.loads((folder / "summary.json").read_text()) == summary
    soft = yaml.safe_load((folder / "gkd-soft/seed-0/config.yaml").read_text())
    assert soft["method"] == "gkd" and soft["distillation"] == asdict(tiny.distillation) | {"temperature": 8.0}
    assert "difference" in summary["arms"]["gkd-soft"] and "validation_difference" in summary["arms"]["gkd-soft"]
    for picture in ("accuracy.png", "losses.png", "pair_weights.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert summary["conclusion"] in told
    assert {row["case"] for row in summary["costs"]} >= {"kd", "gkd, reference"}
    # Finished runs are taken over as they are.
    stamp = (folder / "gkd/seed-1/checkpoints").stat().st_mtime_ns
    again = compare.compare_methods(replace(tiny, compare=settings, resume=True), Console(quiet=True))
    assert again["arms"]["gkd"]["test_accuracy"] == summary["arms"]["gkd"]["test_accuracy"]
    assert (folder / "gkd/seed-1/checkpoints").stat().st_mtime_ns == stamp


def test_students_of_a_comparison_start_from_their_own_seeds_weights(tiny, tiny_teacher, monkeypatch):
    jobs = {}

    def stop(found, *rest):
        jobs.update(found)
        raise compare.TrainError("seen")

    monkeypatch.setattr(compare, "_run", stop)
    network = replace(tiny.student_network, weights="ce/seed-{seed}")
    settings = replace(tiny.compare, methods=["kd", "gkd"], seeds=2)
    with pytest.raises(compare.TrainError, match="seen"):
        config = replace(tiny, teacher=tiny_teacher, student_network=network, compare=settings)
        compare.compare_methods(config, Console(quiet=True))
    assert {key: job.student_network.weights for key, job in jobs.items()} == {
        (method, seed): f"ce/seed-{seed}" for method in ("kd", "gkd") for seed in (0, 1)
    }


def test_one_command_compares_all_losses_over_relations(tmp_path):
    options = ["--limit-batches", "1", "--seeds", "1", "--compare.workers", "1"]
    lengths = [f"--{side}_training.epochs=1" for side in ("teacher", "student")]
    assert (
        cli.main(
            ["compare", "--config", str(CONFIGS / "relations.yaml"), "--output", str(tmp_path), *options, *lengths]
        )
        == 0
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    arms = {"kd", *RELATION_NAMES, *(f"kd+{name}" for name in RELATION_NAMES), "gkd", "gkd-nokd"}
    assert summary["arms"].keys() == arms and summary["baseline"] == "kd" and summary["seeds"] == [10]
    assert {name for arm in arms for name in read_metrics(tmp_path / arm / "seed-10")[-1]} >= {
        "kd",
        "relations",
        "node",
    }


def test_intervals_and_conclusions():
    numbers = compare.describe([1.0, 2.0, 3.0, 4.0])
    assert numbers["mean"] == 2.5 and numbers["std"] == pytest.approx(1.2909944)
    assert numbers["half_width"] == pytest.approx(3.182446 * 1.2909944 / 2)  # t quantile of 3 degrees of freedom
    arms = {
        "ce": {"test_accuracy": {"mean": 60.0}, "difference": {"mean": -3.0, "half_width": 1.0}},
        "kd": {"test_accuracy": {"mean": 63.0}},
        "gkd": {"difference": {"mean": 0.4, "half_width": 0.5}},
        "gkd-nokd": {"difference": {"mean": 1.0, "half_width": None}},
        "gkd-constant": {"difference": {"mean": 2.0, "half_width": 0.5}},
    }
    arms["gkd-permuted"] = {"difference": {"mean": -2.0, "half_width": 0.5}}
    sentence = compare.conclude({"arms": arms, "baseline": "kd", "teacher": {"test_accuracy": 70.0}, "seeds": [0, 1]})
    assert sentence == (
        "Over 2 paired seeds (± 95 % intervals): teacher − ce = +10.00 points; "
        "kd − ce = +3.00 ± 1.00 points, so kd is better here; "
        "gkd − kd = +0.40 ± 0.50 points, inconclusive since the interval holds 0; "
        "gkd-nokd − kd = +1.00 points on a single seed, from which nothing can be concluded; "
        "gkd-constant − kd = +2.00 ± 0.50 points, so gkd-constant is better here; "
        "gkd-permuted − kd = -2.00 ± 0.50 points, so gkd-permuted is worse here."
    )


def test_costs_of_each_backend(tiny):
    settings = replace(tiny.compare, cost_batch_sizes=[8, 64], cost_repeats=1)
    rows = measure_costs(replace(tiny, compare=settings))
    backends = available_backends(torch.device("cpu"))
    assert "reference" in backends
    assert [(r["batch_size"], r["case"]) for r in rows] == [
        (size, case) for size in (8, 64) for case in ("kd", *(f"gkd, {b}" for b in backends))
    ]
    peaks = {(r["batch_size"], r["case"]): r["peak_bytes"] for r in rows}
    assert peaks[64, "gkd, reference"] > peaks[64, "kd"] > peaks[8, "kd"] > 0
    with_graphs = [r for r in rows if r["case"] != "kd"]
    assert all(r["meta_over_train"] == r["meta_seconds"] / r["fastest_seconds"] for r in with_graphs)
    assert all(r["graph_peak_bytes"] > 0 for r in with_graphs) and "meta_seconds" not in rows[0]


def test_peak_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            a = torch.zeros(1000, 256)  # 1,024,000 bytes
            b = a + 1
            del a, b

    assert 2_048_000 <= peak_bytes(work, torch.device("cpu")) < 2_100_000


@pytest.mark.parametrize("methods", [["--methods", "kd", "gkd"], ["--methods", "kd,gkd"], ["--methods=kd,gkd"]])
def test_short_names(methods):
    command, config, _ = cli.read_arguments(["compare", "--data-dir", "here", *methods, "--seeds", "4", "--download"])
    assert command == "compare"
    assert (config.data.data_dir, config.data.download) == ("here", True)
    assert (config.compare.methods, config.compare.seeds) == (["kd", "gkd"], 4)
