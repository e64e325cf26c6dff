"""What dictionary_learning makes of every folder in argv[1]: of the activations x.safetensors in it.

`above` has the codes by a topk SAE's threshold, which its class can be asked for. Importing load_dictionary takes
nnsight, which loading needs nothing of.
"""

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object

from dictionary_learning.utils import load_dictionary  # noqa: E402

for folder in Path(sys.argv[1]).iterdir():
    (sae, _), x = load_dictionary(str(folder), "cpu"), load_file(folder / "x.safetensors")["x"]
    with torch.no_grad():
        codes = sae.encode(x)
        out = {"codes": codes, "recon": sae.decode(codes)}
        if hasattr(sae, "threshold") and sae.threshold.dim() == 0:
            out["above"] = sae.encode(x, use_threshold=True)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / "out.safetensors")
