"""`steer`: a handle that turns a host's features up and down, and always lets go of it.

`with steer(host, sae, {1286: "5x"}): host.generate(...)` clamps feature 1286 to 5 times its recorded maximum;
`.attach()`/`.remove()` do the same without a block, `.edits` goes into `host.generate(edits=)`, `.hooks()` is
a plain TransformerLens list for `host.bridge.run_with_hooks`. Whatever is wrong with a request is raised
before anything is attached. Blocks nest: each sees what the outer ones wrote at its hook.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.host import Host, Pass
from sae.interventions import (
    Dials,
    Edit,
    Positions,
    Where,
    direction_edit,
    feature_edit,
    parse_dials,
    parse_strength,
)
from sae.steering.directions import Direction

if TYPE_CHECKING:
    from jaxtyping import Int


class Steering:
    """A prepared edit of one hook; `edits` is empty when every dial is off (nothing is attached)."""

    def __init__(self, host: Host, hook: str, edit: Edit | None):
        self.host = host
        self.hook = hook
        self.edits: list[tuple[str, Edit]] = [] if edit is None else [(hook, edit)]
        self._block: Any = None

    def attach(self) -> Steering:
        """Steer everything the host computes until `remove()`."""
        if self._block is not None:
            raise UserError("steering: this handle is attached already. Call remove() first, or make a second one.")
        block = self.host.hooks(self.edits)
        block.__enter__()
        self._block = block
        return self

    def remove(self) -> None:
        """Let go of the host; doing it twice is harmless."""
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def __enter__(self) -> Steering:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def hooks(
        self, tokens: Int[Tensor, "B T"] | None = None, attention_mask: Int[Tensor, "B T"] | None = None
    ) -> list[tuple[str, Callable[..., Tensor]]]:
        """The same edit as plain TransformerLens hooks, fn(tensor, hook), for `run_with_hooks(fwd_hooks=)`.

        Such hooks see no token ids. Give the forward's `tokens` (and its mask where it is padded) and the
        list is for that forward only, equal to the host's own path. Without them every position but the first
        of a longer input is steered, special tokens too, and prompt and generated positions cannot be told
        apart.
        """
        return [(name, _bridge_hook(edit, tokens, attention_mask)) for name, edit in self.edits]


def _bridge_hook(edit: Edit, tokens: Tensor | None, attention_mask: Tensor | None) -> Callable[..., Tensor]:
    if tokens is None and edit.where.positions != "all":
        raise UserError(f"hooks: positions={edit.where.positions!r} needs to know the forward. Give hooks(tokens).")
    if tokens is not None and attention_mask is not None and attention_mask.shape != tokens.shape:
        raise UserError(
            f"hooks: tokens are {list(tokens.shape)}, attention_mask is {list(attention_mask.shape)}. "
            "Give one mask entry a token."
        )

    def bridge_hook(tensor: Tensor, hook: object = None) -> Tensor:
        B, T = tensor.shape[:2]
        if tokens is None:
            ids = torch.full((B, T), -1, device=tensor.device)
            past = 0 if T > 1 else 1  # one position alone is a cached decoding step
        else:
            if tuple(tokens.shape) != (B, T):
                raise UserError(f"hooks: made for tokens {list(tokens.shape)}, used on {[B, T]}. Make them anew.")
            ids, past = tokens, 0
        at = Pass(tokens=ids, past=past, attention_mask=attention_mask, generating=False, prompt_length=past + T)
        new = edit(tensor, at)
        return tensor if new is None else new

    return bridge_hook


def steer(
    host: Host,
    sae: SAE | Direction | str | Path,
    dials: Dials | float,
    *,
    kind: str = "clamp",
    positions: Positions = "all",
    select: str | None = None,
    special: bool = False,
    force: bool = False,
) -> Steering:
    """Prepare to steer `host` by features of `sae` (an SAE, its folder, or a Direction).

    dials      {1286: "5x"}, "1286=5x,77=0x" or a list of such (the user's labels may stand for numbers); "5x" is five
               times the recorded maximum, a plain number raw units, "0x" ablation, "off" unsteered. For a Direction one
               strength
    kind       clamp · add · scale (strength is the factor) · ablate; a Direction is always added
    positions  all · prompt (chat template included) · generated · last, or a function Pass → [B, T] bool
    select     "topk" or "threshold": how activations are read; None is the architecture's own rule
    special    also edit special tokens, padding, the first position and outlier-norm positions
    force      steer although the SAE was made on another model of the same width
    """
    if isinstance(sae, str | Path):
        sae = SAE.load(sae)
    if isinstance(sae, Direction):
        hook = fitting_hook(host, sae.hook, sae.vector.shape[0], sae.host_fingerprint, "direction", force)
        where = Where(positions, special, host.special_ids, sae.outlier_norm)
        amount, per_max = parse_strength(dials)  # pyright: ignore[reportArgumentType]  (it explains)
        if amount is None:
            return Steering(host, hook, None)
        raw = amount * (sae.max_act if per_max else 1.0)
        return Steering(host, hook, direction_edit(sae.vector, raw, where))
    if isinstance(dials, float | int):
        raise UserError(f"dials: {dials} names no feature. Write FEATURE=STRENGTH, for example 1286=5x.")
    about = sae.cfg.metadata
    hook = fitting_hook(host, about.hook_name, sae.cfg.d_in, about.host_fingerprint, "SAE", force)
    where = Where(positions, special, host.special_ids, about.outlier_norm)
    return Steering(host, hook, feature_edit(sae, parse_dials(dials, sae.labels), where, kind=kind, select=select))


def fitting_hook(host: Host, hook: str, width: int, fingerprint: str | None, what: str, force: bool) -> str:
    """The hook's canonical name on this host, if what was made there (`what`, [width]) may be used on it."""
    name = host.hook(hook)
    if host.width(name) != width:
        raise UserError(
            f"{what}: made for {hook} of width {width}, {host.name} is {host.width(name)} wide there. "
            "Load the model it was made on."
        )
    if fingerprint and fingerprint != host.fingerprint and not force:
        raise UserError(
            f"{what}: made on host {fingerprint} at {hook} (width {width}), this host ({host.name}) is "
            f"{host.fingerprint}. Load that model, or pass force to use it all the same."
        )
    return name


def side_by_side(
    host: Host,
    steering: Steering,
    prompt: Any,
    *,
    stream_plain: Callable[[str], None] | None = None,
    stream_steered: Callable[[str], None] | None = None,
    **sampling: Any,
) -> tuple[Any, Any]:
    """The unsteered and the steered answer to one prompt, in this order, with the same seed and sampling.

    `sampling` goes to `host.generate` (max_new_tokens, temperature, top_p, seed, system, …).
    """
    plain = host.generate(prompt, stream=stream_plain, **sampling)
    steered = host.generate(prompt, stream=stream_steered, edits=steering.edits, **sampling)
    return plain, steered
