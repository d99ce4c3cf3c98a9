"""``python -m gkd_fast.warm``, and what a step launches and compiles."""

import os
import subprocess
import sys
from pathlib import Path

# Of a step of two stages each, docs/developers/kernels.md; the first step looks at diagnostics too.
MOST_COMPILED, MOST_LAUNCHED = 21, 13

# Of three stages each above what the kernels of small batches take.
MOST_OF_A_LARGE_BATCH = 32

STAGES = "--stages=16,24 --teacher-stages=24,32 --embed-dim=32"

STEP = """
import warnings
warnings.simplefilter("ignore")
import torch
from gkd_fast import GraphKDLoss, kernels
from gkd_fast.kernels.common.offline import offline

kernels.register("CPU")
with offline("sm_90") as driver:
    criterion = GraphKDLoss([16, 24], [24, 32], num_classes=7, embed_dim=32, backend="triton")
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


def test_a_step_after_warming_compiles_nothing(tmp_path):
    """And its kernels are few: those that a first step compiles, and a step's launches, forward and backward."""
    told = run("-m", "gkd_fast.warm", "--arch=sm_90", *STAGES.split(), "--batch", "40", cache=tmp_path)
    before = files(tmp_path)
    assert len([path for path in before if path.suffix == ".cubin"]) == int(told.split()[0])
    compiled, launched = map(int, run("-c", STEP, cache=tmp_path).split())
    assert files(tmp_path) == before
    assert compiled == int(told.split()[0]) <= MOST_COMPILED
    assert launched <= MOST_LAUNCHED


COUNT = """
import warnings
warnings.simplefilter("ignore")
import torch
from gkd_fast import GraphKDLoss, kernels
from gkd_fast.kernels.common.launcher import Launch
from gkd_fast.kernels.common.offline import offline

kernels.register("CPU")
launched = []
Launch.__call__ = lambda self, grid, *arguments: launched.append(self.kernel.__name__)
with offline("sm_90"):
    criterion = GraphKDLoss([64] * 3, [64] * 3, num_classes=7, embed_dim=64, backend="triton")
    students = [torch.randn(300, 64, requires_grad=True) for _ in range(3)]
    teachers = [torch.randn(300, 64) for _ in range(3)]
    for _ in range(2):
        launched.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(students, teachers, torch.randint(0, 7, (300,)))
        loss.backward()
print(len(launched))
"""


def test_stages_and_pairs_of_a_large_batch_share_their_launches(tmp_path):
    assert int(run("-c", COUNT, cache=tmp_path)) <= MOST_OF_A_LARGE_BATCH
