"""What we save, SAELens's own package reads, with the same codes and reconstruction; and the other way round."""

import json

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.autoencoder import SAE
from sae.recipe import TrainingRecipe
from sae.run import convert_layout, train
from sae.training.checkpoint import all_of
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, in_peer, made_of
from tests.test_architectures import recipe
from tests.training.test_training import planted

CASES = sorted(path.name for path in FIXTURES.glob("saelens-*"))
HOOK = "blocks.2.hook_resid_post"
OURS = {
    ("topk", True, "topk"): ["topk", HOOK, "topk"],
    ("topk", False, "topk"): ["topk", HOOK, "topk"],
    ("jumprelu", False, "jumprelu"): ["jumprelu", HOOK, "jumprelu"],
    ("jumprelu", True, "batchtopk"): ["jumprelu", HOOK, "batchtopk"],
    ("jumprelu", True, "matryoshka"): ["jumprelu", HOOK, "matryoshka_batchtopk"],
    ("relu", False, "relu"): ["standard", HOOK, "standard"],
    ("relu", True, "relu"): ["standard", HOOK, "standard"],
}
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What SAELens makes of every kind of SAE that we train, in both number formats that we save; and the folder."""
    folder = tmp_path_factory.mktemp("ours")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    saes = {}
    for case in OURS:
        architecture, subtracts, trained = case
        about = {"hook_name": HOOK, "training_architecture": trained}
        sae = make_sae(architecture=architecture, apply_b_dec_to_input=subtracts, **about)
        for dtype in DTYPES:
            saes[f"{case}-{dtype}"] = (SAE.load(sae.save(folder / f"{case}-{dtype}", dtype=dtype)), x)
    return made_of("saelens", folder, saes), folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What SAELens makes of checkpoints from the middle of runs of ours, converted."""
    folder = tmp_path_factory.mktemp("checkpoints")
    rows, saes = planted()[0], {}
    for name in ARCHITECTURES:
        run = folder / "runs" / name
        train(
            recipe(run, name, training=TrainingRecipe(tokens=5_000, batch=256, save_every=1e-6)),
            rows[:3000],
            progress=False,
        )
        middle = all_of(run)[0]
        assert len(all_of(run)) == 2, "that of the last step is one more"
        convert_layout(middle, folder / "converted" / name)
        saes[name] = (SAE.load(middle), rows[3000:3050])
    return made_of("saelens", folder / "converted", saes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_reads_our_training_checkpoints_with_the_same_codes(checkpoints, name):
    sae, x, found = checkpoints[name]
    assert (found["codes"] > 0).any()
    assert difference(found["codes"], sae.encode(x)) <= BAR and difference(found["recon"], sae(x)) <= BAR


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Every kind of SAE that SAELens saves, as the committed cases but of another seed."""
    folder = tmp_path_factory.mktemp("theirs")
    in_peer("write_saelens.py", folder, 7)
    return folder


@pytest.fixture(scope="module")
def again(theirs, tmp_path_factory):
    """What SAELens makes of its own SAEs after they were loaded and saved here."""
    folder = tmp_path_factory.mktemp("again")
    saes = {case: (SAE.load(theirs / case / "sae"), expected(theirs / case)[0]["x"]) for case in CASES}
    for case, (sae, _) in saes.items():
        sae.save(folder / case)
    return made_of("saelens", folder, saes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OURS)
def test_saelens_reads_our_folder_with_the_same_codes(ours, case, dtype):
    """Also what it calls the architecture, and where it belongs: without a version SAELens drops all metadata."""
    made, folder = ours
    sae, x, found = made[f"{case}-{dtype}"]
    assert (found["codes"] > 0).any()
    assert difference(found["codes"], sae.encode(x)) <= BAR and difference(found["recon"], sae(x)) <= BAR
    assert json.loads((folder / f"{case}-{dtype}" / "names.json").read_text()) == OURS[case]


@pytest.mark.parametrize("case", CASES)
def test_what_saelens_saves_loads_here_with_the_same_codes(theirs, case):
    """Norms folded by SAELens included, where it once forgot b_dec (issue 354) and the threshold (issue 763)."""
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", CASES)
def test_what_was_loaded_here_and_saved_again_is_the_same_in_saelens(theirs, again, case):
    """Transcoders with their skip, token norms, pursuit's limits, checkpoints folded: in its own layout again."""
    known, (_, _, found) = expected(theirs / case)[0], again[case]
    assert difference(found["codes"], known["codes"]) <= BAR and difference(found["recon"], known["recon"]) <= BAR
