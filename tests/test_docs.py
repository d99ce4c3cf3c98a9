"""The documents' Python runs as it stands, each block alone."""

import re
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
