"""What peers' own packages wrote, and made of it, is what we make of it: without the peers, from small files."""

from dataclasses import replace

import pytest
import torch

from sae.autoencoder import SAE
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, load, read

CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.safetensors"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_and_reconstruction_are_the_peers(case):
    found = differences(case)
    assert max(found.values()) <= BAR, (found, expected(case)[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved_in_our_layout_and_loaded_again_nothing_has_changed(case, tmp_path):
    sae = load(case)
    again, x = SAE.load(sae.save(tmp_path / "sae")), expected(case)[0]["x"]
    assert again.cfg == sae.cfg
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))


def mistakes(facts, tensors):
    """The conventions that could be taken wrongly in this case: a name, and the SAE that would come of it."""
    norms = tensors["W_dec"].norm(dim=1, keepdim=True)
    if facts.d_out is None and facts.pursuit is None and bool(tensors["b_dec"].any()):
        yield "b_dec", replace(facts, apply_b_dec_to_input=not facts.apply_b_dec_to_input), tensors
    if facts.pursuit is None:
        yield "b_enc", facts, tensors | {"b_enc": 0 * tensors["b_enc"]}
    if "threshold" in tensors and bool((tensors["threshold"] > 0).any()):
        yield "log threshold", facts, tensors | {"threshold": tensors["threshold"].clamp_min(1e-9).log()}
    if bool(((norms - 1).abs() > 1e-3).any()):
        yield "decoder norms", facts, tensors | {"W_dec": tensors["W_dec"] / norms}
    if facts.normalize_activations != "none":
        yield "token norm", replace(facts, normalize_activations="none"), tensors
    if "W_skip" in tensors:
        yield "skip", facts, {name: tensor for name, tensor in tensors.items() if name != "W_skip"}
    if facts.pursuit is not None:
        yield "steps", replace(facts, pursuit=replace(facts.pursuit, max_iterations=2)), tensors
        yield "centre", replace(facts, apply_b_dec_to_input=False), tensors | {"b_dec": 0 * tensors["b_dec"] + 1}
    if facts.k is not None and facts.architecture != "groupmax":
        yield "k", replace(facts, k=facts.k - 1), tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_convention_taken_wrongly_would_be_noticed(case):
    facts, tensors = read(case)
    theirs = expected(case)[0]
    codes = theirs["codes"] * theirs.get("scale", torch.ones(()))
    tried = list(mistakes(facts, tensors))
    assert tried, "no convention of this case is tried"
    for name, other, changed in tried:
        sae = SAE.from_facts(other, changed, case)
        found = max(difference(sae.encode(theirs["x"]), codes), difference(sae(theirs["x"]), theirs["recon"]))
        assert found > 100 * BAR, name
