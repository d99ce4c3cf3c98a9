"""The examples run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"timm_swin.py": "timm", "lightning_module.py": "lightning"}
SCRIPTS = {
    "loop.py": "student",
    "meta.py": "student",
    "timm_swin.py": "step 1: loss",
    "lightning_module.py": "train/node",
}


def test_all_are_short_and_known():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SCRIPTS, "digits.py"}
    assert all(len((EXAMPLES / name).read_text().splitlines()) < 60 for name in scripts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(name, "sklearn"), reason="needs the package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "2"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SCRIPTS[name] in capsys.readouterr().out


def test_notebook():
    nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs the package nbformat")
    pytest.importorskip("ipykernel", reason="needs the package ipykernel")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.create_kernel_manager()
    # The interpreter that runs the tests, whatever kernels are installed.
    client.km.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute(cleanup_kc=True)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("student_neighbors" in str(output) for output in outputs)
