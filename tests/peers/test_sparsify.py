"""What sparsify saves loads here with the same codes, and what we write in its layout its own loader reads so."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.formats import sparsify
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, difference, differences, expected, python

PYTHON = python("sparsify")
WRITER = Path(__file__).with_name("write_sparsify.py")
CASES = sorted(path.name for path in FIXTURES.glob("sparsify-*"))
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

# Codes and reconstruction of every SAE in argv[1], of the activations beside it.
READ = """
import pathlib, sys
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
for folder in pathlib.Path(sys.argv[1]).iterdir():
    sae, x = SparseCoder.load_from_disk(folder), load_file(folder / "x.safetensors")["x"]
    with torch.no_grad():
        acts, indices, _ = sae.encode(x)
        out = {"codes": torch.zeros(len(x), sae.num_latents).scatter(-1, indices, acts), "recon": sae(x).sae_out}
    save_file(out, folder / "out.safetensors")
"""


def in_sparsify(code, *words):
    if not PYTHON.exists():
        pytest.skip("sparsify's environment is not built: experiments/bench/peers.sh sparsify")
    done = subprocess.run([PYTHON, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Every kind of SAE that sparsify saves, as the committed cases but of another seed."""
    folder = tmp_path_factory.mktemp("theirs")
    in_sparsify(WRITER.read_text(), folder, 7)
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
    for name, (sae, x) in saes.items():
        (folder / name).mkdir()
        sparsify.write(folder / name, *sae.facts())
        save_file({"x": x}, folder / name / "x.safetensors")
    in_sparsify(READ, folder)
    return {name: (sae, x, load_file(folder / name / "out.safetensors")) for name, (sae, x) in saes.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_sparsify_saves_loads_here_with_the_same_codes(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", ["centred", "uncentred", *(case for case in CASES if case != "sparsify-topk-signed")])
def test_what_we_write_loads_in_sparsify_with_the_same_codes(ours, case):
    sae, x, found = ours[case]
    assert (found["codes"] > 0).any()
    assert difference(found["codes"], sae.encode(x)) <= BAR and difference(found["recon"], sae(x)) <= BAR
