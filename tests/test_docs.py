"""The documents' Python runs as it stands, each block alone."""

import re
import shlex
import socket
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = [
    pytest.param(path, code, id=f"{path.relative_to(DOCS)}-{number}")
    for path in sorted(DOCS.rglob("*.md"))
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.skipif(not DOCS.exists(), reason="the tests run without the source folder")
def test_there_are_examples():
    assert len(BLOCKS) >= 10


@pytest.mark.parametrize(("path", "code"), BLOCKS)
def test_example(path, code, monkeypatch, tmp_path):
    for name in re.findall(
        r"^(?:from|import) (torchvision|sklearn|lightning|transformers|accelerate)", code, re.MULTILINE
    ):
        pytest.importorskip(name)
    if "gkd_fast.train" in code:
        pytest.importorskip("sklearn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))  # as torchrun does
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, str(path), "exec"), names)
    assert names.get("loss") is None or names["loss"].isfinite()


def commands() -> list:
    """Every line of the documents' blocks that calls the driver, with the values that a shell would put in."""
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"] if DOCS.exists() else []
    found = []
    for page in sorted(pages):
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *gkd-train .*$", text, flags=re.MULTILINE):
            line = re.sub(r"\$method\b", "kd", line)
            found.append(pytest.param(re.sub(r"\$\w+", "64", line), id=f"{page.name}-{len(found)}"))
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_the_driver_takes(line, monkeypatch):
    pytest.importorskip("jsonargparse")
    from gkd_fast.train import cli

    monkeypatch.chdir(DOCS.parent)
    command, config, weights = cli.read_arguments(shlex.split(line, comments=True)[1:])
    assert command in line and (weights is not None) == (command == "evaluate")
    assert command != "student" or config.method in line
