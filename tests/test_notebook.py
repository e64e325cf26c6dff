"""The Golden Gate notebook runs from its first cell to its last, and says what its prose says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PATH = ROOT / "experiments" / "golden_gate.ipynb"


def cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def said(cell):
    """What a cell shows as text."""
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def checked(notebook):
    """Every cell ran in order and none failed; the plain answer has no bridge, the steered one has."""
    ran = cells(notebook)
    assert [cell.execution_count for cell in ran.values()] == list(range(1, len(ran) + 1))
    assert not [out for cell in ran.values() for out in cell.outputs if out.output_type == "error"]
    plain, steered = re.split(r"── 2202.*──\n", said(ran["compare-run"]))
    assert "bridge" not in plain.lower() and "bridge" in steered.lower()
    assert "rgba(255,140,0" in ran["compare-run"].outputs[0].data["text/html"]
    assert "bridge" in said(ran["steer-run"]).lower()
    (shown,) = ran["sliders-run"].outputs
    assert "application/vnd.jupyter.widget-view+json" in shown.data


@pytest.fixture
def kernel_of_this_tree(monkeypatch, tmp_path):
    """Short answers, and no history or profile in the user's home."""
    for name, value in {"PYTHONPATH": str(ROOT), "GOLDENGATE_TOKENS": "8", "OMP_NUM_THREADS": "1",
                        "IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def test_it_runs_and_the_steered_answer_speaks_of_a_bridge(kernel_of_this_tree):
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": PATH.parent}})
    checked(client.execute())


def test_the_outputs_that_it_ships_with_are_whole_and_small_and_of_no_machine():
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 100_000 and not re.search(r"/(home|root|work|tmp|Users)/|site-packages", text)
    checked(nbformat.read(PATH, as_version=4))
