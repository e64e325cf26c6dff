"""What dictionary_learning saves loads here with the same codes; what we write in its layout its loader reads so."""

import pytest
import torch

from sae.autoencoder import SAE
from sae.formats import dictionary_learning
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, in_peer, made_of

CASES = sorted(path.name for path in FIXTURES.glob("dictionary_learning-*"))
AGAIN = [case for case in CASES if not case.endswith("transcoder")]
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

OURS = [(rule, centred, unit) for rule in ("topk", "relu", "jumprelu") for centred in (1, 0) for unit in (1, 0)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Every class that dictionary_learning saves, as the committed cases but of another seed."""
    folder = tmp_path_factory.mktemp("theirs")
    in_peer("write_dictionary_learning.py", folder, 7)
    return folder


def made(rule, centred, unit):
    sae = make_sae(architecture=rule, apply_b_dec_to_input=bool(centred), hook_name="blocks.2.hook_resid_post")
    sae.b_dec.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)))
    if not unit:
        sae.W_dec.mul_(torch.linspace(0.5, 2, 96)[:, None])
    return sae


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """What dictionary_learning makes of what we write: {name: (SAE, activations, its codes and reconstruction)}."""
    folder = tmp_path_factory.mktemp("ours")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    saes = {str(case): (made(*case), x) for case in OURS}
    saes |= {case: (SAE.load(theirs / case / "sae"), expected(theirs / case)[0]["x"]) for case in AGAIN}
    for name, (sae, _) in saes.items():
        (folder / name).mkdir()
        dictionary_learning.write(folder / name, *sae.facts())
    return made_of("dictionary_learning", folder, saes)


@pytest.mark.parametrize("case", CASES)
def test_what_dictionary_learning_saves_loads_here_with_the_same_codes(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", [*map(str, OURS), *AGAIN])
def test_what_we_write_loads_in_dictionary_learning_with_the_same_codes(ours, case):
    """Also what fires above a topk SAE's calibrated threshold, which its class can be asked for."""
    sae, x, found = ours[case]
    assert (found["codes"] > 0).any()
    assert difference(found["codes"], sae.encode(x)) <= BAR and difference(found["recon"], sae(x)) <= BAR
    if "above" in found:
        mine = sae.feature_acts(x, range(sae.cfg.d_sae), select="threshold") if sae.threshold is not None else None
        assert mine is None or difference(found["above"], mine) <= BAR
