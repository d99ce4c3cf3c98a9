"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source folder")
def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example(block):
    pytest.importorskip("torchvision")
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "gradient" in names:
        assert names["gradient"].isfinite()
    if "loss" in names:
        assert names["loss"].isfinite()
