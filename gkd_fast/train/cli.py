"""The command line: four commands on one set of options, from a YAML file and overrides."""

import dataclasses
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from gkd_fast.train import commands
from gkd_fast.train.config import Config, TrainError
from gkd_fast.train.data import DataError
from gkd_fast.train.files import CONFIG_FILE
from gkd_fast.train.run import Interrupted

COMMANDS = {
    "teacher": "Trains a teacher: teacher_network with teacher_training, by cross-entropy on all its branches.",
    "student": "Trains a student: student_network with student_training, by --method; all but ce need --teacher.",
    "compare": "Trains students by several methods on paired seeds (--compare.methods, --compare.seeds), with a "
    "teacher of its own where --teacher names none, and reports tables, JSON and pictures.",
    "evaluate": "Accuracy of trained weights on the validation and test images. The options of a run's own folder are "
    "taken from there; other weights are taken for those of student_network.",
}

# Short names for options that many runs set.
SHORT_NAMES = {
    "--data-dir": "--data.data_dir",
    "--download": "--data.download",
    "--micro-batch": "--micro_batch",
    "--limit-batches": "--limit_batches",
    "--log-with": "--log_with",
    "--methods": "--compare.methods",
    "--seeds": "--compare.seeds",
    "--cuda-graphs": "--cuda_graphs",
}
# Options that may stand without a value.
SWITCHES = ("--data.download", "--cuda_graphs")
# Options that take several words, apart or with commas between them.
LISTS = ("--compare.methods", "--log_with")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; what the user can put right is told in one line.

    Returns:
        The exit status: 0, 1 for an error, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Of several processes the first alone speaks.
    console, errors = (Console(quiet=os.environ.get("RANK", "0") != "0", stderr=stderr) for stderr in (False, True))
    try:
        command, config, weights = read_arguments(arguments)
        if command == "evaluate":
            commands.evaluate(config, weights, console)
        else:
            getattr(commands, command)(config, console)
    except (TrainError, DataError, ValueError) as error:
        errors.print(f"gkd-train: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        saved = f", saved in {stop}" if isinstance(stop, Interrupted) else ""
        errors.print(f"stopped{saved}; go on with the same command and --resume", markup=False, soft_wrap=True)
        return 130
    return 0


def read_arguments(arguments: list[str]) -> tuple[str, Config, Path | None]:
    """The command, its options and, for evaluate, the weights."""
    parser = make_parser()
    arguments = _spelt_out(arguments)
    options = parser.parse_args(arguments)
    weights = None
    if options.command == "evaluate":
        weights = Path(options.evaluate.weights)
        own = (weights if weights.is_dir() else weights.parent) / CONFIG_FILE
        if options.evaluate.config is None and own.is_file():
            position = arguments.index("evaluate") + 1
            options = parser.parse_args([*arguments[:position], "--config", str(own), *arguments[position:]])
    chosen: Namespace = parser.instantiate(options)[options.command]
    return options.command, Config(**{f.name: chosen[f.name] for f in dataclasses.fields(Config)}), weights


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gkd-train",
        description="Graph knowledge distillation, from a data set to a report. Options come from a YAML file "
        "(--config) and from the command line, which wins; the defaults are the networks and constants of the "
        "published CIFAR-100 recipe, but the data are the digits (--data.name). "
        "For several processes: accelerate launch -m gkd_fast.train COMMAND ... (on CPUs torchrun).",
    )
    subparsers = parser.add_subcommands(dest="command")
    short_names = "Short names: " + ", ".join(f"{short} for {name}" for short, name in SHORT_NAMES.items()) + "."
    for command, description in COMMANDS.items():
        subparser = ArgumentParser(description=description, epilog=short_names)
        if command == "evaluate":
            subparser.add_argument("weights", help="folder of a run, or a file of weights")
        subparser.add_argument("--config", action="config", help="YAML file of options")
        subparser.add_argument("--resume", action="store_true", help="go on from the last good checkpoint in --output")
        subparser.add_class_arguments(Config, skip={"resume"})
        subparsers.add_subcommand(command, subparser, help=description)
    return parser


def _spelt_out(arguments: list[str]) -> list[str]:
    """The arguments with short names replaced; those of SWITCHES need no value, of LISTS several words."""
    full: list[str] = []
    rest = list(arguments)
    while rest:
        short, equals, value = rest.pop(0).partition("=")
        name = SHORT_NAMES.get(short, short)
        if name in LISTS:
            words = [value] if equals else []
            while not equals and rest and not rest[0].startswith("-"):
                words.append(rest.pop(0))
            value = ",".join(words)
            full.append(f"{name}={value}" if value.startswith("[") else f"{name}=[{value}]")
        elif name in SWITCHES and not equals and (not rest or rest[0].lower() not in ("true", "false")):
            full.append(f"{name}=true")
        else:
            full.append(name + equals + value)
    return full
