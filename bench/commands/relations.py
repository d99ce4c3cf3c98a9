"""``python -m bench relations``: the losses over a batch's relations beside torchdistill's, forward and backward."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from bench import files, machine, relations, report
from bench.relations import WORK, Measured, Wrong

SCHEMA = 1
HEADERS = [
    "loss",
    "B",
    "ours ms",
    "peer ms",
    "times faster",
    "of medians",
    "extra MB",
    "error",
    "peer's error",
    "wanted",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = f"measures these alone, or none: the table of --json; of {'; '.join(WORK)}"
    parser.add_argument("--only", nargs="*", choices=WORK, metavar="LOSS", help=choices)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds of which the least counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="keeps the figures; those of losses measured before are taken over")
    parser.add_argument("--markdown", type=Path, help="rewrites the table of this file")


def run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    described = machine.describe()
    found = _kept(arguments.json, described)
    wrong = False
    for name in WORK if arguments.only is None else arguments.only:
        try:
            found[name] = relations.measure(name, arguments.repeats)
        except Wrong as reason:
            report.console().print(f"wrong: {reason}")
            wrong = True
            continue
        if arguments.json:
            content = {"machine": described, "rows": {key: asdict(row) for key, row in found.items()}}
            files.write(arguments.json, SCHEMA, content)
    content = table(found, described, arguments.repeats)
    report.console().print(content)
    if arguments.markdown and not wrong:
        report.write_section(arguments.markdown, "relations", content)
    return int(wrong)


def table(found: dict[str, Measured], described: dict, repeats: int) -> str:
    commits = ", ".join(dict.fromkeys(row.commit for row in found.values()))
    about = report.describe(described | {"commit": commits})
    return f"Measured on: {about}. Least of {repeats} rounds.\n\n" + report.markdown_table(
        HEADERS, [cells(name, found[name]) for name in WORK if name in found]
    )


def cells(name: str, row: Measured) -> list[str]:
    work = WORK[name]
    medians = None if row.peer_median is None else row.peer_median / row.ours_median
    return [
        name, f"{work.batch:,}", report.milliseconds(row.ours), report.milliseconds(row.peer), report.ratio(row.times),
        report.ratio(medians), report.megabytes(row.extra_bytes), f"{row.error:.0e}",
        "–" if row.peer_error is None else f"{row.peer_error:.0e}", relations.holds(work, row),
    ]  # fmt: skip


def _kept(path: Path | None, described: dict) -> dict[str, Measured]:
    if path is None or not path.exists():
        return {}
    content = files.read(path, SCHEMA)
    for key in ("cpu", "threads", "torch"):
        there, here = content["machine"].get(key), described.get(key)
        if there != here:
            raise files.UnusableFile(f"{path} was measured with {key} {there!r}, here it is {here!r}")
    return {name: Measured(**row) for name, row in content["rows"].items()}
