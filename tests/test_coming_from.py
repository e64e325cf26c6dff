"""Every block of docs/coming-from.md is run, in order, on SAEs that the peers' own packages wrote."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.documents import documents
from tests.activations.test_cached import write
from tests.loopback_hub import running
from tests.peers.agree import FIXTURES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(^<!-- slow -->\n)?^```(python|console)\n(.*?)^```", re.S | re.M)
BLOCKS = [(bool(slow), kind, text) for slow, kind, text in BLOCK.findall(PAGE)]
THEIRS = {
    "saelens": "saelens-topk-scaled-checkpoint",
    "layers.10": "sparsify-topk",
    "trainer_0": "dictionary_learning-BatchTopKSAE",
}
GEMMA = "layer_20/width_16k/average_l0_71"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's reader is: a clone's checkpoints, and folders of peers."""
    here = tmp_path_factory.mktemp("coming")
    for name in ("checkpoints", "configs"):
        shutil.copytree(ROOT / name, here / name)
    for name, case in THEIRS.items():
        shutil.copytree(FIXTURES / case / "sae", here / "theirs" / name)
    return here


@pytest.fixture(scope="module")
def cached(folder, host):
    """Some rows in the shape in which SAELens's CacheActivationsRunner writes them (tests/peers has one of its own)."""
    ids = [
        i for document in itertools.islice(documents("bundled"), 200) for i in host.tokenizer(document.text).input_ids
    ]
    tokens = torch.tensor(ids[: 200 * 64], dtype=torch.int32).view(200, 64)
    hook = "blocks.12.hook_resid_post"
    acts = torch.cat([host.activations(some.long(), [hook])[hook] for some in tokens.split(20)])
    write(folder / "theirs" / "cached", {hook: acts}, tokens)


def run(command, folder, endpoint):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(folder / "cache" / endpoint[-5:])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_page_has_blocks_of_both_kinds():
    assert {kind for _, kind, _ in BLOCKS} == {"python", "console"} and len(BLOCKS) >= 5


@pytest.mark.timeout(900)
@pytest.mark.parametrize("slowly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_blocks_of_the_page_run_in_order(folder, slowly, request):
    """The Hub is one on the loopback with a file of Gemma Scope's layout."""
    if slowly:
        request.getfixturevalue("cached")
    python = ""
    with running() as hub:
        content = (FIXTURES / "gemma_scope-res" / "sae" / "params.npz").read_bytes()
        hub.add("google/gemma-scope-2b-pt-res", {f"{GEMMA}/params.npz": content})
        for slow, kind, text in BLOCKS:
            if slow > slowly:
                continue
            if kind == "python":
                python += text
                continue
            for line in re.findall(r"^\$ (.*)", text, re.M):
                run(["bash", "-euo", "pipefail", "-c", line], folder, hub.url)
        run([sys.executable, "-W", "error::UserWarning:sae", "-c", python], folder, hub.url)
        assert f"{GEMMA}/params.npz" in hub.downloads()
