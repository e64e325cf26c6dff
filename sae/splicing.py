"""SAEs in the place of what they read, on TransformerLens's bridge, with the hooks that SAELens's users know.

Promise: while `spliced` is open, the bridge's forwards have each SAE's reconstruction at its hook in place of the
activation, at every position (also at those that training left out: special tokens, outliers); a transcoder reads
`hook_name` and its output, skip connection included, stands at `hook_name_out`. With the error term what is put there
is reconstruction + (activation − reconstruction without anybody's hooks): bit for bit the activation as long as no hook
changes anything, and the effect of the change alone where one does.

Where it is written each SAE has hooks, under the SAE's own name of it, TransformerLens's and the bridge's:
    NAME.hook_sae_input       [B, T, d_in]   what is encoded; hook_z is flattened
    NAME.hook_sae_acts_pre    [B, T, d_sae]  before the selection (matching pursuit has none)
    NAME.hook_sae_acts_post   [B, T, d_sae]  dense activations
    NAME.hook_sae_recons      [B, T, d_out]  in the activation's own units
    NAME.hook_sae_error       [B, T, d_out]  with the error term only; a constant to autograd
    NAME.hook_sae_output      [B, T, d_out]  what takes the activation's place
A function there may change its tensor, in place too; a hook at NAME itself sees what flows on. Cost: one dense encode
and decode a forward; the clean reconstruction is computed again only from where a hook changed something.

Traps: an edit of hook_resid_mid reaches only the MLP on the bridge, whose ln2 reads it there; here the residual stream
is replaced, as in HookedTransformer, by what attention adds. The bridge runs on a module tree of its own: edits open in
`Host.hooks` do not reach it, and are refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.errors import UserError, nearest

if TYPE_CHECKING:
    from sae.host import Host

POINTS = (
    "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error", "hook_sae_output"
)  # fmt: skip


@contextlib.contextmanager
def spliced(host: Host, saes: SAE | Sequence[SAE], use_error_term: bool = False) -> Iterator[Any]:
    """The host's bridge with these SAEs in it until the block ends, whatever ends it.

    Raises UserError before anything is put there: a hook that the bridge has not or two SAEs at one, an SAE made on
    another host, edits open on the host; in the forward for one of another width.
    """
    if host.is_edited:
        raise UserError(
            "saes: edits are open on this host (host.hooks, or a steering handle), which the bridge does not have. "
            "Close them; a handle's hooks() goes into fwd_hooks."
        )
    bridge = host.bridge
    placed: dict[str, _Splice] = {}
    for sae in [saes] if isinstance(saes, SAE) else saes:
        if not isinstance(sae, SAE):
            raise UserError(f"saes: {sae!r} is a {type(sae).__name__}, no SAE. Give SAE.load(folder).")
        one = _Splice(sae, use_error_term, *_places(host, bridge, sae))
        if one.write in placed or f"{one.write}.hook_sae_output" in bridge.hook_dict:
            raise UserError(f"saes: two SAEs are at {one.write}. Give one a hook.")
        placed[one.write] = one
    added = {name: point for one in placed.values() for name, point in one.named(host).items()}
    hooks = [hook for one in placed.values() for hook in one.hooks(bridge.hook_dict)]
    try:
        bridge._hook_registry.update(added)  # what hook_dict, run_with_cache and run_with_hooks look names up in
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(bridge.hooks(fwd_hooks=hooks))
            except ValueError as error:  # one that is switched off
                raise UserError(f"saes: {' '.join(str(error).split())}") from error
            yield bridge
    finally:
        for name in added:
            bridge._hook_registry.pop(name, None)


def check_names(bridge: Any, names: Iterable[Any]) -> None:
    """Raise UserError for the name of a hook that the bridge has not now; filters that are functions pass."""
    known = bridge.hook_dict
    for name in names:
        if isinstance(name, str) and name not in known:
            raise UserError(f"hooks: {name!r} is no hook of this run{nearest(name, known) or '.'}")


def _places(host: Host, bridge: Any, sae: SAE) -> tuple[str, str]:
    """The bridge's names of the hooks at which an SAE reads and writes."""
    about, hooks = sae.cfg.metadata, bridge.hook_dict
    if not host.is_own(about.host_fingerprint):
        raise UserError(
            f"saes: the SAE at {about.hook_name} was made on host {about.host_fingerprint}, this host ({host.name}) "
            f"is {host.fingerprint}. Load that model."
        )
    names = []
    for name in (about.hook_name, sae.hook_out):
        known = name if name in hooks else host.hook(name)
        if known not in hooks:
            raise UserError(f"saes: TransformerLens's bridge of {host.name} has no hook {name}. Take another SAE.")
        names.append(hooks[known].name)
    return names[0], names[1]


