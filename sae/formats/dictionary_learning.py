"""dictionary_learning (Marks, Karvonen, Mueller): `trainer_i/` with config.json and ae.pt, and checkpoints/ae_N.pt.

ae.pt is a state dict of torch.save, config.json {"trainer": {dict_class, activation_dim, dict_size, k, layer, lm_name,
submodule_name, …}, "buffer": {ctx_len, io, …}}; without it the class is told from the names of the tensors, where they
leave no doubt. Weights stand as nn.Linear has them ([out, in]), or as W_enc [d, d_sae] and W_dec [d_sae, d].

- AutoEncoder takes `bias` off its input; its loader then makes decoder rows of length 1, which changes the codes
- AutoEncoderNew and JumpReluAutoEncoder take nothing off, all others their decoder's bias
- GatedAutoEncoder is a JumpReLU (folds.py)
- BatchTopKSAE and MatryoshkaBatchTopKSAE choose by one threshold outside training; at −1, as no training step has set
  it, by relu alone. AutoEncoderTopK chooses the k largest, its threshold is for whoever asks
- training divides x by norm_factor, and saves biases and thresholds times it: codes are in raw units. The factor
  itself is lost (its trainer.config is made anew at each look)
- k may be annealed: a checkpoint's own k is the one that it was saved with, config.json has the first
- trained with io "in_and_out": the same classes, from what a module reads to what it returns
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.formats import checks, folds, hooks
from sae.formats.facts import Facts

CONFIG, WEIGHTS = "config.json", "ae.pt"
_FILE = re.compile(r"ae(_\w+)?\.pt")
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_TRANSPOSED = ("encoder.weight", "decoder.weight")
_MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_SCALARS = {"k": "k", "threshold": "threshold"}
_CLASSES = {
    "AutoEncoder": ("relu", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("relu", {**_LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec", "r_mag": "r_mag",
         "gate_bias": "b_gate", "mag_bias": "b_mag"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", {**_MATRICES, "threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "b_dec", **_SCALARS}),
    "BatchTopKSAE": ("batchtopk", {**_LINEAR, "b_dec": "b_dec", **_SCALARS}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {**_MATRICES, **_SCALARS, "group_sizes": "group_sizes"}),
}  # fmt: skip
"""Of each class: how it was trained, and what we call its tensors."""
_MAY_LACK = {"AutoEncoderTopK": {"k", "threshold"}}
"""In 2024 k stood in config.json alone, and there was no threshold."""
_UNITS = ("units", "norm_factor")
_UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SUBMODULES = {"resid": "", "resid_post": "", "mlp": ".mlp", "mlp_out": ".mlp", "attn": ".attn", "attn_out": ".attn",
               "attention": ".attn", "attention_out": ".attn"}  # fmt: skip
_THEIR_SUBMODULES = {"hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out", "hook_attn_out": "attention_out"}


def recognises(path: Path) -> bool:
    return (path / WEIGHTS).is_file() or (path.is_file() and _FILE.fullmatch(path.name) is not None)


def read(path: Path, *, where: str = "", trust_pickle: bool = False) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors) of a trainer's folder, or of a file in it. Raises UserError for what is damaged or not read."""
    at = path / WEIGHTS if path.is_dir() else path
    state = checks.named(at, checks.pickled(at, trust_pickle=trust_pickle))
    beside, trainer, buffer, units = _config(at)
    kind = _class(at, beside, trainer, state)
    trained = _CLASSES[kind][0]
    d, F = _sizes(at, beside, trainer, state)
    tensors = _tensors(at, state, kind, d, F, f"{CONFIG} says" if trainer else "the encoder says")
    rule = {"relu": "relu", "topk": "topk"}.get(trained, "jumprelu")
    facts = Facts(rule, d, F, apply_b_dec_to_input=kind not in _UNCENTRED)
    about = _metadata(trainer, buffer, trained)
    match kind:
        case "AutoEncoder" if not torch.allclose(norms := tensors["W_dec"].norm(dim=1), torch.ones_like(norms)):
            tensors = folds.unit_rows(tensors)
        case "GatedAutoEncoder":
            tensors = folds.ungated(tensors)
        case "AutoEncoderTopK":
            known = float(tensors.pop("threshold", -1))
            k = _k(at, beside, trainer, F, tensors.pop("k", None))
            facts = dataclasses.replace(facts, k=k, threshold=known if known >= 0 else None)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            tensors["threshold"] = tensors["threshold"].clamp_min(0).repeat(F)
            tensors.pop("k")
            if kind == "MatryoshkaBatchTopKSAE":
                about["matryoshka_widths"] = _widths(at, tensors.pop("group_sizes"), F)
    if buffer.get("io") == "in_and_out":
        tensors = folds.centred(facts, tensors, False)
        facts = dataclasses.replace(facts, apply_b_dec_to_input=False, d_out=d)
    return dataclasses.replace(facts, metadata={**about, **units}), tensors


