"""SAELens's own list of releases, of the installed package: it is read whole, and every id leads somewhere.

And what we push, that package loads from the Hub as the card says.
"""

import importlib.util
import os
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import UserError, hub, releases
from tests.conftest import make_sae
from tests.loopback_hub import environment, point_at, running
from tests.peers import agree

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
NOT_READ = {
    "connor_rob_hook_z", "deepseek_r1", "goodfire", "mntss_clt_layer_transcoder", "mwhanna_transcoder", "qwen_scope",
    "temporal",
}  # fmt: skip


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """The list, with nothing else of that environment in reach."""
    packages = sorted(agree.python("saelens").parents[1].glob("lib/python3*/site-packages/sae_lens"))
    if not packages:
        pytest.skip("no environment of SAELens: build it with experiments/bench/peers.sh")
    (tmp_path / "sae_lens").symlink_to(packages[0])
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None and spec.submodule_search_locations
    return releases._releases(tmp_path / "sae_lens" / "pretrained_saes.yaml")


def test_every_id_of_every_release_resolves_or_its_layout_is_refused(listed):
    refused, read = {}, 0
    for name, given in listed.items():
        for sae_id in given["saes"]:
            try:
                found = releases.find(name, sae_id)
            except UserError as error:
                assert "which is not read" in str(error), error
                refused[name] = given["conversion_func"]
                break
            assert found is not None and found.repo.count("/") == 1
            assert hub.inner(found.folder) == found.folder
            read += 1
    assert set(refused.values()) == NOT_READ
    assert len(listed) - len(refused) > 130 and read > 12_000


def test_what_the_list_says_beyond_the_files_is_what_we_honour(listed):
    """A new key there would be a fact of the weights that is passed over."""
    known = {"dataset_path", "model_from_pretrained_kwargs", "normalize_activations", "norm_scaling_factor",
             "neuronpedia_id"}  # fmt: skip
    for name, given in listed.items():
        if given["conversion_func"] not in NOT_READ:
            assert set(given.get("config_overrides") or {}) <= known, name
    found = releases.find("gemma-2b-res-jb", "blocks.12.hook_resid_post")
    assert found is not None
    assert found.overrides == {"neuronpedia_id": "gemma-2b/12-res-jb", "norm_scaling_factor": 0.21381938399317255}


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_what_we_push_saelens_loads_by_the_lines_of_the_card(architecture, monkeypatch, tmp_path):
    if not agree.python("saelens").exists():
        pytest.skip("no environment of SAELens: build it with experiments/bench/peers.sh")
    sae, x = make_sae(architecture=architecture, hook_name="blocks.2.hook_resid_post"), torch.randn(9, 32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    with running() as loopback:
        point_at(loopback, monkeypatch, tmp_path / "cache")
        sae.push_to_hub("user/saes", "layer_2/small")
        card = loopback.files("user/saes")["layer_2/small/README.md"].decode()
        lines = next(code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "sae_lens" in code)
        script = f"""{lines}
from safetensors.torch import load_file, save_file
x = load_file("x.safetensors")["x"]
save_file({{"codes": sae.encode(x).detach(), "recon": sae(x).detach()}}, "out.safetensors")
"""
        subprocess.run(
            [agree.python("saelens"), "-c", script],
            cwd=tmp_path, check=True, capture_output=True,
            env={**os.environ, **environment(loopback, tmp_path / "their")},
        )  # fmt: skip
    theirs = load_file(tmp_path / "out.safetensors")
    assert agree.difference(sae.encode(x), theirs["codes"]) <= agree.BAR
    assert agree.difference(sae(x), theirs["recon"]) <= agree.BAR
