"""The four commands."""

from pathlib import Path

from rich.console import Console

from gkd_fast.train.config import Config
from gkd_fast.train.evaluation import evaluate_weights
from gkd_fast.train.progress import Display
from gkd_fast.train.report import print_result
from gkd_fast.train.run import train


def teacher(config: Config, console: Console) -> None:
    """Trains a teacher."""
    print_result(train(config, "teacher", Display(console)), console)


def student(config: Config, console: Console) -> None:
    """Trains a student."""
    print_result(train(config, "student", Display(console)), console)


def compare(config: Config, console: Console) -> None:
    """Trains all arms and reports."""
    from gkd_fast.train.compare import compare_methods  # matplotlib and SciPy take seconds to import

    compare_methods(config, console)


def evaluate(config: Config, weights: Path, console: Console) -> None:
    """Accuracy of trained weights."""
    print_result(evaluate_weights(config, weights, Display(console)), console)
