"""Writes cases as Google and OpenMOSS published theirs, with what SAELens makes of them. Runs in SAELens's environment.

    python tests/peers/write_published.py FOLDER [SEED]

Neither published a package that reads them. SAELens's own loaders are called with the Hub replaced by the case's
folder; the SAE is then built, and its factor folded, as SAE.from_pretrained does. Widths that a loader takes from its
table of models are overridden. `where` in the metadata is the repository and folder that the case pretends to be,
`names` what SAELens says of the host.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sae_lens
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file

D, F, OUT, ROWS = 16, 64, 12, 20
NORM = 13.0
FACTOR = D**0.5 / NORM
BY = f"sae-lens {sae_lens.__version__}"
SMALL = {"d_in": D, "d_sae": F}
GEMMA_1, GEMMA_2 = "google/gemma-scope-", "google/gemma-scope-2-"
LAYER = "layer_20/width_16k/average_l0_71"


def weights(out=D):
    return {"W_enc": torch.randn(D, F) / 4, "W_dec": torch.randn(F, out) / 4, "b_enc": torch.randn(F) / 5,
            "b_dec": torch.randn(out) / 5, "threshold": torch.rand(F) * 2}  # fmt: skip


def npz(folder, *, out=D, lower=False, save=np.savez):
    arrays = {name.replace("W_", "w_") if lower else name: tensor.numpy() for name, tensor in weights(out).items()}
    save(folder / "params.npz", **arrays)


def scope_2(folder, *, out=D, affine=False, config=None):
    tensors = {name.lower(): tensor for name, tensor in weights(out).items()}
    if affine:
        tensors["affine_skip_connection"] = torch.randn(D, out) / 4
    save_file(tensors, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "width": F, "l0": 20} | config))


def linear(**more):
    given = weights()
    return {"encoder.weight": given["W_enc"].T.contiguous(), "decoder.weight": given["W_dec"].T.contiguous(),
            "encoder.bias": given["b_enc"], "decoder.bias": given["b_dec"], **more}  # fmt: skip


def llama_scope(folder):
    hook = "blocks.8.hook_resid_post"
    config = {"d_model": D, "d_sae": F, "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu",
              "jump_relu_threshold": 0.75390625, "norm_activation": "dataset-wise", "use_decoder_bias": True,
              "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False, "top_k": 5,
              "dataset_average_activation_norm": {"in": NORM, "out": NORM}}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file(linear(), folder / "checkpoints" / "final.safetensors")


def r1(folder):
    hook = "blocks.5.hook_resid_post"
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F // D, "hook_point_in": hook,
              "hook_point_out": hook, "act_fn": "jumprelu", "norm_activation": "dataset-wise", "top_k": 5,
              "sparsity_include_decoder_norm": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    noted = {f"dataset_average_activation_norm.{hook}": torch.tensor(NORM)}
    save_file(linear(log_jumprelu_threshold=torch.rand(F).log(), **noted), folder / "sae_weights.safetensors")


GEMMA = loaders.gemma_2_sae_huggingface_loader
TRANSCODER = loaders.gemma_2_transcoder_huggingface_loader
GEMMA_3 = loaders.gemma_3_sae_huggingface_loader
PLACE = "model.layers.13."
CASES = {  # what writes it, with what, which loader reads it, repository, folder, what is overridden
    "gemma_scope-res": (npz, {}, GEMMA, f"{GEMMA_1}2b-pt-res", LAYER, SMALL),
    "gemma_scope-mlp": (
        npz, {"lower": True, "save": np.savez_compressed}, GEMMA, f"{GEMMA_1}9b-pt-mlp", LAYER, SMALL
    ),
    "gemma_scope-att": (npz, {}, GEMMA, f"{GEMMA_1}9b-it-att", LAYER, SMALL),
    "gemma_scope-embedding": (npz, {}, GEMMA, f"{GEMMA_1}2b-pt-res", "embedding/width_4k/average_l0_6", SMALL),
    "gemma_scope-transcoder": (
        npz, {"out": OUT}, TRANSCODER, f"{GEMMA_1}2b-pt-transcoders", LAYER, {**SMALL, "d_out": OUT}
    ),
    "gemma_scope_2-resid_post": (
        scope_2,
        {"config": {"model_name": "gemma-v3-1b-pt", "hf_hook_point_in": f"{PLACE}output",
                    "hf_hook_point_out": f"{PLACE}output", "affine_connection": False, "type": "sae"}},
        GEMMA_3, f"{GEMMA_2}1b-pt", "resid_post/layer_13_width_16k_l0_small", {},
    ),
    "gemma_scope_2-attn_out": (
        scope_2, {}, GEMMA_3, f"{GEMMA_2}270m-it", "attn_out_all/layer_9_width_16k_l0_big", {}
    ),
    "gemma_scope_2-mlp_out": (scope_2, {}, GEMMA_3, f"{GEMMA_2}270m-pt", "mlp_out/layer_9_width_16k_l0_big", {}),
    "gemma_scope_2-transcoder": (
        scope_2,
        {"out": OUT, "config": {"model_name": "google/gemma-3-4b-it",
                                "hf_hook_point_in": f"{PLACE}pre_feedforward_layernorm.output",
                                "hf_hook_point_out": f"{PLACE}post_feedforward_layernorm.output"}},
        GEMMA_3, f"{GEMMA_2}4b-it", "transcoder/layer_13_width_16k_l0_big", {},
    ),
    "gemma_scope_2-transcoder-affine": (
        scope_2, {"out": OUT, "affine": True}, GEMMA_3, f"{GEMMA_2}4b-it",
        "transcoder_all/layer_5_width_16k_l0_big_affine", {},
    ),
    "openmoss-llama_scope": (
        llama_scope, {}, loaders.llama_scope_sae_huggingface_loader, "fnlp/Llama3_1-8B-Base-LXR-8x",
        "Llama3_1-8B-Base-L8R-8x", {},
    ),
    "openmoss-llama_scope-r1": (
        r1, {}, loaders.llama_scope_r1_distill_sae_huggingface_loader, "fnlp/Llama-Scope-R1-Distill",
        "800M-Slimpajama-0-OpenR1-Math-220k/L5R", {},
    ),
}  # fmt: skip


def through_saelens(case, loader, repository, folder, overrides):
    """The SAE that SAE.from_pretrained would make of the case, lines of which these are."""

    def download(repo_id, filename, subfolder=None, **_):
        path = case / "sae" / "/".join([*([subfolder] if subfolder else []), filename]).removeprefix(f"{folder}/")
        if not path.exists():
            raise LocalEntryNotFoundError(f"{path} is not there")
        return str(path)

    loaders.hf_hub_download = download
    loaders.get_safetensors_tensor_shapes = lambda repo, file: {
        name: list(tensor.shape) for name, tensor in load_file(download(repo, file)).items()
    }
    cfg, state, _ = loader(
        repo_id=repository, folder_name=folder, device="cpu", force_download=False,
        cfg_overrides={"device": "cpu", "dtype": "float32", **overrides},
    )  # fmt: skip
    cfg = loaders.handle_config_defaulting(cfg)
    config = SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    if cfg.get("normalize_activations") == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(FACTOR)
    return sae


def main():
    root, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for i, (name, (make, settings, loader, repository, folder, overrides)) in enumerate(CASES.items()):
        torch.manual_seed(1000 * seed + i)
        case = root / name
        (case / "sae").mkdir(parents=True, exist_ok=True)
        make(case / "sae", **settings)
        sae, x = through_saelens(case, loader, repository, folder, overrides), torch.randn(ROWS, D) * 2.5
        heads = x.unflatten(-1, (4, -1)) if sae.cfg.reshape_activations == "hook_z" else x
        with torch.no_grad():
            found = {"x": x, "codes": sae.encode(heads), "recon": sae(heads).reshape(ROWS, -1)}
        if "llama" in name:  # its codes are of x·FACTOR, ours of x
            found["scale"] = torch.tensor(1 / FACTOR)
        about = sae.cfg.metadata
        names = [about.model_name, about.hook_name, about.hook_name_out or ""]
        said = {"by": BY, "where": f"{repository}/{folder}", "names": json.dumps(names)}
        tensors = {key: tensor.contiguous() for key, tensor in found.items()}
        save_file(tensors, case / "expected.safetensors", said)


main()
