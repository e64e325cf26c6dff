"""What sparsify saves loads here with the same codes, and what we write in its layout its own loader reads so."""

import pytest
import torch

from sae.autoencoder import SAE
from sae.formats import sparsify
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, in_peer, made_of

CASES = sorted(path.name for path in FIXTURES.glob("sparsify-*"))
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Every kind of SAE that sparsify saves, as the committed cases but of another seed."""
    folder = tmp_path_factory.mktemp("theirs")
    in_peer("write_sparsify.py", folder, 7)
    return folder


def uncentred():
    sae = make_sae(apply_b_dec_to_input=False)
    sae.W_dec.mul_(torch.rand(96, 1) + 0.5)
    sae.b_dec.copy_(torch.randn(32))
    return sae


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """What sparsify makes of what we write: {name: (SAE, activations, its codes and reconstruction)}."""
    folder = tmp_path_factory.mktemp("ours")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    saes = {"centred": (make_sae(), x), "uncentred": (uncentred(), x)}
    for case in CASES:
        if case != "sparsify-topk-signed":  # which today's package has no words for
            saes[case] = (SAE.load(theirs / case / "sae"), expected(theirs / case)[0]["x"])
    for name, (sae, _) in saes.items():
        (folder / name).mkdir()
        sparsify.write(folder / name, *sae.facts())
    return made_of("sparsify", folder, saes)


@pytest.mark.parametrize("case", CASES)
def test_what_sparsify_saves_loads_here_with_the_same_codes(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", ["centred", "uncentred", *(case for case in CASES if case != "sparsify-topk-signed")])
def test_what_we_write_loads_in_sparsify_with_the_same_codes(ours, case):
    sae, x, found = ours[case]
    assert (found["codes"] > 0).any()
    assert difference(found["codes"], sae.encode(x)) <= BAR and difference(found["recon"], sae(x)) <= BAR
