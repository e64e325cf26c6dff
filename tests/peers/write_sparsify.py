"""Writes cases of every kind that sparsify saves, with what sparsify makes of them. Runs in sparsify's own environment.

    python tests/peers/write_sparsify.py FOLDER [SEED]

All are read again by its load_from_disk. A bfloat16 file is compared in float32, which holds its weights exactly.
`signed` is of its first releases, and today's package drops it: that one case is computed as theirs did, transcribed.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

D, F, ROWS = 16, 64, 20
BY = f"eai-sparsify {version('eai-sparsify')}"
FIRST = "EleutherAI/sae @00bbb22, pre_acts and select_topk of sae/sae.py transcribed"

CASES = {
    "topk": {"k": 5},
    "topk-bfloat16": {"k": 5},
    "topk-by-expansion": {"k": 5, "num_latents": 0, "expansion_factor": 4},
    "topk-signed": {"k": 5},
    "topk-skip": {"k": 5, "skip_connection": True},
    "topk-transcode": {"k": 5, "transcode": True},
    "topk-transcode-skip": {"k": 5, "transcode": True, "skip_connection": True},
    "groupmax": {"k": 8, "activation": "groupmax"},
    "groupmax-transcode-skip": {"k": 8, "activation": "groupmax", "transcode": True, "skip_connection": True},
}


def signed(sae, x):
    pre = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    indices = pre.abs().topk(sae.cfg.k, sorted=False).indices
    acts = pre.gather(-1, indices)
    return acts, indices, sae.decode(acts, indices)


def encoded(sae, x):
    acts, indices, _ = sae.encode(x)
    return acts, indices, sae(x).sae_out


@torch.no_grad()
def write(case, name, settings):
    sae = SparseCoder(D, SparseCoderConfig(**{"num_latents": F, **settings}))
    for parameter in sae.parameters():  # biases and decoder norms away from what they begin with
        parameter.copy_(torch.randn_like(parameter) / 4)
    sae.b_dec.copy_(torch.randn(D))
    sae.to(torch.bfloat16 if name.endswith("bfloat16") else torch.float32).save_to_disk(case / "sae")
    if name.endswith("signed"):
        config = json.loads((case / "sae" / "cfg.json").read_text())
        (case / "sae" / "cfg.json").write_text(json.dumps({**config, "signed": True}))
    x = torch.randn(ROWS, D) * 2 + torch.randn(D)
    sae = SparseCoder.load_from_disk(case / "sae").float()
    acts, indices, out = (signed if name.endswith("signed") else encoded)(sae, x)
    codes = torch.zeros(ROWS, F).scatter(-1, indices, acts)
    by = FIRST if name.endswith("signed") else BY
    save_file({"x": x, "codes": codes, "recon": out}, case / "expected.safetensors", {"by": by})


def main():
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for i, (name, settings) in enumerate(CASES.items()):
        torch.manual_seed(1000 * seed + i)
        write(folder / f"sparsify-{name}", name, settings)


main()
