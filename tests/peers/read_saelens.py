"""What SAELens makes of every folder in argv[1]: of the activations x.safetensors in it, in out.safetensors.

Codes and reconstruction; names.json has what it calls the architecture, where it belongs and how it was trained.
"""

import json
import sys
from pathlib import Path

from sae_lens import SAE
from safetensors.torch import load_file, save_file

for folder in Path(sys.argv[1]).iterdir():
    sae, x = SAE.load_from_disk(folder), load_file(folder / "x.safetensors")["x"]
    save_file({"codes": sae.encode(x).detach(), "recon": sae(x).detach()}, folder / "out.safetensors")
    about = sae.cfg.metadata
    names = [sae.cfg.architecture(), about.hook_name, about.training_architecture]
    (folder / "names.json").write_text(json.dumps(names))
