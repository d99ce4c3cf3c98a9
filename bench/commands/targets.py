"""``python -m bench targets``: measures the standard table and prints, for each target, wanted, measured, holds or not.

With ``--json FILE`` each case is saved as soon as it is measured and cases that the file has are not measured again, so
a long table can be taken in pieces (``--only``) and a stopped run goes on where it was. Times need a quiet machine,
memory does not: ``--no-memory`` and ``--no-times`` part them.
"""

import argparse
from pathlib import Path

import torch
from rich.table import Table

from bench import machine, measure, plot, report, standard
from bench.results import Results, load_or_new

SECTION = "measured"
HEADERS = ["work, forward + backward", "wanted", "measured", ""]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="only cases whose name holds one of these")
    parser.add_argument("--again", action="store_true", help="measure the chosen cases even if the file has them")
    parser.add_argument("--no-times", action="store_true", help="measure no times: what the file has")
    parser.add_argument("--no-memory", action="store_true", help="measure no memory: what the file has")
    parser.add_argument("--list", action="store_true", help="print the cases' names and end")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the file that keeps the rows")
    parser.add_argument("--markdown", type=Path, help=f"writes the tables between the marks {report.marks(SECTION)}")
    parser.add_argument("--plot", type=Path, help="PNG of time and memory against batch size")


def run(arguments: argparse.Namespace) -> None:
    chosen = {
        case: backends
        for case, backends in standard.cases().items()
        if not arguments.only or any(words in case.name() for words in arguments.only)
    }
    if arguments.list:
        print("\n".join(case.name() for case in chosen))
        return
    torch.set_num_threads(arguments.threads)
    results = load_or_new(arguments.json, machine.describe(), arguments.repeats)
    console = report.console()
    console.print(report.describe(results.machine))
    for case, backends in chosen.items():
        if not arguments.no_times and (arguments.again or not results.of(case)):
            results.add(measure.time_case(case, backends, arguments.repeats))
        if not arguments.no_memory:
            measure.measure_memory(results.of(case), again=arguments.again)
        if results.of(case) and not (arguments.no_times and arguments.no_memory):
            console.print(report.case_table(case, results.of(case)))
        if arguments.json:
            results.save(arguments.json)
    console.print(target_table(results))
    if arguments.markdown:
        report.write_section(arguments.markdown, SECTION, markdown(results))
    if arguments.plot:
        plot.draw(drawn_rows(results), arguments.plot, report.describe(results.machine))


def target_rows(results: Results) -> list[list[str]]:
    return [[target.work, target.wanted, *target.measured(results)] for target in standard.targets()]


def target_table(results: Results) -> Table:
    table = Table(title=f"targets (least of {results.repeats} interleaved runs)", title_justify="left")
    for header in HEADERS:
        table.add_column(header)
    for row in target_rows(results):
        table.add_row(*row)
    return table


def drawn_rows(results: Results) -> list[measure.Row]:
    plain = [op.at(case.batch) for op in standard.OPS for case in results.cases()]
    return [row for case in dict.fromkeys(plain) for row in results.of(case)]


def markdown(results: Results) -> str:
    order = list(standard.cases())
    measured = sorted((case for case in results.cases() if case in order), key=order.index)
    parts = [
        f"Measured on: {report.describe(results.machine)}. Times are the least of {results.repeats} interleaved runs "
        "in milliseconds; *spread* is the slowest run over the least, less one.",
        "### Targets",
        report.markdown_table(HEADERS, target_rows(results)),
        "### All cases",
        report.markdown_cases([(case, results.of(case)) for case in measured]),
    ]
    return "\n\n".join(parts)
