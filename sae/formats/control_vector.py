"""A control vector of llama.cpp: a GGUF file with one float32 tensor `direction.L` [d]. Written only.

llama.cpp adds direction.L, times the scale of `--control-vector-scaled`, to the residual stream after block L: at every
position, in every forward. What its source says (ggml-org/llama.cpp, common_control_vector_load_one in
common/common.cpp; llama_adapter_cvec in src/llama-adapter.cpp):

- a file with `direction.0`, with a tensor of another name, of another type than float32 or of more than one axis is
  refused as a whole; so L begins at 1, and what is at block 0 or before it cannot be said
- layers that the file leaves out are zero, so one tensor is enough; one at or beyond the model's number of blocks is
  silently left out
- the loader stores direction.L at place L − 1 and the adapter takes layer il from place il − 1: L is the block's own
  number, counted from 0, without an offset, and the same as in `blocks.L.hook_resid_post`
- architecture, `controlvector.model_hint` and `controlvector.layer_count` are not read, only the width is compared;
  they are written as its cvector-generator and repeng (ControlVector.export_gguf) do: layer_count is the number of
  tensors
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sae import files
from sae.errors import UserError

ARCHITECTURE = "controlvector"
_THEIR_NAMES = {"mistral": "llama", "mixtral": "llama", "phi": "phi2", "cohere": "command-r", "gpt_oss": "gpt-oss"}


def model_hint(model_type: str) -> str:
    """What llama.cpp calls an architecture of transformers: gptneox for gpt_neox, gemma3 for gemma3_text."""
    return _THEIR_NAMES.get(model_type, model_type.removesuffix("_text").replace("_", ""))


def write(path: str | Path, layer: int, vector: Tensor, hint: str, facts: Mapping[str, str | Sequence[str]]) -> None:
    """Write `vector` [d] as direction.`layer`, whole or not at all; `facts` become the keys `goldengate.*`."""
    assert layer >= 1, "there is no direction.0"
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError(
            "gguf: the package is not installed (the extra [demo] has it). "
            f"Run: {sys.executable} -m pip install 'gguf>=0.17'"
        ) from error
    with files.atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
            writer.add_int32(f"{ARCHITECTURE}.layer_count", 1)
            for name, value in facts.items():
                key = f"goldengate.{name}"
                writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)
            writer.add_tensor(f"direction.{layer}", vector.detach().float().cpu().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