def _config(at: Path) -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Where the trainer's config.json is or would be, its two objects, and what we wrote into it of units, which
    dictionary_learning leaves unread; empty without it."""
    folder = at.absolute().parent
    beside = (folder.parent if folder.name == "checkpoints" else folder) / CONFIG
    config = files.read_json_object(beside, ("trainer",)) if beside.is_file() else {"trainer": {}}
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise UserError(f"{beside}: trainer and buffer must be objects. {checks.AGAIN}")
    ours = config.get("goldengate")
    units = {key: ours[key] for key in _UNITS if key in ours} if isinstance(ours, dict) else {}
    return beside, trainer, buffer, units


def _class(at: Path, beside: Path, trainer: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    if given := trainer.get("dict_class"):
        if not isinstance(given, str) or given not in _CLASSES:
            raise UserError(
                f"{beside}: dict_class {given} is not read (read are: {', '.join(_CLASSES)}). Choose another."
            )
        return given
    fit = [
        kind
        for kind, (_, names) in _CLASSES.items()
        if set(names) - _MAY_LACK.get(kind, set()) <= set(state) <= set(names)
    ]
    if len(fit) != 1:
        what = " and ".join(fit) or "no class of dictionary_learning"
        raise UserError(
            f"{at}: there is no {beside} with a dict_class, and its tensors fit {what}. Put that file there."
        )
    return fit[0]


def _sizes(at: Path, beside: Path, trainer: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d, d_sae): config.json's, the encoder's own where it has none."""
    encoder = state.get("W_enc", state.get("encoder.weight"))
    if encoder is None or encoder.dim() != 2:
        raise UserError(f"{at}: has no matrix encoder.weight or W_enc. {checks.AGAIN}")
    d, F = encoder.shape if "W_enc" in state else reversed(encoder.shape)
    known = {"activation_dim": d, "dict_size": F, **trainer}
    return checks.count(beside, known, "activation_dim"), checks.count(beside, known, "dict_size")


def _tensors(at: Path, state: Mapping[str, Tensor], kind: str, d: int, F: int, said: str) -> dict[str, Tensor]:
    """By our names and in our orientation, each of its shape."""
    trained, names = _CLASSES[kind]
    checks.nothing_else(at, state, names)
    ours: dict[str, tuple[int, ...]] = {"W_enc": (d, F), "W_dec": (F, d), "b_dec": (d,), "k": ()}
    ours["threshold"] = (F,) if trained == "jumprelu" else ()
    if "group_sizes" in state:
        ours["group_sizes"] = (state["group_sizes"].numel(),)
    lacks = _MAY_LACK.get(kind, set()) - set(state)
    shapes = {name: ours.get(names[name], (F,)) for name in names if name not in lacks}
    shapes |= {name: shapes[name][::-1] for name in _TRANSPOSED if name in shapes}
    found = checks.sound(at, checks.taken(at, state, shapes, said))
    return {names[name]: tensor.T if name in _TRANSPOSED else tensor for name, tensor in found.items()}


def _k(at: Path, beside: Path, trainer: Mapping[str, Any], F: int, own: Tensor | None) -> int:
    if own is None:
        return checks.count(beside, trainer, "k", most=F)
    k = checks.count(at, {"k": int(own) if own == own.trunc() else float(own)}, "k", most=F)
    if at.name == WEIGHTS and trainer.get("k", k) != k:
        raise UserError(f"{at}: k is {k}, {beside} says {trainer['k']!r}. {checks.AGAIN}")
    return k


def _widths(at: Path, sizes: Tensor, F: int) -> list[int]:
    """Of the nested prefixes, from the sizes of the groups between them."""
    whole = sizes.double()  # of so many features each is exact
    if not 0 < len(sizes) <= F or bool((sizes < 1).any() | (sizes != sizes.trunc()).any()) or whole.sum() != F:
        some = ", ".join([*(f"{float(size):g}" for size in sizes[:8]), *("…" for _ in sizes[8:9])])
        raise UserError(f"{at}: group_sizes are [{some}], expected parts of {F:,}. {checks.AGAIN}")
    return whole.cumsum(0).long().tolist()


def _metadata(trainer: Mapping[str, Any], buffer: Mapping[str, Any], trained: str) -> dict[str, Any]:
    name, io = checks.text(trainer, "submodule_name"), buffer.get("io")
    part = _SUBMODULES.get(re.sub(r"_layer_?\d+$", "", name))
    reads, returns = hooks.of_module(name if part is None else f"layers.{trainer.get('layer')}{part}")
    return {
        "training_architecture": trained,
        "model_name": checks.text(trainer, "lm_name"),
        "hook_name": reads if io in ("in", "in_and_out") else returns,
        "hook_name_out": returns if io == "in_and_out" else "",
        "context_size": buffer.get("ctx_len"),
        "norm_factor": None,
    }


def write(folder: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder, in float32. Raises UserError for what no class can say.

    relu becomes AutoEncoderNew: its loader leaves decoder rows and codes as they are, AutoEncoder's does not.
    """
    if "dictionary_learning" not in facts.said_by():
        raise facts.refusal("dictionary_learning")
    kinds = {"relu": "AutoEncoderNew", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
    kind = kinds[facts.architecture]
    tensors = folds.centred(facts, tensors, kind not in _UNCENTRED)
    trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": facts.d_in, "dict_size": facts.d_sae}
    if facts.k is not None:
        trainer["k"] = facts.k
        tensors["k"] = torch.tensor(facts.k, dtype=torch.int32)
        tensors["threshold"] = torch.tensor(-1.0 if facts.threshold is None else facts.threshold)
    state = {
        theirs: tensors[ours].T if theirs in _TRANSPOSED else tensors[ours]
        for theirs, ours in _CLASSES[kind][1].items()
    }
    hook = facts.metadata.get("hook_name", "")
    place = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    name = _THEIR_SUBMODULES.get(place[2], "") if place else ""
    trainer |= {
        "layer": int(place[1]) if place else None,
        "lm_name": facts.metadata.get("model_name", ""),
        "submodule_name": f"{name}_layer_{place[1]}" if place and name else hook,
    }
    buffer = {"d_submodule": facts.d_in, "io": "out", "ctx_len": facts.metadata.get("context_size")}
    files.write_torch(folder / WEIGHTS, state)
    units = {key: facts.metadata.get(key) for key in _UNITS}
    files.write_json(folder / CONFIG, {"trainer": trainer, "buffer": buffer, "goldengate": units})
