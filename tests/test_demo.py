"""The demo on the real host: everything is real, nothing is recorded."""

import pytest

from sae import cli, files
from sae.autoencoder import SAE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_ends_with_a_feature_that_changes_the_answer(tmp_path, capsys):
    out, report = tmp_path / "demo", tmp_path / "demo.json"
    assert cli.main(["demo", "--out", str(out), "--json", str(report)]) == 0
    result = files.read_json(report)
    assert result["tokens_harvested"] >= 100_000
    assert 0 < result["fvu"] < 0.35
    assert SAE.load(out / "sae").cfg.d_sae >= 4096
    assert result["plain"] != result["steered"]
    assert "bridge" in result["steered"].lower() or "golden gate" in result["steered"].lower()
    assert result["shipped"]["answer"] != result["plain"]
    assert set(result["seconds"]) == {"load", "harvest", "train", "evaluate", "find", "steer"}
    said = capsys.readouterr().out
    assert all(f"sae {verb}" in said for verb in ("find", "show", "steer"))
    assert cli.main(["demo", "--out", str(out)]) == 0  # what is done is not done again
