"""``python -m gkd_fast.warm``, and what a step launches and compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of a step of two stages each by its graph, docs/developers/kernels.md; the first step looks at diagnostics too.
OWN_NODE = "neighbors=None, self_weight=None"
MOST_COMPILED_AND_LAUNCHED = {"": (12, 14), OWN_NODE: (13, 13)}

# Launches of a step and kernels that a first step compiles, of three stages each by their graphs
# (docs/developers/gpu.md): 128 wide at B = 64 in float32 and at 300 under autocast; of mixed widths at 64 and 300 under
# autocast.
MOST_OF_THREE_STAGES = {
    "": ((14, 10), (30, 23), (14, 12), (39, 25)),
    OWN_NODE: ((13, 11), (30, 23), (13, 13), (37, 24)),
}

STAGES = "--stages=16,24 --teacher-stages=24,32 --embed-dim=32"

STEP = """
import warnings
warnings.simplefilter("ignore")
import torch
from gkd_fast import GraphKDLoss, kernels
from gkd_fast.kernels.common.offline import offline

kernels.register("CPU")
with offline("sm_90") as driver:
    criterion = GraphKDLoss([16, 24], [24, 32], num_classes=7, embed_dim=32, backend="triton", **dict(FORM))
    students = [torch.randn(40, w, requires_grad=True) for w in (16, 24)]
    teachers = [torch.randn(40, w) for w in (24, 32)]
    for _ in range(2):
        driver.launched.clear()
        criterion(students, teachers, torch.randint(0, 7, (40,))).backward()
    print(len(driver.compiled), len(driver.launched))
"""


def run(*arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", MOST_COMPILED_AND_LAUNCHED)
def test_a_step_after_warming_compiles_nothing(tmp_path, form):
    """And its kernels are few: those that a first step compiles, and a step's launches, forward and backward."""
    given = [f"--{option.replace('_', '-')}".replace("None", "none") for option in form.split(", ") if option]
    told = run("-m", "gkd_fast.warm", "--arch=sm_90", *STAGES.split(), "--batch", "40", *given, cache=tmp_path)
    before = files(tmp_path)
    assert len([path for path in before if path.suffix == ".cubin"]) == int(told.split()[0])
    compiled, launched = map(int, run("-c", STEP.replace("FORM", form), cache=tmp_path).split())
    assert files(tmp_path) == before
    most_compiled, most_launched = MOST_COMPILED_AND_LAUNCHED[form]
    assert compiled == int(told.split()[0]) <= most_compiled
    assert launched <= most_launched


COUNT = """
import warnings
warnings.simplefilter("ignore")
import torch
from gkd_fast import GraphKDLoss, kernels
from gkd_fast.kernels.common.launcher import Launch
from gkd_fast.kernels.common.offline import offline

kernels.register("CPU")
launched, variants = [], set()

def call(self, grid, *arguments):
    bind, _ = self._of_device.get(0) or self._prepare(0)
    launched.append(self.kernel.__name__)
    variants.add((self, tuple(bind(*arguments)[1])))

Launch.__call__ = call
same, mixed = ([128] * 3, [128] * 3), ([64, 128, 256], [256, 512, 1024])
with offline("sm_90"):
    for widths, rows, autocast in ((same, 64, False), (same, 300, True), (mixed, 64, True), (mixed, 300, True)):
        criterion = GraphKDLoss(*widths, num_classes=7, embed_dim=128, backend="triton", **dict(FORM))
        students = [torch.randn(rows, width, requires_grad=True) for width in widths[0]]
        teachers = [torch.randn(rows, width) for width in widths[1]]
        variants.clear()
        for _ in range(2):
            launched.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = criterion(students, teachers, torch.randint(0, 7, (rows,)))
            loss.backward()
        print(len(launched), len(variants))
"""


@pytest.mark.parametrize("form", MOST_OF_THREE_STAGES)
def test_stages_and_pairs_share_their_launches_and_kernels(tmp_path, form):
    found = [
        tuple(map(int, line.split())) for line in run("-c", COUNT.replace("FORM", form), cache=tmp_path).splitlines()
    ]
    for (launched, compiled), (most_launched, most_compiled) in zip(found, MOST_OF_THREE_STAGES[form], strict=True):
        assert launched <= most_launched and compiled <= most_compiled, found
