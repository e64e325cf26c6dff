"""`steer`: a handle that turns a host's features up and down, and always lets go of it.

`with steer(host, sae, {1286: "5x"}): host.generate(...)` clamps feature 1286 to 5 times its recorded maximum;
`.attach()`/`.remove()` do the same without a block, `.set({1286: "2x"})` changes the dials of what is attached (the
hook stays, so compiled models stay valid), `.edits` goes into `host.generate(edits=)`, `.hooks()` is a plain
TransformerLens list for `host.bridge.run_with_hooks`. Handles add up: `steer(…) + steer(…)` steers by both, at one
hook each from the unsteered x; nested blocks see what the outer ones wrote. Whatever is wrong with a request is raised
before anything is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.dials import Dial, Dials, parse_condition, parse_dials, parse_strength
from sae.errors import UserError
from sae.host import HookFn, Host, Pass
from sae.interventions import Edit, Part, Watch, direction_part, feature_part, gate_of
from sae.steering.directions import Direction
from sae.where import Positions, Schedule, Where, schedule

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Turned:
    """What a handle turns, for whoever shows it: dials as they are written, and which features of which SAE are not
    off (a direction has none)."""

    dials: tuple[str, ...]
    sae: SAE | None = None
    features: tuple[int, ...] = ()


class Steering:
    """Prepared edits, one a hook. With every dial off they have no parts and `edits` is empty."""

    def __init__(
        self,
        host: Host,
        edits: dict[str, Edit],
        watches: Sequence[tuple[str, Watch]] = (),
        again: Callable[[Dials | float], tuple[Part | None, Turned]] | None = None,
        turned: Sequence[Turned] = (),
    ):
        self.host = host
        self._edits = edits
        self._watches = list(watches)
        self._again = again
        self.turned = tuple(turned)
        self._block: Any = None

    def __repr__(self) -> str:
        dials = [dial for one in self.turned for dial in one.dials]
        return f"Steering({', '.join(dials)}{'; attached' if self.is_attached else ''})"

    @property
    def edits(self) -> list[tuple[str, HookFn]]:
        """(hook, fn) pairs as `host.hooks` and `host.generate` take them; watches first, they read the unsteered x."""
        return [*self._watches, *((hook, edit) for hook, edit in self._edits.items() if edit.parts)]

    def set(self, dials: Dials | float) -> None:
        """Other dials from the next forward on, of the same SAE or direction; where they are wrong, nothing changes."""
        if self._again is None:
            raise UserError("steering: a sum of handles has no dials of its own. Call set() on one of them before.")
        part, turned = self._again(dials)
        (edit,) = self._edits.values()
        edit.parts = () if part is None else (part,)
        self.turned = (turned,)

    def __add__(self, other: Steering) -> Steering:
        if other.host is not self.host:
            raise UserError(f"steering: handles for two hosts ({self.host.name}, {other.host.name}) do not add up.")
        edits = {hook: Edit(edit.parts) for hook, edit in self._edits.items()}
        for hook, edit in other._edits.items():
            edits[hook] = Edit((*edits[hook].parts, *edit.parts) if hook in edits else edit.parts)
        return Steering(self.host, edits, [*self._watches, *other._watches], turned=self.turned + other.turned)

    @property
    def is_attached(self) -> bool:
        return self._block is not None

    def attach(self) -> Steering:
        """Steer everything the host computes until `remove()`."""
        if self._block is not None:
            raise UserError("steering: this handle is attached already. Call remove() first, or make a second one.")
        block = self.host.hooks([*self._watches, *self._edits.items()])
        block.__enter__()
        self.host.held.append(block)  # a handle that nobody keeps would let go of the host
        self._block = block
        return self

    def remove(self) -> None:
        """Let go of the host; doing it twice is harmless."""
        block, self._block = self._block, None
        if block is not None:
            self.host.held.remove(block)
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
        parts = [part for edit in self._edits.values() for part in edit.parts]
        if tokens is None and (self._watches or any(part.where.needs_pass or part.plan for part in parts)):
            raise UserError("hooks: positions, schedules and abort_when need to know the forward. Give hooks(tokens).")
        return [(name, _bridge_hook(edit, tokens, attention_mask)) for name, edit in self.edits]


def _bridge_hook(edit: HookFn, tokens: Tensor | None, attention_mask: Tensor | None) -> Callable[..., Tensor]:
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
    dials: Dials | float | None = None,
    *,
    rows: Sequence[Dials] | None = None,
    kind: str = "clamp",
    positions: Positions = "all",
    when: str | Sequence[str] = (),
    plan: str | Schedule | None = None,
    abort_when: str | Sequence[str] = (),
    select: str | None = None,
    special: bool = False,
    force: bool = False,
) -> Steering:
    """Prepare to steer `host` by features of `sae` (an SAE, its folder, or a Direction).

    dials       {1286: "5x"}, "1286=5x,77+=2" or a list of such (the user's labels may stand for numbers); "5x" is five
                times the recorded maximum, a plain number raw units, "0x" ablation, "off" unsteered. Signs of their
                own: += add, *= multiply, >= at least, <= at most. For a Direction one strength
    rows        in place of dials: other dials for each row of a batch
    kind        what a plain "=" does: clamp · add · scale (strength is the factor) · ablate · floor · ceil. A Direction
                is added by "clamp", as with every peer, and taken out of x by "ablate"
    positions   all · prompt (chat template included) · generated · last · "4:", or a function Pass → [B, T] bool
    when        only where these conditions hold ("77>0.5x"; several: all of them), of the unsteered x
    plan        how much of the edit each generated token gets: "ramp:20", "fade:20", "first:20" or n → weight
    abort_when  `host.generate` ends a row one token after a generated one where these conditions hold
    select      "topk" or "threshold": how activations are read; None is the architecture's own rule
    special     also edit special tokens, padding, the first position and outlier-norm positions
    force       steer although the SAE was made on another model of the same width
    """
    plan = schedule(plan) if isinstance(plan, str) else plan
    if isinstance(sae, str | Path):
        sae = SAE.load(sae)
    if isinstance(sae, Direction):
        return _by_direction(host, sae, dials, kind, Where(positions, special, host.special_ids, sae.outlier_norm),
                             plan, force)  # fmt: skip
    about, own = sae.cfg.metadata, sae
    hook = fitting_hook(host, about.hook_name, sae.cfg.d_in, about.host_fingerprint, "SAE", force)
    where = Where(positions, special, host.special_ids, about.outlier_norm)
    conditions, ends = (
        [parse_condition(text, sae.labels) for text in ([given] if isinstance(given, str) else given)]
        for given in (when, abort_when)
    )

    def part(dials: Dials | float | Sequence[Dials] | None) -> tuple[Part | None, Turned]:
        if dials is None or isinstance(dials, float | int):
            raise UserError(f"dials: {dials} names no feature. Write FEATURE=STRENGTH, for example 1286=5x.")
        parsed = (
            parse_dials(dials, own.labels, kind)  # pyright: ignore[reportArgumentType]
            if rows is None
            else [parse_dials(row, own.labels, kind) for row in dials]  # pyright: ignore[reportArgumentType]
        )
        flat = [dial for one in parsed for dial in ([one] if isinstance(one, Dial) else one)]
        told = dict.fromkeys(f"{dial} ({own.labels[dial.feature]})" if dial.feature in own.labels else f"{dial}"
                             for dial in flat)  # fmt: skip
        live = dict.fromkeys(dial.feature for dial in flat if dial.amount is not None)
        turned = Turned(tuple(told), own, tuple(live))
        return feature_part(own, parsed, where, select=select, when=conditions, plan=plan), turned

    if rows is not None and dials is not None:
        raise UserError("steer: dials and rows are given. Give one of them.")
    made, turned = part(dials if rows is None else rows)
    stop = gate_of(sae, ends, select)
    watches = [] if stop is None else [(hook, Watch(stop, Where("generated", False, where.special_ids)))]
    return Steering(host, {hook: Edit(() if made is None else (made,))}, watches, part, [turned])


def _by_direction(
    host: Host, direction: Direction, dials: Any, kind: str, where: Where, plan: Schedule | None, force: bool
) -> Steering:
    hook = fitting_hook(host, direction.hook, direction.vector.shape[0], direction.host_fingerprint, "direction", force)

    def part(strength: Any) -> tuple[Part | None, Turned]:
        amount, per_max = parse_strength(strength)
        if amount is None:
            return None, Turned(("direction=off",))
        turned = Turned((f"direction={amount:.3g}{'x' if per_max else ''}",))
        raw = amount * (direction.max_act if per_max and kind not in ("scale", "ablate") else 1.0)
        kind_of = "add" if kind == "clamp" else kind
        return direction_part(direction.vector[None], [raw], where, kind=kind_of, plan=plan), turned

    made, turned = part(dials)
    return Steering(host, {hook: Edit(() if made is None else (made,))}, again=part, turned=[turned])


def fitting_hook(host: Host, hook: str, width: int, fingerprint: str | None, what: str, force: bool) -> str:
    """The hook's canonical name on this host, if what was made there (`what`, [width]) may be used on it."""
    name = host.hook(hook)
    if host.width(name) != width:
        raise UserError(
            f"{what}: made for {hook} of width {width}, {host.name} is {host.width(name)} wide there. "
            "Load the model it was made on."
        )
    if not force and not host.is_own(fingerprint):
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
