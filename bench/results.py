"""Rows kept in a JSON file, so that a long table can be measured in pieces on one machine."""

from dataclasses import asdict
from pathlib import Path

from bench import files, machine
from bench.cases import Case
from bench.measure import Row

SCHEMA = 1
SAME_MACHINE = ("cpu", "cores", "gpu", "threads", "torch")


class Results:
    """Rows by case and backend; the last measurement of a case replaces an earlier one."""

    def __init__(self, described: dict, repeats: int):
        self.machine = described
        self.repeats = repeats
        self.rows: dict[tuple[Case, str], Row] = {}

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            row.commit = machine.commit()
            self.rows[row.case, row.backend] = row

    def row(self, case: Case, backend: str) -> Row | None:
        return self.rows.get((case, backend))

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(case for case, _ in self.rows))

    def of(self, case: Case) -> list[Row]:
        return [row for (key, _), row in self.rows.items() if key == case]

    def save(self, path: Path) -> None:
        rows = [asdict(row) for row in self.rows.values()]
        files.write(path, SCHEMA, {"machine": self.machine, "repeats": self.repeats, "rows": rows})


def load(path: Path) -> Results:
    content = files.read(path, SCHEMA)
    results = Results(content["machine"], content["repeats"])
    for row in content["rows"]:
        case = Case(**row.pop("case"))
        results.rows[case, row["backend"]] = Row(case, **row)
    return results


def load_or_new(path: Path | None, described: dict, repeats: int) -> Results:
    """The file's results if there is one, an empty set otherwise; figures of two machines are never mixed."""
    if path is None or not path.exists():
        return Results(described, repeats)
    results = load(path)
    for key in SAME_MACHINE:
        if results.machine.get(key) != described.get(key):
            there, here = results.machine.get(key), described.get(key)
            raise files.UnusableFile(f"{path} was measured with {key} {there!r}, here it is {here!r}")
    results.machine = described
    results.repeats = min(repeats, results.repeats)
    return results
