"""``python -m bench gpu``: a GPU's few minutes, from its tests to its tables; ``make gpu``.

On a machine with a GPU, in at most six minutes: device times of the standing targets, public functions beside their
peers, a sweep of tile sizes, tests/gpu and the compute sanitizer on small cases. It writes a file of results, the
tables of the documents, and prints what failed or took more than 1.2 × what is predicted. Nothing is compiled on the
way if ``--fill`` was run before with the same Triton, Python, paths and ``TRITON_CACHE_DIR``; that needs no GPU, and
about an hour on two cores.
"""

import argparse
from pathlib import Path

import torch

from bench import files, machine, report
from bench.gpu import session, targets

SECTION = "targets"
PREDICTIONS = "predicted.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fill", action="store_true", help="no GPU: compile into the cache what a run needs, and predict"
    )
    parser.add_argument("--predict", action="store_true", help="no GPU: predict the targets' times alone")
    parser.add_argument("--arch", default="sm_90", help="of the GPU that --fill compiles for")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in session.steps()], help="only these steps")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="the file of results")
    parser.add_argument("--markdown", type=Path, help=f"writes the tables between the marks {report.marks(SECTION)}")


def run(arguments: argparse.Namespace) -> int:
    console = report.console()
    predicted_file = session.cache_folder() / PREDICTIONS
    if arguments.fill:
        from bench.gpu import filling

        names = filling.fill(arguments.arch)
        console.print(f"{len(names)} kernels for {arguments.arch} in {session.cache_folder()}")
        filling.fill_tests(arguments.arch)
    if arguments.fill or arguments.predict:
        found = session.kept(targets.predictions([target.work() for target in targets.TARGETS]))
        predicted = {"predicted": found, "predicted_at": machine.commit()}
        files.write(predicted_file, session.SCHEMA, predicted)
        # gpu-static keeps what it found in the same file.
        content = files.read(arguments.json, session.SCHEMA) if arguments.json.exists() else {}
        write(arguments.markdown, {"times": []} | content | predicted, console)
        return 0
    if not torch.cuda.is_available():
        console.print("no run: no CUDA device here (torch.cuda.is_available() is False); --fill needs none")
        return 1
    if not predicted_file.exists():
        console.print(
            f"no run: {predicted_file} is not there: python -m bench gpu --fill makes it, and the cache, first"
        )
        return 1
    predicted = files.read(predicted_file, session.SCHEMA)
    made = session.Session(predicted["predicted"], predicted["predicted_at"])
    chosen = [step for step in session.steps() if not arguments.only or step.name in arguments.only]
    session.run(made, chosen, console)
    content = made.content
    content["exceeded"] = session.exceeded(content)
    files.write(arguments.json, session.SCHEMA, content)
    write(arguments.markdown, content, console)
    for line in content["failed"]:
        console.print(f"failed: {line}", markup=False)
    for line in content["exceeded"]:
        console.print(f"slower than predicted: {line}", markup=False)
    return 1 if content["failed"] else 0


def write(page: Path | None, content: dict, console) -> None:
    """The tables, on the terminal and into the page."""
    headers, rows = targets.table(session.predictions(content), content["times"])
    console.print(report.rich_table(headers, rows, "targets"))
    if page is not None:
        report.write_section(page, SECTION, markdown(content))


def markdown(content: dict) -> str:
    found = session.predictions(content)
    parts = [f"Predicted from commit {content['predicted_at']}."]
    parts.append(report.markdown_table(*targets.table(found, content["times"])))
    if reasons := targets.reasons(found):
        parts += ["What is missed, and why:", "\n".join(f"- {line}" for line in reasons)]
    if content.get("peers"):
        parts += ["### As called, beside others", report.markdown_table(*session.peer_table(content))]
    if content.get("tiles"):
        parts += ["### Tile sizes of that run", report.markdown_table(*session.tile_table(content))]
    if content.get("machine"):
        tests = f"; tests/gpu: {content['tests']}" if content["tests"] else ""
        parts.append(f"Measured on: {report.describe(content['machine'])}{tests}.")
    for title, lines in (("failed", content.get("failed")), ("slower than predicted", content.get("exceeded"))):
        if lines:
            parts += [f"Of that run, {title}:", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)
