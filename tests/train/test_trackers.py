"""What accelerate's trackers get of a training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from gkd_fast.train import cli
from gkd_fast.train.metrics import read_metrics
from gkd_fast.train.run import train
from tests.train.conftest import quiet
from tests.train.test_driver import options


class Kept(tracking.GeneralTracker):
    """Keeps what it is given."""

    name = "wandb"
    requires_logging_directory = False
    all: list["Kept"] = []

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.records, self.finished = project, options, {}, False
        self.all.append(self)

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step, **_):
        assert not self.finished
        self.records[step] = values

    def finish(self):
        self.finished = True


@pytest.fixture
def trackers(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Kept)
    monkeypatch.setattr(Kept, "all", [])
    return Kept.all


@pytest.mark.parametrize("name", ["wandb", "all"])
def test_they_get_the_options_and_what_the_run_writes(tiny, tiny_teacher, trackers, name):
    train(replace(tiny, teacher=tiny_teacher, log_with=[name]), "student", quiet())
    (tracker,) = trackers
    assert tracker.project == "gkd_fast" and tracker.finished
    assert tracker.configuration["student_network/name"] == "small_2" and tracker.configuration["seed"] == 0
    assert tracker.configuration["student_training/milestones"] == "[1]"
    written = read_metrics(Path(tiny.output))
    assert list(tracker.records) == [0, 1]
    for record, got in zip(written, tracker.records.values()):
        assert {"cross_entropy", "kd", "node", "relation", "validation_accuracy", "learning_rate"} <= got.keys()
        assert all(got[name] == x for name, x in record.items() if not isinstance(x, dict))
        assert got["gradient_shares/node"] == record["gradient_shares"]["node"]
        assert got["diagnostics/student_cosine/0"] == record["diagnostics"]["student_cosine"][0]
        assert all(isinstance(x, (int, float)) for x in got.values())


def test_a_missing_package_is_told_before_the_training(tiny, trackers, capsys):
    config = replace(tiny, log_with=["wandb", "tensorboard"])
    assert cli.main([*options(config, "student"), "--method", "ce"]) == 1
    error = capsys.readouterr().err
    assert "log_with tensorboard needs the package tensorboard: pip install tensorboard" in error
    assert len(error.splitlines()) == 1 and not Path(tiny.output).exists() and not trackers


@pytest.mark.parametrize(
    "words",
    [
        ["--log-with", "tensorboard", "wandb"],
        ["--log-with", "tensorboard,wandb"],
        ["--log-with=tensorboard,wandb"],
        ["--log_with", "[tensorboard, wandb]"],
    ],
)
def test_they_are_named_on_the_command_line(words, capsys):
    _, config, _ = cli.read_arguments(["student", *words, "--seed", "3"])
    assert config.log_with == ["tensorboard", "wandb"] and config.seed == 3
    with pytest.raises(SystemExit):
        cli.read_arguments(["student", "--log-with", "paper"])
    assert "paper" in capsys.readouterr().err


def test_tensorboard_reads_them(tiny, tiny_teacher):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(tiny, teacher=tiny_teacher, log_with=["tensorboard"])
    train(config, "student", quiet())
    written = EventAccumulator(str(Path(tiny.output) / "trackers" / "gkd_fast")).Reload()
    expected = [record["node"] for record in read_metrics(Path(tiny.output))]
    assert [(e.step, e.value) for e in written.Scalars("node")] == list(enumerate(pytest.approx(x) for x in expected))
    assert json.loads((Path(tiny.output) / "result.json").read_text())["method"] == "gkd"
