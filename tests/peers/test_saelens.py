"""What we save, SAELens's own package reads, with the same codes and reconstruction."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_sae

PYTHON = Path(__file__).parents[2] / ".venvs" / "saelens" / "bin" / "python"
CODE = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
codes = sae.encode(load_file(sys.argv[2])["x"]).detach()
save_file({"codes": codes, "recon": sae.decode(codes).detach()}, sys.argv[3])
"""


@pytest.mark.peers
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saelens_reads_our_folder_with_the_same_codes(tmp_path, dtype):
    if not PYTHON.exists():
        pytest.skip("SAELens's environment is not built: experiments/bench/peers.sh saelens")
    from sae.autoencoder import SAE

    make_sae(hook_name="blocks.2.hook_resid_post").save(tmp_path / "sae", dtype=dtype)
    ours = SAE.load(tmp_path / "sae")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    paths = [str(tmp_path / name) for name in ("sae", "x.safetensors", "out.safetensors")]
    done = subprocess.run([PYTHON, "-c", CODE, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(paths[2])
    torch.testing.assert_close(theirs["codes"], ours.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs["recon"], ours(x), rtol=1e-5, atol=1e-5)
