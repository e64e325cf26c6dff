"""What `sae convert` does, from folders: dials of an SAE as a small file that others can load.

| format | what it is | who loads it |
|---|---|---|
| safetensors | the whole edit: vectors, how features are read, laws | `sae.steering.load_edit` |
| vector | Σ c·W_dec as a Direction; "1x" is the edit | `sae.steering.Direction.load`, then `steer` |
| gguf | the same vector as direction.L | llama.cpp's `--control-vector` |

Cost: a safetensors file needs no host; the others load it, and `vector` runs it over 32 texts for its typical norm.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.autoencoder import SAE
from sae.dials import Dial, Dials, parse_dials
from sae.errors import UserError, nearest
from sae.finding import host_of
from sae.formats import EDITS, control_vector, edit
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
