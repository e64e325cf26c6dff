"""Gemma Scope 1 (params.npz) and 2 (params.safetensors, mostly with config.json): JumpReLU SAEs and transcoders.

encode(x) fires where x·W_enc + b_enc > threshold, strictly; b_dec is not taken off first. They were trained on
activations of one scale and published with that folded, so activations are in raw units; the factor is not told.

- names: Scope 2 writes w_enc, w_dec; its affine_skip_connection is [d_in, d_out], the transpose of our W_skip
- what an SAE belongs to, no file of Scope 1 says: the repository and folder do. Where they are not known, hook_name
  stays empty; a transcoder whose widths are equal then reads as an SAE, with the same numbers
- an SAE of the embedding (a folder `embedding`) was trained on rows that Gemma multiplies by √d, and hook_embed has
  them multiplied: W_enc/√d, W_dec·√d
- attention SAEs read the heads side by side (hook_z), d_in = heads · size of one
- a transcoder of Scope 2 reads what goes into the MLP, after its norm: the bridge's mlp.hook_in. SAELens calls that
  hook_mlp_in, which in TransformerLens is the residual stream before the norm
- cross-layer transcoders and crosscoders lie in a file a layer (params_layer_0.safetensors) and are not read
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.formats import checks
from sae.formats.facts import Facts

NPZ, SAFETENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
_NAME = re.compile(r"params\.npz|params(_\w+)?\.safetensors")
_SCOPE_1 = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b(.*)", re.DOTALL)
_SCOPE_2 = re.compile(r"gemma-scope-2-(\d+[mb]-(?:pt|it))\b(.*)", re.DOTALL)
_SITES_1 = {
    "res": ("hook_resid_post", ""),
    "mlp": ("hook_mlp_out", ""),
    "att": ("attn.hook_z", ""),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
_MLP_IN, _MLP_OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
_MODULES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    _MLP_IN: "mlp.hook_in",
    _MLP_OUT: "hook_mlp_out",
}
"""Scope 2's places in a layer, in Hugging Face's words, and TransformerLens's names of them."""
_FOLDERS = {
    "resid_post": ("output", ""),
    "attn_out": ("self_attn.o_proj.input", ""),
    "mlp_out": (_MLP_OUT, ""),
    "transcoder": (_MLP_IN, _MLP_OUT),
}
"""What is read and, by a transcoder, written, in Scope 2's folders."""


def recognises(path: Path) -> bool:
    return _weights(path) is not None


def _weights(path: Path) -> Path | None:
    """The weights in a folder, or the file itself."""
    among = sorted(path.glob("params*")) if path.is_dir() else [path]
    return next((one for one in among if one.is_file() and _NAME.fullmatch(one.name)), None)


def read(path: Path, *, where: str = "", trust_pickle: bool = False) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors). Raises UserError for what is damaged, contradictory, or goes over several layers.

    where   repository and folder ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"), or a path with
            them in it, as the Hub's cache has
    """
    file = _weights(path)
    assert file is not None, "recognised before it is read"
    given = checks.npz(file) if file.name == NPZ else checks.safetensors(file)
    given = {f"W{name[1:]}" if name.startswith("w_") else name: tensor for name, tensor in given.items()}
    W_enc, W_dec = (given[name].shape if name in given else () for name in ("W_enc", "W_dec"))
    if file.name not in (NPZ, SAFETENSORS) or len(W_dec) == 3:
        raise UserError(f"{file}: is part of a transcoder over several layers, which is not read. Choose another SAE.")
    if len(W_enc) != 2 or len(W_dec) != 2:
        raise UserError(f"{file}: has no two matrices W_enc and W_dec. {checks.AGAIN}")
    (d, F), out = W_enc, W_dec[1]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, F), "W_dec": (F, out), "b_enc": (F,), "b_dec": (out,)}
    shapes |= {"threshold": (F,)} | ({"affine_skip_connection": (d, out)} if "affine_skip_connection" in given else {})
    tensors = checks.sound(file, checks.taken(file, given, shapes, "its matrices say"))
    if "affine_skip_connection" in tensors:
        tensors["W_skip"] = tensors.pop("affine_skip_connection").T
    if file.name == NPZ:
        metadata, embeds = _place_1(where)
        if embeds:
            tensors |= {"W_enc": tensors["W_enc"] / d**0.5, "W_dec": tensors["W_dec"] * d**0.5}
    else:
        metadata = _place_2(file.with_name(CONFIG), where)
    metadata |= {"context_size": 1024, "norm_factor": None}
    metadata["foreign"] = {"prepend_bos": True, **metadata.get("foreign", {})}
    transcodes = bool(metadata.get("hook_name_out")) or "W_skip" in tensors or out != d
    return Facts("jumprelu", d, F, d_out=out if transcodes else None, metadata=metadata), tensors


def _place_1(where: str) -> tuple[dict[str, Any], bool]:
    """(metadata that the names give, whether it is an SAE of the embedding)."""
    if not (known := _SCOPE_1.search(where)):
        return {}, re.search(r"(^|[/\\])embedding[/\\]", where) is not None
    size, tuned, site, folder = known.groups()
    model = f"gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    if "embedding" in folder:
        return {"model_name": model, "hook_name": "hook_embed"}, True
    if not (layer := re.search(r"layer_(\d+)", folder)):
        return {"model_name": model}, False
    hook, out = (name and f"blocks.{layer[1]}.{name}" for name in _SITES_1[site])
    return {"model_name": model, "hook_name": hook, "hook_name_out": out}, False


def _place_2(path: Path, where: str) -> dict[str, Any]:
    """Metadata from config.json, and from the names what it does not say."""
    config = files.read_json_object(path) if path.exists() else {}
    if (rule := config.get("architecture", "jump_relu")) != "jump_relu":
        raise UserError(f"{path}: architecture is {rule!r}, only jump_relu is read. Choose another SAE.")
    repository = _SCOPE_2.search(where)
    model = checks.text(config, "model_name") or (f"google/gemma-3-{repository[1]}" if repository else "")
    model = model.replace("-v3", "-3")  # as some of the files have it
    if "270m" in model:
        model = model.removesuffix("-pt")  # the Hub's own name has none
    named = _hooks_named(repository[2] if repository else where)
    reads, writes = (checks.text(config, f"hf_hook_point_{way}") or named[way] for way in ("in", "out"))
    writes = "" if writes == reads else writes
    return {
        "model_name": model if "google/" in model or not model else f"google/{model}",
        "hook_name": _site(reads),
        "hook_name_out": _site(writes),
        "foreign": {name: hook for name, hook in (("hf_hook_name", reads), ("hf_hook_name_out", writes)) if hook},
    }


def _hooks_named(folder: str) -> Mapping[str, str]:
    """What a folder such as transcoder_all/layer_5_width_16k_l0_big reads and writes."""
    known = re.search(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?[/\\]layer_(\d+)_", folder)
    if known is None:
        return {"in": "", "out": ""}
    layer, (reads, writes) = f"model.layers.{known[2]}.", _FOLDERS[known[1]]
    return {"in": layer + reads, "out": writes and layer + writes}


def _site(module: str) -> str:
    """TransformerLens's name of a place in a layer; empty for one that is not known."""
    known = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blocks.{known[1]}.{_MODULES[known[2]]}" if known and known[2] in _MODULES else ""