@dataclass
class _Splice:
    """One SAE at its hooks; the tensors that a forward leaves here are gone when it has been written."""

    sae: SAE
    error: bool
    read: str
    write: str
    points: dict[str, Any] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # what a transcoder reads
    before: list[Tensor] = field(default_factory=list)  # resid_mid: the stream before attention

    def __post_init__(self) -> None:
        from transformer_lens.hook_points import HookPoint

        for name in POINTS:
            if name == "hook_sae_error" and not self.error:
                continue
            if name == "hook_sae_acts_pre" and self.sae.cfg.pursuit is not None:
                continue
            self.points[name] = HookPoint()
            self.points[name].name = f"{self.write}.{name}"

    def named(self, host: Host) -> dict[str, Any]:
        """Its hook points by all their names."""
        names = {self.write, self.sae.hook_out}
        with contextlib.suppress(UserError):  # a hook that only the bridge has
            names.add(host.hook(self.write))
        return {f"{name}.{point}": self.points[point] for name in sorted(names) for point in self.points}

    def hooks(self, known: dict[str, Any]) -> list[tuple[str, Any]]:
        """TransformerLens's hooks that do it."""
        found = [] if self.read == self.write else [(self.read, self._keep)]
        layer = re.match(r"blocks\.\d+\.", self.write)
        mid = known.get(f"{layer[0]}hook_resid_mid") if layer else None
        if layer is None or mid is None or mid.name != self.write:
            return [*found, (self.write, self._write)]
        return [*found, (f"{layer[0]}hook_resid_pre", self._pass), (f"{layer[0]}hook_attn_out", self._write_mid)]

    def _keep(self, x: Tensor, hook: object) -> None:
        self.kept[:] = [x]

    def _pass(self, x: Tensor, hook: object) -> None:
        self.before[:] = [x]

    def _write_mid(self, added: Tensor, hook: object) -> Tensor:
        before = self.before.pop()
        return self._write(before + added, hook) - before

    def _write(self, target: Tensor, hook: object) -> Tensor:
        """What takes the place of the activation `target`, in its shape, dtype and device."""
        if self.read != self.write and not self.kept:
            raise UserError(f"saes: a forward reaches {self.read} after {self.write}, or not at all. Swap the hooks.")
        whole = target.flatten(2)  # hook_z comes as [B, T, H, d_head]
        x = whole if self.read == self.write else self.kept.pop().flatten(2)
        for name, wide, own in (
            (self.read, x.shape[-1], self.sae.cfg.d_in),
            (self.write, whole.shape[-1], self.sae.d_out),
        ):
            if wide != own:
                raise UserError(f"saes: {name} is {wide:,} wide, the SAE there {own:,}. Load the model it was made on.")
        wide = torch.promote_types(x.dtype, self.sae.dtype)
        made = self._made(x.to(self.sae.device, wide), whole.to(self.sae.device))
        return made.to(target.device, target.dtype).view(target.shape)

    def _made(self, x: Tensor, target: Tensor) -> Tensor:
        sae = self.sae
        given = self._at("hook_sae_input", x)
        pre = sae.pre_activations(given) if "hook_sae_acts_pre" in self.points else None
        shown = None if pre is None else self._at("hook_sae_acts_pre", pre)
        acts = sae.encode(given) if shown is None else sae.select(shown)
        edited = self._at("hook_sae_acts_post", acts)
        recon = sae.decode(edited, given)
        out = self._at("hook_sae_recons", recon)
        if self.error:
            plain = acts if _same(given, x) and _same(shown, pre) else sae.encode(x)
            clean = recon if plain is acts and _same(edited, acts) else sae.decode(plain, x)
            error = (target - clean).detach()
            left = self._at("hook_sae_error", error)
            # in this order nothing is lost where out is clean
            out = target.detach() + (out - clean.detach()) if _same(left, error) else out + left
        return self._at("hook_sae_output", out)

    def _at(self, name: str, tensor: Tensor) -> Tensor:
        """What the hooks at a point make of a tensor, which itself stays as it is."""
        point = self.points[name]
        if not point.has_hooks():
            return tensor
        new = point(tensor.clone())
        if new.shape != tensor.shape:
            raise UserError(
                f"{point.name}: a hook function returned {list(new.shape)}, there is {list(tensor.shape)}. "
                "Keep the shape."
            )
        return new.to(tensor)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
