"""What `sae convert` does, from folders: an SAE in another library's layout, or dials of one as a small file.

| layout | what it can say | who loads it |
|---|---|---|
| saelens | every SAE and transcoder, with statistics, labels and where it comes from | SAELens |
| sparsify | topk, groupmax, transcoders of these | `SparseCoder.load_from_disk` |
| dictionary_learning | relu, topk, jumprelu | `load_dictionary` |

| format | what it is | who loads it |
|---|---|---|
| safetensors | the whole edit: vectors, how features are read, laws | `sae.steering.load_edit` |
| vector | Σ c·W_dec as a Direction; "1x" is the edit | `sae.steering.Direction.load`, then `steer` |
| gguf | the same vector as direction.L | llama.cpp's `--control-vector` |

Cost: a safetensors file needs no host; the others load it, and `vector` runs it over 32 texts for its typical norm.
What was written in another layout is loaded again and compared on a few rows of noise.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae import files, labels
from sae.autoencoder import FACTS, SAE, STATS
from sae.dials import Dial, Dials, parse_dials
from sae.errors import UserError, nearest
from sae.finding import host_of
from sae.formats import (
    CHECKPOINTS,
    EDITS,
    control_vector,
    dictionary_learning,
    edit,
    layouts,
    saelens,
    sparsify,
)  # fmt: skip
from sae.host import Host
from sae.sites import parse
from sae.steering.directions import Direction, typical_norm
from sae.steering.edit_files import additive, edit_of
from sae.steering.handle import fitting_hook


def convert(
    sae: str | Path, dials: Dials, out: str | Path, to: str = "safetensors", *, host: Host | None = None
) -> dict[str, Any]:
    """Write dials of an SAE as an edit file `out`, in place of what was there.

    Returns {"file", "format", "hook", "dials", "lost": a line each, "use": how it is loaded}. Raises UserError where
    the format cannot say what the dials do, and where the host is not the SAE's.
    """
    if to not in EDITS:
        close = nearest(to, EDITS) or "."
        raise UserError(f"convert: '{to}' is not a format; there are {', '.join(EDITS)}{close}")
    loaded = SAE.load(sae)
    parsed = parse_dials(dials, loaded.labels)
    loaded.check_features([dial.feature for dial in parsed])
    live = [dial for dial in parsed if dial.amount is not None]
    if not live:
        raise UserError("dials: all are off, nothing to convert. Write FEATURE=STRENGTH, for example 1286=5x.")
    hook, lost, use = {"safetensors": _edit, "vector": _vector, "gguf": _gguf}[to](loaded, live, out, host)
    written = ",".join(str(dial) for dial in live)
    return {"file": str(out), "format": to, "hook": hook, "dials": written, "lost": lost, "use": use}


def convert_layout(
    sae: str | Path, out: str | Path, to: str = "saelens", *, sae_id: str | None = None, trust_pickle: bool = False
) -> dict[str, Any]:
    """Write an SAE as folder `out` in another layout, in place of an SAE of that layout that was there.

    sae, sae_id   as of SAE.from_pretrained: a folder of any layout, or a Hub repository and the folder in it
    Returns {"folder", "layout", "from", "architecture", "largest difference": of codes and reconstruction, relative,
    "lost": a line each, "use": how it is loaded}. Raises UserError where the layout cannot say what the SAE does.
    """
    if to not in CHECKPOINTS:
        close = nearest(to, CHECKPOINTS) or "."
        raise UserError(f"convert: '{to}' is not a layout; there are {', '.join(CHECKPOINTS)}{close}")
    out, source = Path(out), Path(sae, sae_id or "")
    _refuse_to_replace(out, to, source if source.exists() else None)
    loaded = SAE.from_pretrained(sae, sae_id, trust_pickle=trust_pickle)
    facts, tensors = loaded.facts()
    lost = []
    if to not in facts.said_by():
        raise facts.refusal(to)
    if to == "saelens":
        loaded.save(out)
    else:
        page = layouts.PAGES[to]
        with files.atomic_folder(out, marker=page.CONFIG) as folder:
            page.write(folder, facts, tensors)
        if to == "sparsify" and facts.threshold is not None:
            lost.append(f"threshold: sparsify has no word for a calibrated one; {facts.threshold:.4g} stays with {sae}")
        kept = {"statistics": loaded.stats, "labels": loaded.labels, "evaluation": loaded.cfg.metadata.evaluation}
        if gone := [name for name, value in kept.items() if value]:
            lost.append(f"{', '.join(gone)}: {to} has no place for them; they stay with {sae}")
        if (units := loaded.cfg.metadata.units) != "raw":
            lost.append(
                f"units: activations are {units} (`sae info` of OUT still says so); {to}'s users take them for raw"
            )
    use = {
        "saelens": f'sae_lens.SAE.load_from_disk("{out}")',
        "sparsify": f'sparsify.SparseCoder.load_from_disk("{out}")',
        "dictionary_learning": f'dictionary_learning.utils.load_dictionary("{out}", device)',
    }[to]
    return {
        "folder": str(out), "layout": to, "from": loaded.cfg.metadata.layout or "goldengate-sae",
        "architecture": facts.architecture, "largest difference": _difference(loaded, SAE.load(out)), "lost": lost,
        "use": use,
    }  # fmt: skip


_WRITTEN = {
    "saelens": {saelens.CONFIG, saelens.WEIGHTS, FACTS, STATS, labels.FILE},
    "sparsify": {sparsify.CONFIG, sparsify.WEIGHTS},
    "dictionary_learning": {dictionary_learning.CONFIG, dictionary_learning.WEIGHTS},
}
"""All that a conversion leaves in its folder."""


def _refuse_to_replace(out: Path, to: str, source: Path | None) -> None:
    """Raise UserError where `out` is a file, holds the source, or more than an earlier conversion wrote."""
    target = out.resolve()
    if source is not None and target in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out}: is or holds what is to be converted. Give another folder to write.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file, a folder is to be written there. Give another name.")
    others = {path.name for path in out.iterdir()} - _WRITTEN[to]
    if others or (any(out.iterdir()) and layouts.recognised(out) != to):
        what = ", ".join(sorted(others)[:3]) or "not the files of this layout"
        raise UserError(f"{out}: holds something else than such a conversion ({what}). Give another folder to write.")


def _difference(sae: SAE, again: SAE) -> float:
    """The largest difference of codes and reconstruction over the largest value, on noise around b_dec."""
    x = torch.randn(64, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    if sae.cfg.d_out is None:
        x = x + sae.b_dec
    pairs = ((sae.encode(x), again.encode(x)), (sae(x), again(x)))
    return max(float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) for one, other in pairs)


Written = tuple[str, list[str], str]  # hook, what is lost, how it is loaded


def _edit(sae: SAE, dials: Sequence[Dial], out: str | Path, host: Host | None) -> Written:
    facts, tensors = edit_of(sae, dials)
    edit.write(out, facts, tensors)
    return facts["hook"], facts["lost"].splitlines(), f'sae.steering.load_edit(host, "{out}")'


def _vector(sae: SAE, dials: Sequence[Dial], out: str | Path, host: Host | None) -> Written:
    vector, lost = additive(sae, dials)
    host, hook = _at(sae, host)
    length = float(vector.norm())
    direction = Direction(
        hook, vector / length, length, typical_norm(host, hook), host.fingerprint, sae.cfg.metadata.outlier_norm
    )
    direction.save(out, {"dials": ",".join(map(str, dials)), "lost": "\n".join(lost)})
    return hook, lost, f'sae.steer(host, sae.steering.Direction.load("{out}"), "1x")'


def _gguf(sae: SAE, dials: Sequence[Dial], out: str | Path, host: Host | None) -> Written:
    vector, lost = additive(sae, dials)
    host, hook = _at(sae, host)
    layer, kind = parse(hook)
    after = layer - 1 if kind == "hook_resid_pre" else layer
    if kind not in ("hook_resid_pre", "hook_resid_post") or after < 1:
        raise UserError(
            f"{hook}: no control vector can say this: llama.cpp adds one to the residual stream after a block from the "
            "second on (resid_post of block 1 or later). Take --to safetensors."
        )
    lost.append(
        "llama.cpp adds a control vector at every position, special tokens, the first position and attention sinks "
        "too; `sae steer` leaves those alone"
    )
    facts = {
        "hook": hook, "dials": ",".join(map(str, dials)), "host": host.name, "host_fingerprint": host.fingerprint,
        "lost": lost,
    }  # fmt: skip
    hint = control_vector.model_hint(host.model.config.get_text_config().model_type)
    control_vector.write(out, after, vector, hint, facts)
    return hook, lost, f"llama-cli -m MODEL.gguf --control-vector {shlex.quote(str(out))}"


def _at(sae: SAE, host: Host | None) -> tuple[Host, str]:
    """The host and the hook's canonical name on it."""
    host, about = host_of(sae, host), sae.cfg.metadata
    return host, fitting_hook(host, about.hook_name, sae.cfg.d_in, about.host_fingerprint, "SAE", force=False)
