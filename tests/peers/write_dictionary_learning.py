"""Writes cases of every class that dictionary_learning saves, with what its loader makes of them. Runs in its own
environment.

    python tests/peers/write_dictionary_learning.py FOLDER [SEED]

Its utils.load_dictionary is called as it is; its package imports nnsight for a buffer that loading never touches, so
an empty stand-in takes its place. One case is older, without k and threshold in ae.pt: today's loader refuses it, and
what is expected is what its class makes of the same weights.
"""

import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object

from dictionary_learning import dictionary, utils  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

D, F, ROWS, K = 16, 64, 20, 5
BY = f"dictionary-learning {version('dictionary-learning')}"

CASES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D, F),
    "AutoEncoder-unit": lambda: dictionary.AutoEncoder(D, F),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "AutoEncoderTopK-2024": lambda: AutoEncoderTopK(D, F, K),
    "AutoEncoderTopK-transcoder": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "BatchTopKSAE-unset": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [8, 24, 32]),
}


def randomise(sae, name):
    """Weights away from their initial values; thresholds as training leaves them."""
    for key, parameter in sae.named_parameters():
        parameter.copy_(torch.rand_like(parameter) if key == "threshold" else torch.randn_like(parameter) / 4)
    if "threshold" in dict(sae.named_buffers()) and not name.endswith("unset"):
        sae.threshold.copy_(torch.tensor(0.6))
    if name.endswith("unit"):
        sae.decoder.weight.div_(sae.decoder.weight.norm(dim=0))


@torch.no_grad()
def write(case, name):
    sae = CASES[name]()
    randomise(sae, name)
    (case / "sae").mkdir(parents=True, exist_ok=True)
    trainer = {"dict_class": name.split("-")[0], "activation_dim": D, "dict_size": F, "k": K, "layer": 2,
               "lm_name": "tiny", "submodule_name": "resid_post_layer_2"}  # fmt: skip
    buffer = {"d_submodule": D, "io": "in_and_out" if name.endswith("transcoder") else "out", "ctx_len": 128}
    (case / "sae" / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
    state = {key: tensor.cpu() for key, tensor in sae.state_dict().items()}
    if name.endswith("2024"):
        del state["k"], state["threshold"]
        torch.save(state, case / "sae" / "ae.pt")
    else:
        torch.save(state, case / "sae" / "ae.pt")
        sae, _ = utils.load_dictionary(str(case / "sae"), "cpu")
    x = torch.randn(ROWS, D) * 2 + torch.randn(D)
    codes = sae.encode(x)
    tensors = {"x": x, "codes": codes, "recon": sae.decode(codes)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, case / "expected.safetensors", {"by": BY})


def main():
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for i, name in enumerate(CASES):
        torch.manual_seed(1000 * seed + i)
        write(folder / f"dictionary_learning-{name}", name)


main()
