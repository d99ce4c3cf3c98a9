"""Tables for people: on the terminal (rich) and in Markdown."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cases import Case
from bench.files import UnusableFile
from bench.measure import Row

HEADERS = ("backend", "forward", "fwd + bwd", "median", "spread", "× eager", "/ floor", "extra MB", "error")
SECOND_ORDER_HEADERS = ("backend", "double backward", "median", "spread", "× eager", "extra MB", "error")


def console() -> Console:
    return Console(width=None if Console().is_terminal else 150)


def cells(row: Row) -> list[str]:
    """The row's columns after the backend's name; those of a backend without a time say why."""
    times = [row.double_backward] if row.case.order == 2 else [row.forward, row.forward_backward]
    headline = row.headline() or {}
    found = [milliseconds(part["least"] if part else None) for part in times]
    found += [milliseconds(headline.get("median")), percent(headline.get("spread")), ratio(row.speedup)]
    if row.case.order == 1:
        found.append(ratio(row.floor_ratio))
    return [*found, megabytes(row.peak_bytes), "" if row.error is None else f"{row.error:.0e}"]


def case_table(case: Case, rows: list[Row]) -> Table:
    headers = HEADERS if case.order == 1 else SECOND_ORDER_HEADERS
    headers = [header.replace("eager", case.base()) for header in headers]
    table = Table(title=f"{case.name()} (least of the runs, ms)", title_justify="left", caption_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        if row.status == "ok":
            table.add_row(row.backend, *cells(row))
    notes = [f"{row.backend}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]
    notes += [f"{row.backend}: memory not measured: {row.memory_reason}" for row in rows if row.memory_reason]
    table.caption = "\n".join(notes)
    return table


def rich_table(headers: list[str], rows: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_cases(cases: list[tuple[Case, list[Row]]]) -> str:
    """One Markdown table for all first-order cases, one for the second-order ones."""
    parts = []
    for order, headers in ((1, HEADERS), (2, SECOND_ORDER_HEADERS)):
        chosen = [(case, rows) for case, rows in cases if case.order == order]
        if not chosen:
            continue
        lines = [_markdown_row(["work", *headers]), _markdown_row(["---", "---", *["---:"] * (len(headers) - 1)])]
        for case, rows in chosen:
            for row in rows:
                found = (
                    cells(row) if row.status == "ok" else [f"{row.status}: {row.reason}", *[""] * (len(headers) - 2)]
                )
                lines.append(_markdown_row([case.name(), row.backend, *found]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_markdown_row(headers), _markdown_row(["---"] * len(headers)), *map(_markdown_row, rows)])


def _markdown_row(found: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in found) + " |"


def marks(section: str) -> tuple[str, str]:
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def write_section(path: Path, section: str, content: str) -> None:
    """Replaces what stands between the section's two marks; the rest of the file is written by hand."""
    text = path.read_text()
    begin, end = marks(section)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UnusableFile(f"{path} must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}")


def describe(machine: dict) -> str:
    sets = (
        ", ".join(name for name, present in machine["instruction_sets"].items() if present) or "none of those asked for"
    )
    lacking = ", ".join(name for name, present in machine["instruction_sets"].items() if not present) or "none"
    gpu = f"{machine['gpu']} (CUDA {machine['cuda']}), " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; has {sets}; lacks {lacking}; "
        f"{machine['threads']} threads; {machine['system']}, Python {machine['python']}, "
        f"PyTorch {machine['torch']}; commit {machine['commit']}"
    )


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
