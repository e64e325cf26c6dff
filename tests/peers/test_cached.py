"""Activations that SAELens's own CacheActivationsRunner cached, of the real host, are imported and trained on here."""

import itertools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae import Recipe, files
from sae.autoencoder import SAE
from sae.documents import documents
from sae.errors import UserError
from sae.harvesting import harvest
from sae.host import Host
from sae.run import train
from tests.peers.agree import python

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

HOOK, CONTEXT, ROWS = "blocks.5.hook_resid_post", 64, 64


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    peer = python("saelens")
    if not peer.exists():
        pytest.skip("SAELens's environment is not built: experiments/bench/peers.sh")
    work = tmp_path_factory.mktemp("cached")
    lines = (json.dumps({"text": one.text}) + "\n" for one in itertools.islice(documents("bundled"), 100))
    (work / "texts.jsonl").write_text("".join(lines))
    (model,) = (path for path in (files.cache_dir() / "hosts").iterdir() if path.name.startswith("SmolLM2"))
    script = Path(__file__).with_name("cache_saelens.py")
    words = [peer, script, model, work / "texts.jsonl", work / "acts", "model.layers.5", 576, CONTEXT, ROWS]
    said = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    return work / "acts"


def given(out, folder, hook=HOOK):
    recipe = Recipe(out=str(out / "run"))
    return replace(
        recipe,
        host=replace(recipe.host, hook=hook),
        text=replace(recipe.text, context=CONTEXT),
        activations=replace(
            recipe.activations,
            store=str(out / "store"),
            cached_activations_path=str(folder),
            dtype="float32",
            min_sequences=10,
        ),
        sae=replace(recipe.sae, d_sae=256, k=8),
        training=replace(recipe.training, tokens=8_000, batch=512),
        evaluation=replace(recipe.evaluation, tokens=500, ce_tokens=100),
    )


def test_what_saelens_cached_is_what_the_host_computes(host, folder, tmp_path):
    store = harvest(given(tmp_path, folder), host=host, progress=False)
    assert store.n_rows == ROWS * CONTEXT
    for block in store.blocks(HOOK):
        rows = block.tokens.view(-1, CONTEXT)
        acts = host.activations(rows.long(), [HOOK])[HOOK].flatten(0, 1)
        difference = float((block.acts[HOOK] - acts)[block.mask].abs().max() / acts[block.mask].abs().max())
        assert difference <= 1e-5, difference
        assert not bool(block.mask[torch.isin(block.tokens, torch.tensor(sorted(host.special_ids)))].any())


def test_an_sae_is_trained_from_it(host, folder, tmp_path):
    train(given(tmp_path, folder), host=host, progress=False)
    about = SAE.load(tmp_path / "run" / "sae").cfg.metadata
    assert (about.hook_name, about.host_fingerprint) == (HOOK, host.fingerprint)


def test_a_layer_that_was_not_cached_is_one_line(host, folder, tmp_path):
    with pytest.raises(UserError, match=r"has no blocks.6.hook_resid_post \(its columns are model.layers.5\)"):
        harvest(given(tmp_path, folder, "blocks.6.hook_resid_post"), host=host, progress=False)


def test_a_host_in_bfloat16_takes_what_saelens_cached_in_float32(folder, tmp_path):
    store = harvest(given(tmp_path, folder), host=Host.load("smollm2", dtype="bfloat16"), progress=False)
    assert store.n_rows == ROWS * CONTEXT
