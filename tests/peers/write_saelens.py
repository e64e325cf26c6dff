"""Writes cases of every kind that SAELens saves, with what SAELens makes of them. Runs in SAELens's own environment.

    python tests/peers/write_saelens.py FOLDER [SEED]

Training checkpoints are compared with what SAELens itself makes of them at its end: the sidecar's factor folded in,
then save_inference_model; its load_from_disk leaves the sidecar unread.
"""

import json
import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import save_file

D, F, ROWS = 16, 64, 20
HOOK = "blocks.2.hook_resid_post"
BY = f"sae-lens {sae_lens.__version__}"

FINISHED = {
    "standard": {},
    "standard-uncentred": {"apply_b_dec_to_input": False},
    "standard-layer_norm": {"normalize_activations": "layer_norm"},
    "standard-constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "topk": {"k": 5},
    "topk-rescaled": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 5},
    "abstopk-rescaled": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "jumprelu-uncentred": {"apply_b_dec_to_input": False},
    "gated": {},
    "gated-uncentred": {"apply_b_dec_to_input": False},
    "matching_pursuit": {"residual_threshold": 1.0, "max_iterations": 6},
    "matching_pursuit-uncentred": {
        "apply_b_dec_to_input": False, "stop_on_duplicate_support": False, "max_iterations": 4
    },
    "transcoder": {"d_out": 12, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 12, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 12, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 12, "apply_b_dec_to_input": False},
}  # fmt: skip
SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"
CHECKPOINTS = {
    "standard-scaled": {"normalize_activations": SCALED},
    "standard-uncentred-whitened": {"normalize_activations": WHITENED, "apply_b_dec_to_input": False},
    "topk-scaled": {"k": 5, "normalize_activations": SCALED},
    "topk-unranked-scaled": {"k": 5, "normalize_activations": SCALED, "rescale_acts_by_decoder_norm": False},
    "topk-whitened": {"k": 5, "normalize_activations": WHITENED},
    "batchtopk": {"k": 5},
    "batchtopk-scaled": {"k": 5, "normalize_activations": SCALED},
    "batchtopk-unranked-scaled": {"k": 5, "normalize_activations": SCALED, "rescale_acts_by_decoder_norm": False},
    "batchtopk-whitened": {"k": 5, "normalize_activations": WHITENED},
    "matryoshka_batchtopk": {"k": 5, "matryoshka_widths": [16, F]},
    "jumprelu-scaled": {"normalize_activations": SCALED},
    "gated-whitened": {"normalize_activations": WHITENED},
    "matching_pursuit-scaled": {"normalize_activations": SCALED, "residual_threshold": 0.5, "max_iterations": 6},
}


def randomise(sae):
    """Weights of every kind away from their initial values: biases, decoder norms, thresholds, gates."""
    for name, parameter in sae.named_parameters():
        if name in ("W_enc", "W_dec", "W_skip"):
            parameter.data = torch.randn_like(parameter) / 4
        elif name in ("threshold", "topk_threshold"):
            parameter.data = torch.rand_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / 5
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec.data = sae.W_dec.data / sae.W_dec.data.norm(dim=1, keepdim=True)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.6, dtype=torch.double)
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.model_name = "tiny"
    sae.cfg.metadata.prepend_bos = True
    if hasattr(sae.cfg, "d_out"):
        sae.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"


def note(case, sae, x):
    with torch.no_grad():
        codes = sae.encode(x)
        out = sae(x)
    tensors = {"x": x, "codes": codes, "recon": out}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, case / "expected.safetensors", {"by": BY}
    )


def finished(case, name, settings, x):
    kind, config = get_sae_class(name.split("-")[0])
    sae = kind(config(d_in=D, d_sae=F, **settings))
    randomise(sae)
    sae.save_model(case / "sae")
    note(case, sae, x)


def checkpoint(case, name, settings, x):
    kind, config = get_sae_training_class(name.split("-")[0])
    sae = kind(config(d_in=D, d_sae=F, **settings))
    randomise(sae)
    sae.save_model(case / "sae")
    scaler = ActivationScaler()
    if settings.get("normalize_activations") == SCALED:
        scaler.scaling_factor = 0.3
    if settings.get("normalize_activations") == WHITENED:
        basis = torch.linalg.qr(torch.randn(D, D))[0]
        size = torch.rand(D) + 0.5
        scaler.whitening = ActivationWhitening(x.mean(0), basis * size, (basis / size).T.contiguous())
    scaler.save(str(case / "sae" / "activation_scaler.json"))
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        sae.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)
    sae.save_inference_model(case / "finished")
    note(case, SAE.load_from_disk(case / "finished"), x)
    for path in (case / "finished").iterdir():
        path.unlink()
    (case / "finished").rmdir()


def old(case, settings):
    """The same weights under a config of before 6.0, as the many public ones have it."""
    weights = case / "sae" / "cfg.json"
    flat = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "model_name": "tiny", "hook_point": HOOK,
            "hook_point_layer": 2, "hook_point_head_index": None, "context_size": 128, "prepend_bos": True,
            "normalize_activations": False, "sae_lens_training_version": "3.0.0", **settings}  # fmt: skip
    weights.write_text(json.dumps(flat))


def main():
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for i, (make, cases) in enumerate(((finished, FINISHED), (checkpoint, CHECKPOINTS))):
        for j, (name, settings) in enumerate(cases.items()):
            torch.manual_seed(1000 * seed + 100 * i + j)
            case = folder / f"saelens-{name}{'-checkpoint' if make is checkpoint else ''}"
            (case / "sae").mkdir(parents=True, exist_ok=True)
            make(case, name, settings, torch.randn(ROWS, D) * 2 + torch.randn(D))
    for name, like, settings in (
        ("standard", "standard", {}),
        ("topk", "topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("gated", "gated", {"architecture": "gated"}),
        ("jumprelu", "jumprelu-uncentred", {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
    ):
        torch.manual_seed(1000 * seed + 500)
        case = folder / f"saelens-{name}-before-6"
        (case / "sae").mkdir(parents=True, exist_ok=True)
        finished(case, like, FINISHED[like], x := torch.randn(ROWS, D) * 2 + torch.randn(D))
        old(case, settings)
        note(case, SAE.load_from_disk(case / "sae"), x)


main()
