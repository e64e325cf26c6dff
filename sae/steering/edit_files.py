"""Dials as an edit that needs no SAE: its tensors and facts, the vector that comes nearest to it, and the door that
steers by such a file.

Whatever an edit loses on the way is told, one line each. A plain TopK SAE ranks a feature against all others, which
needs the whole SAE: its edit is read by the calibrated threshold. A vector adds the same everywhere: it is what "+="
does, and what a clamp does where the feature is silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.dials import Dial, Dials, raw_amount
from sae.errors import UserError
from sae.formats import edit as format_of_edits
from sae.host import Host
from sae.interventions import Edit, Part, Reading, check_one_scale, check_steerable, feature_part, reading
from sae.steering.handle import Steering, Turned, fitting_hook
from sae.where import Positions, Schedule, Where, schedule

if TYPE_CHECKING:
    from jaxtyping import Float


def load_edit(
    host: Host,
    path: str | Path,
    *,
    positions: Positions = "all",
    plan: str | Schedule | None = None,
    special: bool = False,
    force: bool = False,
) -> Steering:
    """Prepare to steer `host` by a file that `sae convert --to safetensors` wrote; keywords as of `steer`.

    Its dials are fixed: `set` is refused. Raises UserError for another file, a host of another width, and, without
    `force`, another host.
    """
    facts, tensors = format_of_edits.read(path)
    width = tensors["vectors"].shape[1]
    hook = fitting_hook(host, facts["hook"], width, facts["host_fingerprint"], f"{path}", force)
    limit = facts["outlier_norm"]
    where = Where(positions, special, host.special_ids, None if limit == "None" else float(limit))
    at = {name: tensor.to(host.device) for name, tensor in tensors.items()}
    read = None if facts["reading"] == "none" else Reading(at["encoder"], at["bias"], at["floor"])
    part = Part(at["vectors"], at["laws"], where, read, None, schedule(plan) if isinstance(plan, str) else plan)

    def again(dials: Dials | float) -> tuple[Part | None, Turned]:
        raise UserError(f"{path}: its dials are fixed. Convert the SAE once more with other ones.")

    return Steering(host, {hook: Edit((part,))}, again=again, turned=[Turned(tuple(facts["dials"].split(",")))])


def edit_of(sae: SAE, dials: Sequence[Dial]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(facts, tensors) of an edit file of dials that are on; its loss is among the facts. Raises UserError where a
    plain TopK SAE has no calibrated threshold and a dial looks at the activation."""
    about, features, lost = sae.cfg.metadata, [dial.feature for dial in dials], []
    if not about.hook_name:
        raise UserError("this SAE does not say at which hook it was trained. Write hook_name into its metadata.")
    check_one_scale(sae, "convert")
    part = feature_part(sae, dials, Where(), select="threshold" if sae.threshold is not None else None)
    assert part is not None, "a dial is on"
    if part.reading is not None and sae.architecture.selection == "dense":
        raise UserError(
            f"{dials[0]}: a {sae.cfg.architecture} SAE chooses features by a rule that needs all of them, which no "
            f"file says. Add with {features[0]}+=STRENGTH."
        )
    if part.reading is not None and sae.cfg.architecture == "topk":
        if sae.threshold is None:
            raise UserError(
                f"{dials[0]}: this TopK SAE ranks a feature against all others and has no calibrated threshold (`sae "
                f"train` writes one), so no file without it can read one. Add with {features[0]}+=STRENGTH."
            )
        lost.append(
            f"the SAE's own rule ranks a feature against all others (k={sae.cfg.k}) and needs the whole SAE: the file "
            "reads features by their calibrated threshold (steer's select='threshold')"
        )
    read = reading(sae, features)
    facts = {
        "hook": about.hook_name,
        "reading": "none" if part.reading is None else "threshold",
        "features": ",".join(map(str, features)),
        "kinds": ",".join(dial.kind for dial in dials),
        "dials": ",".join(map(str, dials)),
        "host": about.model_name,
        "host_fingerprint": about.host_fingerprint,
        "outlier_norm": str(about.outlier_norm),
        "lost": "\n".join(lost),
    }
    tensors = {"vectors": part.vectors, "encoder": read.encoder, "bias": read.bias, "floor": read.floor}
    return facts, {**tensors, "laws": part.laws}


def additive(sae: SAE, dials: Sequence[Dial]) -> tuple[Float[Tensor, " d"], list[str]]:
    """Σ cᵢ · W_dec[i] in raw units of dials that are on, and what it loses. Raises UserError for a dial that no vector
    comes near to: one that multiplies, ablates or limits."""
    check_steerable(sae)
    check_one_scale(sae, "convert")
    lost = []
    total = torch.zeros(sae.cfg.d_in)
    for dial in dials:
        amount = raw_amount(dial, sae)
        if dial.kind not in ("add", "clamp") or amount == 0:
            raise UserError(
                f"{dial}: what it does depends on what the feature has, a vector adds the same everywhere. "
                f"Take --to safetensors, or add with {dial.feature}+=STRENGTH."
            )
        if dial.kind == "clamp":
            lost.append(
                f"{dial}: a clamp takes off what the feature has (c − a), the vector adds c everywhere; "
                "exact only where the feature is silent"
            )
        total += amount * sae.W_dec[dial.feature].detach().float().cpu()
    if float(total.norm()) <= 1e-6 * max(abs(raw_amount(dial, sae)) for dial in dials):
        raise UserError(f"{','.join(map(str, dials))}: the dials cancel out. Give other strengths.")
    return total, lost
