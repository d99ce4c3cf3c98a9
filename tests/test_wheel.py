"""The sources as they are packed, and the pure wheel made of them, as a user without a compiler gets it: in an
environment that has nothing of the package but this."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gkd_fast

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests run without the source folder")

USE = """
import sys, warnings
import torch
import gkd_fast
from gkd_fast import functional

assert gkd_fast.__file__.startswith(sys.prefix), gkd_fast.__file__
torch.manual_seed(0)
student, teacher = torch.randn(40, 24, requires_grad=True), torch.randn(40, 16)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    losses = functional.relation_kl(student, teacher, backend=sys.argv[1])
    losses.mean().backward()
    criterion = gkd_fast.GraphKDLoss(24, 16, num_classes=3, backend=sys.argv[1])
    loss = criterion(student, teacher, torch.arange(40) % 3)
expected = functional.relation_kl(student.detach().double(), teacher.double(), backend="reference")
torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
assert student.grad.isfinite().all() and student.grad.any() and loss.isfinite()
print(*(str(warning.message) for warning in said))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed sources, of a copy, since packing and building write beside what they read."""
    folder = tmp_path_factory.mktemp("sources")
    built = shutil.ignore_patterns("*.so", "_C.torch-version.txt", "__pycache__", "*.pyc")
    for name in "bench configs csrc docs gkd_fast kernels tests".split():
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, check=True, capture_output=True)
    (archive,) = (folder / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def environment(packed, tmp_path_factory):
    """The wheel, and an interpreter whose gkd_fast it is; other packages are those that the tests run with."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, packed]
    subprocess.run(build, check=True, env={**os.environ, "GKD_FAST_NO_EXTENSION": "1"}, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    here = [path for path in sys.path if path.endswith("-packages")]
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(here))
    return wheel, python


def run(environment, tmp_path, *arguments, **variables):
    names = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [environment[1], *arguments], cwd=tmp_path, env={**names, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packed_sources_are_whole(packed):
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path for folder in ("configs", "csrc", "tests") for path in (ROOT / folder).rglob("*.*")]
    wanted = {str(path.relative_to(ROOT)) for path in wanted if path.is_file() and "__pycache__" not in path.parts}
    assert len(wanted) > 100 and wanted <= names, wanted - names
    assert {"Makefile", "constraints.txt", "gkd_fast/kernels/relation_kl/tiles.py", "tests/conftest.py"} <= names


def test_one_wheel_serves_every_machine_and_has_all_but_the_extension(environment):
    wheel = environment[0]
    assert wheel.name == f"gkd_fast-{gkd_fast.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 500_000
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.endswith((".so", ".cpp", ".pyc")) or name.startswith("tests")]
    packaged = {f"gkd_fast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    packaged |= {f"gkd_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(packaged) > 30 and packaged <= names
    assert {"gkd_fast/py.typed", "gkd_fast/reference.py", "gkd_fast/train/cli.py"} <= names


def test_it_computes_with_the_reference_and_says_what_would_be_faster(environment, tmp_path):
    said = run(environment, tmp_path, "-c", USE, "auto")
    assert "the slow reference" in said and "the C++ extension is not built" in said
    assert "--no-build-isolation" in said and "`make wheel`" in said


def test_its_triton_kernels_run(environment, tmp_path):
    assert not run(environment, tmp_path, "-c", USE, "triton", TRITON_INTERPRET="1").strip()


def test_its_driver_starts(environment, tmp_path):
    pytest.importorskip("jsonargparse")
    assert "compare" in run(environment, tmp_path, environment[1].with_name("gkd-train"), "--help")


def test_type_checkers_find_an_editable_install(packed, environment, tmp_path):
    shutil.unpack_archive(packed, tmp_path)
    (source,) = tmp_path.iterdir()
    shutil.copytree(environment[1].parents[1], tmp_path / "venv", symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", tmp_path / "venv/bin/python", "install", "--quiet", "--no-deps"]
    without = {**os.environ, "GKD_FAST_NO_EXTENSION": "1"}
    install += ["--no-build-isolation", "--editable", source]
    subprocess.run(install, check=True, env=without, capture_output=True)
    (found,) = (tmp_path / "venv/lib").glob("python*/site-packages/__editable__*")
    assert found.suffix == ".pth" and found.read_text().strip() == str(source), "a path, which they read, not a finder"
