"""``python -m bench SUBCOMMAND``; each subcommand is a module with ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import importlib
import importlib.util
import sys

from bench.files import UnusableFile

SUBCOMMANDS = {
    "ops": ("bench.commands.ops", "the ops at chosen sizes, every backend side by side"),
    "step": ("bench.commands.step", "a whole GraphKDLoss step, fused against the reference backend"),
    "forms": ("bench.commands.forms", "a whole GraphKDLoss step by the form of its graphs, side by side"),
    "relations": ("bench.commands.relations", "the losses over a batch's relations beside torchdistill's"),
    "targets": ("bench.commands.targets", "the standard table, and which of its targets hold"),
    "picture": ("bench.commands.picture", "time and memory of a whole step, drawn from measured figures"),
    "scaling": (
        "bench.commands.scaling",
        "memory, traffic and arithmetic of a global batch over many GPUs, by formula",
    ),
    "gpu": ("bench.commands.gpu", "a GPU's few minutes: its tests, times beside predictions and peers, tile sizes"),
    "gpu-static": ("bench.commands.gpu_static", "the Triton kernels' resources and predicted times, without a GPU"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    choices = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, (module_name, description) in SUBCOMMANDS.items():
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        subparser = choices.add_parser(name, help=description, description=description)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    arguments = parser.parse_args()
    try:
        return arguments.run(arguments) or 0
    except UnusableFile as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
