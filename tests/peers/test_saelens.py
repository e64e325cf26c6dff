"""What we save, SAELens's own package reads, with the same codes and reconstruction; and the other way round."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from tests.conftest import make_sae

PYTHON = Path(__file__).parents[2] / ".venvs" / "saelens" / "bin" / "python"
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
    save_file({"codes": codes, "recon": sae.decode(codes).detach()}, f"{folder}.out")
    about = sae.cfg.metadata
    names = [sae.cfg.architecture(), about.hook_name, about.training_architecture]
    pathlib.Path(f"{folder}.json").write_text(json.dumps(names))
"""

# Training SAEs with weights of any kind, decoder norms and thresholds, saved as its users save them for inference.
WRITE = """
import json, pathlib, sys
import torch
from sae_lens.registry import get_sae_training_class
root = pathlib.Path(sys.argv[1])
for name, subtracts, norm in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    kind, settings = get_sae_training_class(name)
    more = {"k": 5} if "topk" in name else {}
    more |= {"matryoshka_widths": [16, 96]} if name.startswith("matryoshka") else {}
    sae = kind(settings(d_in=32, d_sae=96, apply_b_dec_to_input=subtracts, **more))
    sae.W_enc.data = torch.randn(32, 96) / 4
    sae.W_dec.data = torch.randn(96, 32) / 4
    sae.b_enc.data = torch.randn(96) / 10
    sae.b_dec.data = torch.randn(32)
    if name == "jumprelu":
        sae.threshold.data = torch.rand(96)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.75, dtype=torch.double)
    if norm != 1:  # trained on scaled activations, which SAELens folds before it saves
        sae.fold_activation_norm_scaling_factor(norm)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.save_inference_model(root / f"{name}-{subtracts}-{norm}")
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
THEIRS = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu")
CASES = list(itertools.product(THEIRS, (True, False), (1, 0.3)))


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
    """A folder with every kind of SAE that SAELens saves, and what SAELens makes of each."""
    folder = tmp_path_factory.mktemp("theirs")
    given(folder)
    in_saelens(WRITE, folder, json.dumps(CASES))
    in_saelens(READ, folder)
    return folder


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
def test_what_saelens_saves_loads_here_with_the_same_codes(theirs, tmp_path, case):
    """Norms folded by SAELens included, where it once forgot b_dec (issue 354) and the threshold (issue 763)."""
    folder, x = named(theirs, case), load_file(theirs / "x.safetensors")["x"]
    sae, found = SAE.load(folder), outputs(folder)
    torch.testing.assert_close(sae.encode(x), found["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), found["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), found["recon"], rtol=1e-5, atol=1e-5)
    trained = {"standard": "relu", "matryoshka_batchtopk": "matryoshka"}.get(case[0], case[0])
    assert (sae.cfg.metadata.training_architecture, sae.cfg.apply_b_dec_to_input) == (trained, case[1])
    assert sae.cfg.metadata.hook_name == HOOK
    sae.save(tmp_path / "again")
    assert torch.equal(SAE.load(tmp_path / "again").encode(x), sae.encode(x))
