"""Top examples are those of SAEDashboard's own runner on the same SAE and tokens (experiments/bench/dashboard.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venvs" / "dashboard" / "bin" / "python"
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


def test_top_examples_of_a_hundred_features_are_those_of_saedashboard(tmp_path):
    """Same rows and positions in the same order but for near ties, activations as far as it keeps them (4 decimals)."""
    if not PYTHON.exists():
        pytest.skip("SAEDashboard's environment is not built: experiments/bench/peers.sh dashboard")
    script = ROOT / "experiments" / "bench" / "dashboard.py"
    words = ["--tokens", "5000", "--features", "100", "--json", str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["rows"]
    assert row["features"] == 100 and result["lists_too_short"] == 0
    assert row["differences"] == row["near_ties"], done.stdout[-2000:]
    assert row["same_order"] >= 95
    assert row["largest_difference"] < 1e-3
