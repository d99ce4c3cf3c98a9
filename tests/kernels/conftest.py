"""Kernels are interpreted or compiled, in processes of their own: ``TRITON_INTERPRET`` decides at import."""

import os
from pathlib import Path

import pytest

from gkd_fast.kernels.common import plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        if ("interpreted" in item.path.parts) != INTERPRETED:
            reason = "runs in the interpreter, with" if not INTERPRETED else "compiles kernels, without"
            item.add_marker(pytest.mark.skip(reason=f"{reason} TRITON_INTERPRET=1; make test does both"))


@pytest.fixture(autouse=True)
def own_plans():
    """Plans of a test follow from the constants that it sets."""
    plan.forget()
    yield
    plan.forget()
