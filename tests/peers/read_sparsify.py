"""What sparsify makes of every folder in argv[1]: of the activations x.safetensors in it, in out.safetensors."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

for folder in Path(sys.argv[1]).iterdir():
    sae, x = SparseCoder.load_from_disk(folder), load_file(folder / "x.safetensors")["x"]
    with torch.no_grad():
        acts, indices, _ = sae.encode(x)
        out = {"codes": torch.zeros(len(x), sae.num_latents).scatter(-1, indices, acts), "recon": sae(x).sae_out}
    save_file(out, folder / "out.safetensors")
