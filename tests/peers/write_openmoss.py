"""Writes cases of every kind that OpenMOSS saves, with what OpenMOSS makes of them. Runs in its own environment.

    python tests/peers/write_openmoss.py FOLDER [SEED]

What is expected is what training computes: normalize_activations, encode, decode, denormalize_activations, on raw x
whose mean norm is far from √d. Its codes are in units of what training saw, so each case has a `scale`.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from safetensors.torch import save_file

D, F, ROWS = 16, 64, 20
RESIDUAL, MLP_IN, MLP_OUT = "blocks.2.hook_resid_post", "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
NORMS = {RESIDUAL: 13.0, MLP_IN: 13.0, MLP_OUT: 1.7}
BY = f"llamascopium {version('llamascopium')}"

CASES = {
    "relu": {"act_fn": "relu", "sparsity_include_decoder_norm": False},
    "relu-ranked": {"act_fn": "relu"},
    "relu-no-decoder-bias": {"act_fn": "relu", "use_decoder_bias": False},
    "jumprelu": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
    "jumprelu-ranked": {"act_fn": "jumprelu"},
    "jumprelu-pickle": {"act_fn": "jumprelu"},
    "jumprelu-folded-by-openmoss": {"act_fn": "jumprelu"},
    "jumprelu-token-wise": {"act_fn": "jumprelu", "norm_activation": "token-wise"},
    "jumprelu-transcoder": {"act_fn": "jumprelu", "hook_point_in": MLP_IN, "hook_point_out": MLP_OUT},
    "topk": {"act_fn": "topk", "top_k": 5, "sparsity_include_decoder_norm": False},
    "topk-ranked": {"act_fn": "topk", "top_k": 5},
    "topk-ranked-token-wise": {"act_fn": "topk", "top_k": 5, "norm_activation": "token-wise"},
    "topk-ranked-transcoder": {"act_fn": "topk", "top_k": 5, "hook_point_in": MLP_IN, "hook_point_out": MLP_OUT},
}


def made(settings):
    """An SAE with weights of every kind away from their initial values: biases, decoder norms, thresholds."""
    cfg = SAEConfig(
        **{"hook_point_in": RESIDUAL, "hook_point_out": RESIDUAL, **settings}, d_model=D, expansion_factor=4
    )
    sae = SparseAutoEncoder(cfg)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter) / (4 if name.startswith("W") else 5)
        if name.endswith("log_jumprelu_threshold"):
            parameter.data = torch.rand_like(parameter).log()
    if cfg.norm_activation == "dataset-wise":
        sae.set_dataset_average_activation_norm({hook: NORMS[hook] for hook in cfg.associated_hook_points})
    return sae


def used(sae, x):
    """(codes, reconstruction of raw units, factor of what is read), as in training."""
    cfg = sae.cfg
    batch, factors = sae.normalize_activations({cfg.hook_point_in: x}, return_scale_factor=True)
    codes = sae.encode(batch[cfg.hook_point_in])
    wrote = sae.compute_norm_factor(x, hook_point=cfg.hook_point_out)
    out = sae.denormalize_activations({"out": sae.decode(codes)}, {"out": wrote})["out"]
    return codes, out, factors[cfg.hook_point_in], wrote


@torch.no_grad()
def write(case, name, settings):
    sae = made(settings)
    x = torch.randn(ROWS, D) * 2.5 + torch.randn(D) * 2
    if "folded" in name:
        sae.standardize_parameters_of_dataset_norm()
    codes, out, reads, wrote = used(sae, x)
    norms = sae.decoder_norm()
    if sae.cfg.norm_activation == "token-wise":  # codes of a token's own units, here as there
        reads, wrote = torch.ones(()), torch.ones(())
    # topk with norms: activations here are of decoder rows of length 1, in what is written
    scale = norms / wrote if sae.cfg.act_fn == "topk" and sae.cfg.sparsity_include_decoder_norm else 1 / reads
    (case / "sae").mkdir(parents=True, exist_ok=True)
    sae.save_checkpoint(case / "sae" / f"sae_weights.{'pt' if 'pickle' in name else 'safetensors'}")
    sae.cfg.save_hyperparameters(case / "sae")
    found = {"x": x, "codes": codes, "recon": out, "scale": scale}
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, case / "expected.safetensors", {"by": BY})


def main():
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for i, (name, settings) in enumerate(CASES.items()):
        torch.manual_seed(1000 * seed + i)
        write(folder / f"openmoss-{name}", name, settings)


main()
