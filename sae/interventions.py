"""Edits at a hook: clamp, add, scale, ablate, raise or lower features or directions.

Every edit is x + Σ cᵢ · vᵢ with cᵢ = clip(constᵢ + slopeᵢ · aᵢ, lowᵢ, highᵢ), all activations aᵢ read from the
unsteered x: features do not disturb each other, and the SAE's error term stays by construction.

    clamp  c − a     floor  max(0, c − a)     add     c
    ablate   − a     ceil   min(0, c − a)     scale   (c − 1) · a

A direction's activation is x · v̂, below 0 too: ablating it takes the direction out of x. Strengths are raw units
(decoder rows have length 1), or units of its token's own scale for an SAE that norms each token by itself: then vᵢ is
as much longer. Arithmetic is float32, the result has x's dtype. Cost a position: reading n features (one
encoder row each by threshold, which is JumpReLU's and ReLU's own rule and the calibrated one of TopK; plain TopK's own
rule ranks them against the rest), then n·d multiply-adds. A second edit at one hook sees what the first wrote; parts of
one edit do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import token_norm
from sae.autoencoder import SAE
from sae.dials import Condition, Dial, raw_amount
from sae.errors import UserError
from sae.host import Pass
from sae.where import Schedule, Where, weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_INF = math.inf


def law(kind: str, amount: float) -> tuple[float, float, float, float]:
    """(const, slope, low, high) of a kind of edit."""
    return {
        "clamp": (amount, -1.0, -_INF, _INF),
        "floor": (amount, -1.0, 0.0, _INF),
        "ceil": (amount, -1.0, -_INF, 0.0),
        "add": (amount, 0.0, -_INF, _INF),
        "scale": (0.0, amount - 1.0, -_INF, _INF),
        "ablate": (0.0, -1.0, -_INF, _INF),
    }[kind]


_OFF = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Reading:
    """How activations of rows [N, d] are read: encoder rows, biases and what has to be exceeded; −inf reads all.

    by_sae   an SAE, features and the rule, read exactly in place of these rows where they do not suffice: TopK ranks a
             feature against the rest, as dense rules do, and a norm of each token is no row
    """

    encoder: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]
    floor: Float[Tensor, " m"]
    by_sae: tuple[SAE, Sequence[int], str] | None = None

    def __call__(self, rows: Float[Tensor, "N d"]) -> Float[Tensor, "N m"]:
        if self.by_sae is not None:
            sae, features, rule = self.by_sae
            if rule == "topk" and sae.device.type == "cpu":
                return ranked_acts(sae, rows, features).float()
            acts = sae.feature_acts(rows.to(sae.device), features, select=None if rule == "dense" else rule)
            return acts.to(rows.device, torch.float32)
        pre = torch.addmm(self.bias, rows, self.encoder.T)
        return pre * (pre > self.floor)


@dataclass(frozen=True)
class Gate:
    """An edit works only where its reading is above (or below) all these amounts."""

    reading: Reading
    amounts: Float[Tensor, " m"]
    above: Bool[Tensor, " m"]

    def __call__(self, rows: Float[Tensor, "N d"]) -> Bool[Tensor, " N"]:
        acts = self.reading(rows)
        return torch.where(self.above, acts > self.amounts, acts < self.amounts).all(dim=-1)


@dataclass(frozen=True)
class Part:
    """What is done to some vectors of one origin.

    vectors [n, d]; laws [4, n] (const, slope, low, high), or [4, B, n] with a law of its own for each row of a batch;
    reading None where no law looks at an activation; scaled: how the SAE norms each token, in whose units laws are
    """

    vectors: Float[Tensor, "n d"]
    laws: Float[Tensor, "4 n"] | Float[Tensor, "4 B n"]
    where: Where
    reading: Reading | None = None
    gate: Gate | None = None
    plan: Schedule | None = None
    scaled: str = "none"

    def added(self, rows: Float[Tensor, "B t d"], at: Pass, start: int, stop: int) -> Float[Tensor, "B t d"]:
        """What is added to the columns [start, stop) of x, `rows`; 0 where the edit does not work."""
        B, t, d = rows.shape
        laws = self.laws
        if laws.ndim == 3:
            if laws.shape[1] != B:
                raise UserError(
                    f"steering: made for {laws.shape[1]:,} rows, this forward has {B:,}. Give one set of dials a row."
                )
            laws = laws[:, :, None]
        const, slope, low, high = laws
        flat = rows.reshape(-1, d)
        if self.reading is None:
            size = const.expand(B, t, -1)
        else:
            size = torch.addcmul(const, slope, self.reading(flat).view(B, t, -1)).clamp(low, high)
        mask = self.where.mask(rows, at, start, stop)
        if self.gate is not None:
            fires = self.gate(flat).view(B, t)
            mask = fires if mask is None else mask & fires
        if self.plan is not None:
            size = size * torch.tensor(weights(self.plan, at, start, stop), device=rows.device)[:, None]
        if mask is not None:
            size = size * mask[..., None]
        new = size @ self.vectors
        return new if self.scaled == "none" else new * token_norm.scale(self.scaled, rows)


@dataclass
class Edit:
    """One edit at one hook, callable as a host's hook: (x [B, T, d], Pass) → new x, or None for no change.

    `parts` may be exchanged while it is attached.
    """

    parts: tuple[Part, ...] = ()

    def __call__(self, x: Tensor, at: Pass) -> Tensor | None:
        whole = x.flatten(2)  # hook_z of a bridge comes as [B, T, H, d_head]
        steered = None
        for part in self.parts:
            start, stop = part.where.columns(at)
            if start >= stop:
                continue
            added = part.added(whole[:, start:stop].float(), at, start, stop)
            if steered is None and added.shape[1] == whole.shape[1]:
                steered = whole + added
                continue
            if steered is None:
                steered = whole.to(torch.float32, copy=True)
            steered[:, start:stop] += added
        return None if steered is None else steered.to(x.dtype).reshape(x.shape)


class Watch:
    """Looks for a condition at generated tokens and changes nothing; `fired` [B] says in which rows it was met."""

    def __init__(self, gate: Gate, where: Where):
        self.gate, self.where = gate, where
        self.fired: Bool[Tensor, " B"] | None = None

    def __call__(self, x: Tensor, at: Pass) -> None:
        if at.past == 0 or self.fired is None or len(self.fired) != len(x):
            self.fired = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        start, stop = self.where.columns(at)
        if start >= stop:
            return
        rows = x.flatten(2)[:, start:stop].float()
        met = self.gate(rows.flatten(0, 1)).view(rows.shape[:2])
        mask = self.where.mask(rows, at, start, stop)
        self.fired = self.fired | (met if mask is None else met & mask).any(dim=1)


def feature_part(
    sae: SAE,
    dials: Sequence[Dial] | Sequence[Sequence[Dial]],
    where: Where,
    *,
    select: str | None = None,
    when: Sequence[Condition] = (),
    plan: Schedule | None = None,
) -> Part | None:
    """What sets these features of `sae`; None when every dial is off.

    dials    for all rows of a batch, or a list for each row
    select   how an activation is read: "topk" ranks it against all features (plain TopK only), "threshold" reads only
             the features' own encoder rows; None is the architecture's own rule
    Raises UserError for a transcoder, and for features and rules that this SAE has not.
    """
    check_steerable(sae)
    sae.check_select(select)
    by_row = [list(row) for row in dials if not isinstance(row, Dial)]
    common = [dial for dial in dials if isinstance(dial, Dial)]
    every = [dial for row in by_row for dial in row] + common
    sae.check_features([dial.feature for dial in every])  # an off dial out of range is a mistake too
    live = [dial for dial in every if dial.amount is not None]
    if not live:
        return None
    column = {feature: i for i, feature in enumerate(dict.fromkeys(dial.feature for dial in live))}
    laws = torch.tensor(_OFF)[:, None, None].repeat(1, max(1, len(by_row)), len(column))
    for i, row in enumerate(by_row or [common]):
        for dial in row:
            if dial.amount is not None:
                laws[:, i, column[dial.feature]] = torch.tensor(law(dial.kind, raw_amount(dial, sae)))
    vectors = sae.W_dec.detach()[list(column)].float()
    read = None if all(dial.kind == "add" for dial in live) else reading(sae, list(column), select)
    laws = (laws if by_row else laws[:, 0]).to(vectors.device)
    return Part(vectors, laws, where, read, gate_of(sae, when, select), plan, sae.cfg.normalize_activations)


def check_steerable(sae: SAE) -> None:
    """Raise UserError for a transcoder, which reads one hook and writes another."""
    if sae.cfg.d_out is not None:
        raise UserError(
            f"steer: this SAE is a transcoder: it reads {sae.cfg.metadata.hook_name} and writes {sae.hook_out}, and an "
            "edit has one hook. Change its activations with host.run_with_hooks_with_saes, at "
            f"{sae.hook_out}.hook_sae_acts_post."
        )


def check_one_scale(sae: SAE, what: str) -> None:
    """Raise UserError where a strength is another length at each token."""
    kind = sae.cfg.normalize_activations
    if kind != "none":
        raise UserError(
            f"{what}: this SAE norms each token by itself ({kind}), so a strength has no one length. Use `sae steer` "
            "with a strength of your own."
        )


def reading(sae: SAE, features: Sequence[int], select: str | None = None) -> Reading:
    """How these features are read; their rows are copied, b_dec folded into the bias, float32."""
    rule, which = sae.check_select(select), torch.as_tensor(features, device=sae.device)
    encoder, bias = sae.encoder.detach()[which].float(), sae.b_enc.detach()[which].float()
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - encoder @ sae.b_dec.detach().float()
    floor = torch.zeros_like(bias) if sae.threshold is None else sae.threshold[which].float().clamp_min(0)
    by_rows = rule == "threshold" and sae.cfg.normalize_activations == "none"
    return Reading(encoder, bias, floor, None if by_rows else (sae, features, rule))


def gate_of(sae: SAE, when: Sequence[Condition], select: str | None = None) -> Gate | None:
    """The conditions on features of `sae` as one gate; None without any."""
    if not when:
        return None
    amounts = torch.tensor([raw_amount(one, sae) for one in when], device=sae.device)
    above = torch.tensor([one.above for one in when], device=sae.device)
    return Gate(reading(sae, [one.feature for one in when], select), amounts, above)


def direction_part(
    vectors: Float[Tensor, "n d"],
    amounts: Sequence[float] | Float[Tensor, " n"],
    where: Where,
    *,
    kind: str = "add",
    by_row: bool = False,
    plan: Schedule | None = None,
) -> Part:
    """What is done to directions, each scaled to length 1; `by_row`: row i of a batch has direction i alone."""
    unit = vectors.detach().float()
    unit = unit / unit.norm(dim=1, keepdim=True)
    each = torch.tensor([law(kind, float(amount)) for amount in amounts]).T
    if len(unit) != each.shape[1]:
        raise UserError(
            f"steering: {len(unit):,} directions and {each.shape[1]:,} amounts. Give one amount a direction."
        )
    laws = torch.stack([torch.diag(one) for one in each]) if by_row else each
    zero = torch.zeros(len(unit), device=unit.device)
    read = None if kind == "add" else Reading(unit, zero, torch.full_like(zero, -_INF))
    return Part(unit, laws.to(unit.device), where, read, None, plan)


def ranked_acts(sae: SAE, x: Float[Tensor, "N d"], features: Sequence[int], chunk: int = 1024) -> Float[Tensor, "N n"]:
    """`sae.feature_acts(x, features)` of a plain TopK SAE, reading only as much of the encoder as decides it.

    A feature is silent as soon as its pre-activation is not above 0 or k others are above it; mostly the
    first chunks settle that (F=16384, d=576, one position, one thread, random weights: 0.04-0.4 ms for a
    clearly silent feature, 4.6 ms for a firing one, as much as the full product). It waits for an answer
    after each chunk, so it is for the CPU; a GPU is faster without the question.
    """
    k = sae.cfg.k
    assert k is not None, "a TopK SAE has k"
    own = sae.pre_activations(x, torch.as_tensor(features, device=sae.device))
    above = torch.zeros(own.shape, dtype=torch.int64, device=own.device)
    for start in range(0, sae.cfg.d_sae, chunk):
        if not ((own > 0) & (above < k)).any():
            break
        others = sae.pre_activations(x, slice(start, start + chunk))
        for i, feature in enumerate(features):
            higher = others > own[:, i, None]
            if start <= feature < start + chunk:
                higher[:, feature - start] = False  # itself, rounded otherwise in another product
            above[:, i] += higher.sum(dim=1)
    return own.relu() * (above < k)
