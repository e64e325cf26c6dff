"""What we save, SAELens's own package reads, with the same codes and reconstruction; and the other way round."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, python

PYTHON = python("saelens")
WRITER = Path(__file__).with_name("write_saelens.py")
CASES = sorted(path.name for path in FIXTURES.glob("saelens-*"))
HOOK = "blocks.2.hook_resid_post"
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

# Codes, reconstruction and names of every folder in argv[1].
READ = """
import json, pathlib, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
root = pathlib.Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
for folder in filter(pathlib.Path.is_dir, list(root.iterdir())):
    sae = SAE.load_from_disk(folder)
    codes = sae.encode(x).detach()
    save_file({"codes": codes, "recon": sae(x).detach()}, f"{folder}.out")
    about = sae.cfg.metadata
    names = [sae.cfg.architecture(), about.hook_name, about.training_architecture]
    pathlib.Path(f"{folder}.json").write_text(json.dumps(names))
"""

# What SAELens makes of each of argv[2]'s cases, on the activations of the same case of argv[1].
READ_AGAIN = """
import pathlib, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
theirs, again = map(pathlib.Path, sys.argv[1:])
for case in again.iterdir():
    sae, x = SAE.load_from_disk(case / "sae"), load_file(theirs / case.name / "expected.safetensors")["x"]
    out = {"codes": sae.encode(x).detach(), "recon": sae(x).detach()}
    save_file(out, case / "expected.safetensors", {"by": "sae-lens"})
"""

OURS = {
    ("topk", True, "topk"): ["topk", HOOK, "topk"],
    ("topk", False, "topk"): ["topk", HOOK, "topk"],
    ("jumprelu", False, "jumprelu"): ["jumprelu", HOOK, "jumprelu"],
    ("jumprelu", True, "batchtopk"): ["jumprelu", HOOK, "batchtopk"],
    ("jumprelu", True, "matryoshka"): ["jumprelu", HOOK, "matryoshka_batchtopk"],
    ("relu", False, "relu"): ["standard", HOOK, "standard"],
    ("relu", True, "relu"): ["standard", HOOK, "standard"],
}


def in_saelens(code, *words):
    """Run a script in SAELens's own environment. Its import takes most of the time, so one call does all cases."""
    if not PYTHON.exists():
        pytest.skip("SAELens's environment is not built: experiments/bench/peers.sh saelens")
    done = subprocess.run([PYTHON, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def given(folder):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, folder / "x.safetensors")


def named(folder, case, dtype=""):
    return folder / "-".join([*map(str, case), str(dtype)]).rstrip("-")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder with every kind of SAE that we save, and what SAELens makes of each."""
    folder = tmp_path_factory.mktemp("ours")
    given(folder)
    for architecture, subtracts, trained in OURS:
        about = {"hook_name": HOOK, "training_architecture": trained}
        sae = make_sae(architecture=architecture, apply_b_dec_to_input=subtracts, **about)
        for dtype in (torch.float32, torch.bfloat16):
            sae.save(named(folder, (architecture, subtracts, trained), dtype), dtype=dtype)
    in_saelens(READ, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Every kind of SAE that SAELens saves, as the committed cases but of another seed; and each saved here again."""
    folder = tmp_path_factory.mktemp("theirs")
    in_saelens(WRITER.read_text(), folder, 7)
    again = tmp_path_factory.mktemp("again")
    for case in CASES:
        (again / case).mkdir()
        SAE.load(folder / case / "sae").save(again / case / "sae")
    in_saelens(READ_AGAIN, folder, again)
    return folder, again


def outputs(folder):
    return load_file(f"{folder}.out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OURS)
def test_saelens_reads_our_folder_with_the_same_codes(ours, case, dtype):
    """Also what it calls the architecture, and where it belongs: without a version SAELens drops all metadata."""
    folder, x = named(ours, case, dtype), load_file(ours / "x.safetensors")["x"]
    sae, found = SAE.load(folder), outputs(folder)
    torch.testing.assert_close(found["codes"], sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["recon"], sae(x), rtol=1e-5, atol=1e-5)
    assert (found["codes"] > 0).any()
    assert json.loads(Path(f"{folder}.json").read_text()) == OURS[case]


@pytest.mark.parametrize("case", CASES)
def test_what_saelens_saves_loads_here_with_the_same_codes(theirs, case):
    """Norms folded by SAELens included, where it once forgot b_dec (issue 354) and the threshold (issue 763)."""
    found = differences(theirs[0] / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", CASES)
def test_what_was_loaded_here_and_saved_again_is_the_same_in_saelens(theirs, case):
    """Transcoders with their skip, token norms, pursuit's limits, checkpoints folded: in its own layout again."""
    (known, _), (found, _) = expected(theirs[0] / case), expected(theirs[1] / case)
    assert difference(found["codes"], known["codes"]) <= BAR and difference(found["recon"], known["recon"]) <= BAR
