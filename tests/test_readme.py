"""The README's Python runs as it stands."""

import inspect
import operator
import re
from pathlib import Path

import pytest

import gkd_fast

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source folder")
def test_there_are_examples():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example(block):
    pytest.importorskip("torchvision")
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "gradient" in names:
        assert names["gradient"].isfinite()
    if "loss" in names:
        assert names["loss"].isfinite()


def test_the_api_table_names_what_exists():
    section = README.read_text().split("## API")[1].split("## ")[0]
    names = re.findall(r"`((?:functional\.|micro_|[A-Z])\w[\w.]*)(?:\(([^)]*)\))?`", section)
    assert len(names) > 15 and "micro_batched" in dict(names)
    for name, arguments in names:
        found = operator.attrgetter(name)(gkd_fast)
        known = inspect.signature(found).parameters
        assert all(argument in known for argument in arguments.split(", ") if argument), name
