"""Activations are in raw, normalised or token units; a strength in multiples of a maximum means the same in each."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from sae import steer
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.run import convert_layout, info
from tests.conftest import make_sae
from tests.peers.agree import FIXTURES

HOOK = "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    "case,units,factor",
    [
        ("saelens-standard", "unknown", None),
        ("saelens-standard-scaled-checkpoint", "normalised", 0.3),
        ("saelens-topk-scaled-checkpoint", "raw", 0.3),  # decoder norms are folded: an activation is a length
        ("saelens-batchtopk-unranked-scaled-checkpoint", "normalised", 0.3),
        ("saelens-topk-whitened-checkpoint", "normalised", None),
        ("saelens-standard-layer_norm", "token", None),
        ("sparsify-topk", "raw", 1.0),
        ("dictionary_learning-BatchTopKSAE", "raw", None),
    ],
)
def test_an_sae_knows_its_units_also_after_it_was_saved_here(case, units, factor, tmp_path):
    about = SAE.load(FIXTURES / case / "sae").cfg.metadata
    assert (about.units, about.norm_factor, about.layout) == (units, factor, case.partition("-")[0])
    SAE.load(FIXTURES / case / "sae").save(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").cfg.metadata == about
    assert json.loads((tmp_path / "sae" / "goldengate.json").read_text())["units"] == units
    assert info(tmp_path / "sae")["units"] == units


@pytest.mark.parametrize("kind,units", [("expected_average_only_in", "normalised"), ("none", "raw")])
def test_of_a_finished_sae_its_training_config_says_the_units(tmp_path, kind, units):
    folder = shutil.copytree(FIXTURES / "saelens-standard" / "sae", tmp_path / "sae")
    (folder / "runner_cfg.json").write_text(json.dumps({"sae": {"normalize_activations": kind}}))
    about = SAE.load(folder).cfg.metadata
    assert (about.units, about.norm_factor) == (units, None)


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning", "saelens"])
def test_a_conversion_keeps_the_units_and_tells_what_its_users_do_not_see(tmp_path, to):
    made = convert_layout(FIXTURES / "saelens-topk-unranked-scaled-checkpoint" / "sae", tmp_path / "sae", to)
    about = SAE.load(tmp_path / "sae").cfg.metadata
    assert (about.units, about.norm_factor) == ("normalised", 0.3)
    assert any("units" in line for line in made["lost"]) == (to != "saelens")


def twin(sae, scale):
    """The same SAE with activations of x·scale, as SAELens folds one."""
    facts, tensors = sae.facts()
    tensors |= {"W_enc": tensors["W_enc"] * scale, "b_enc": tensors["b_enc"] * scale}
    tensors |= {"W_dec": tensors["W_dec"] / scale}
    other = SAE.from_facts(replace(facts, threshold=facts.threshold and facts.threshold * scale), tensors, HOOK)
    other.stats = replace(sae.stats, max_act=sae.stats.max_act * scale, p999=sae.stats.p999 * scale)
    return other


@pytest.mark.parametrize("dials", [{3: "2x"}, {3: "+=1.5x", 7: "0x"}, {5: "*=3"}])
def test_a_strength_in_maxima_steers_the_same_in_any_units(tiny_host, dials):
    sae = make_sae(architecture="relu", hook_name=HOOK)
    tokens = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = tiny_host.logits(tokens)
    with steer(tiny_host, sae, dials):
        raw = tiny_host.logits(tokens)
    with steer(tiny_host, twin(sae, 0.3), dials):
        other = tiny_host.logits(tokens)
    assert not torch.equal(raw, plain)
    torch.testing.assert_close(raw, other, rtol=1e-4, atol=1e-4)


def test_without_statistics_loading_says_that_index_must_run_and_maxima_are_refused(tiny_host, caplog):
    with caplog.at_level(logging.WARNING, logger="sae"):
        sae = SAE.load(FIXTURES / "saelens-standard" / "sae")
    assert "no feature statistics" in caplog.text and "run `sae index` on it first" in caplog.text
    with pytest.raises(UserError, match="sae index"):
        steer(tiny_host, replace_host(sae), {3: "2x"})


def replace_host(sae):
    """Of the tiny host's width, still without statistics."""
    other = make_sae(hook_name=HOOK, layout=sae.cfg.metadata.layout)
    other.stats = None
    return other


@pytest.mark.parametrize("name", ["HookedSAETransformer", "SparseCoder", "load_dictionary", "run_evals"])
def test_a_name_of_a_peer_names_ours(name):
    import sae

    with pytest.raises(ImportError, match="Here it is"):
        exec(f"from sae import {name}")
    with pytest.raises(ImportError, match="Here it is"):
        getattr(sae, name)
