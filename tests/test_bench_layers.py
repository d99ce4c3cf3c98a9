"""The imports of ``bench/``, read off its sources: they run one way."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "bench"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are no part of the installed package")


def module_names() -> dict[str, Path]:
    names = {}
    for path in FOLDER.rglob("*.py"):
        parts = path.relative_to(FOLDER.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports() -> dict[str, set[str]]:
    """The modules of ``bench`` that each of them imports, wherever in its source: at the top or in a function."""
    names = module_names()
    found = {}
    for name, path in names.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has an import relative to its folder"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {member if member in names else node.module for member in members}
        found[name] = wanted & names.keys()
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, if there are any."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for imported in sorted(graph[name]):
                if found := visit(imported, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_runs_back():
    graph = imports()
    assert len(graph) > 20 and graph["bench.measure"]  # they were read
    assert circle(graph) == []


def test_cases_and_peers_lie_at_the_bottom_and_commands_on_top():
    for name, imported in imports().items():
        if name == "bench.cases":
            assert imported == set()
        if name.startswith("bench.peers"):
            assert all(x == "bench.cases" or x.startswith("bench.peers") for x in imported), name
        if not name.startswith("bench.commands") and name != "bench.__main__":
            assert not any(x.startswith("bench.commands") for x in imported), name
