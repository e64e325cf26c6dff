"""Edits at a hook: clamp, add, scale and ablate features, or add a direction.

Every edit is x + Σ coefficient_i · vector_i, all coefficients read from the unsteered x: features do not
disturb each other, and the SAE's error term stays by construction. Strengths are raw units (decoder rows have
length 1) or multiples of a feature's recorded maximum ("5x"). Arithmetic is float32, the result has x's
dtype. Left alone, bit for bit, unless `special=True`: special tokens, padding, the first real position of a
row and of each document packed in it (attention sinks), and positions whose norm is above the SAE's outlier
limit. Cost a position: reading n features (one encoder row each by threshold, which is JumpReLU's and
ReLU's own rule; plain TopK ranks them against the rest), then n·d multiply-adds. An edit later in a stack
at one hook sees what the earlier ones wrote.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.errors import UserError, nearest
from sae.host import Pass
from sae.labels import feature_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KINDS = ("clamp", "add", "scale", "ablate")
POSITIONS = ("all", "prompt", "generated", "last")

_STRENGTH = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(x|×)?", re.IGNORECASE)

Strength = str | float | int
_MOST = 1e6  # the largest strength; float32 arithmetic stays finite far beyond any use

Dials = str | Mapping[int, Strength] | Mapping[str, Strength] | Iterable[str]
Positions = str | Callable[["Pass"], Tensor]


@dataclass(frozen=True)
class Dial:
    """One feature's setting: `amount` in raw units, or in multiples of its maximum (`per_max`); None: off."""

    feature: int
    amount: float | None
    per_max: bool = False

    def __str__(self) -> str:
        if self.amount is None:
            return f"{self.feature}=off"
        return f"{self.feature}={self.amount:g}{'x' if self.per_max else ''}"


def parse_strength(strength: Strength) -> tuple[float | None, bool]:
    """(amount, per_max) of "5x", "-2x", "0x", 12.5, "12.5" or "off"; off has no amount."""
    text = str(strength).strip()
    if text.lower() == "off":
        return None, False
    match = _STRENGTH.fullmatch(text)
    if match is None or not math.isfinite(float(match[1])):
        raise UserError(
            f"strength: '{text[:60]}' is not one. Write 5x (times the feature's maximum), 12.5 (raw units), "
            "0x (ablation) or off."
        )
    if abs(float(match[1])) > _MOST:
        raise UserError(
            f"strength: '{text[:60]}' is too large. Give at most {_MOST:,.0f}; often 0.5x to 1.5x is enough."
        )
    return float(match[1]), match[2] is not None


def parse_dial(text: str) -> Dial:
    """A dial as it is written on a command line: "1286=5x"."""
    feature, equals, strength = text.partition("=")
    if not equals:
        raise UserError(f"dial: '{text}' has no '='. Write FEATURE=STRENGTH, for example 1286=5x.")
    return Dial(_feature_number(feature), *parse_strength(strength))


def parse_dials(dials: Dials, labels: Mapping[int, str] | None = None) -> list[Dial]:
    """Dials of "1286=5x, 77=0x" (commas or spaces), of a list of such, or of {1286: "5x"}; "off" alone: none.

    labels   names that may stand for numbers: a whole label in a string, in a list or a mapping also part of one
    """
    if isinstance(dials, Mapping):
        parsed = [
            Dial(_feature_number(_numbered(str(feature), labels)), *parse_strength(value))
            for feature, value in dials.items()
        ]
    else:
        words = (
            _unlabelled(dials, labels)
            if isinstance(dials, str)
            else ",".join(_unlabelled(dial, labels, part=True) for dial in dials)
        )
        if words.strip().lower() == "off":
            return []
        parsed = [parse_dial(word) for word in re.split(r"[,\s]+", re.sub(r"\s*=\s*", "=", words)) if word]
    if not parsed:
        raise UserError("dials: none given. Write FEATURE=STRENGTH, for example 1286=5x.")
    seen: set[int] = set()
    for dial in parsed:
        if dial.feature in seen:
            raise UserError(f"dials: feature {dial.feature} is set twice. Give each feature once.")
        seen.add(dial.feature)
    return parsed


def _unlabelled(text: str, labels: Mapping[int, str] | None, *, part: bool = False) -> str:
    """Dials with numbers in place of labels."""
    for feature, label in sorted((labels or {}).items(), key=lambda known: -len(known[1])):
        pattern = rf"(?:(?<=[,\s])|(?<!.)){re.escape(label)}(?=\s*=)"
        text = re.sub(pattern, str(feature), text, flags=re.IGNORECASE)
    name, sign, strength = text.rpartition("=")
    return f"{_numbered(name, labels)}={strength}" if part and sign and "=" not in name else text


def _numbered(name: str, labels: Mapping[int, str] | None) -> str:
    """The number of a label; anything else as it is, for the message about it."""
    name = name.strip()
    plain = not labels or not name or re.fullmatch(r"[-+]?\d+", name)
    return name if plain else str(feature_of(name, labels or {}))


def _feature_number(feature: str | int) -> int:
    text = str(feature).strip()
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise UserError(f"dial: '{text[:60]}' is not a feature's number. Write FEATURE=STRENGTH, for example 1286=5x.")
    return int(text)


def raw_amount(dial: Dial, sae: SAE, kind: str = "clamp") -> float:
    """A dial's amount in raw units ('scale': the factor itself), after a check of range and statistics."""
    sae.check_features([dial.feature])
    assert dial.amount is not None, "an off dial has no amount"
    if not dial.per_max or dial.amount == 0 or kind in ("scale", "ablate"):
        return dial.amount
    if sae.stats is None:
        raise UserError(
            f"{dial}: the SAE's folder has no feature statistics to take multiples of (`sae train` writes them). "
            f"Give the strength in raw units: {dial.feature}=12.5."
        )
    maximum = float(sae.stats.max_act[dial.feature])
    if maximum <= 0:
        raise UserError(
            f"{dial}: the feature never fired in {sae.stats.n_tokens} tokens, so it has no maximum. Give the "
            f"strength in raw units ({dial.feature}=12.5) or choose a living feature."
        )
    return dial.amount * maximum


@dataclass(frozen=True)
class Where:
    """Which positions an edit touches.

    positions     all · prompt · generated · last (of the prompt), or a function Pass → [B, T] bool
    special       include special tokens, padding, the first real position of a text and outlier-norm positions
    special_ids   the host's; outlier_norm the SAE's limit on ‖x‖, None where it has none
    """

    positions: Positions = "all"
    special: bool = False
    special_ids: frozenset[int] = frozenset()
    outlier_norm: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions not in POSITIONS:
            raise UserError(
                f"positions: '{self.positions}' is not one of {', '.join(POSITIONS)}"
                f"{nearest(self.positions, POSITIONS)}. Choose one of them."
            )

    def columns(self, at: Pass) -> tuple[int, int]:
        """The columns [start, stop) of this forward that `positions` names."""
        T, past, prompt = at.tokens.shape[1], at.past, at.prompt_length
        start, stop = {
            "prompt": (0, prompt),
            "generated": (prompt, past + T),
            "last": (prompt - 1, prompt),
        }.get(self.positions if isinstance(self.positions, str) else "all", (0, past + T))
        return min(max(start - past, 0), T), min(max(stop - past, 0), T)

    def mask(self, x: Float[Tensor, "B T d"], at: Pass, start: int, stop: int) -> Bool[Tensor, "B t"] | None:
        """Which of the columns [start, stop) are edited; None when all are."""
        kept: list[Tensor] = []
        if callable(self.positions):
            kept.append(self.positions(at)[:, start:stop].to(x.device))
        if not self.special:
            kept.extend(self._ordinary(x, at, start, stop))
        if not kept:
            return None
        mask = kept[0]
        for other in kept[1:]:
            mask = mask & other
        return mask

    def _ordinary(self, x: Tensor, at: Pass, start: int, stop: int) -> Iterable[Tensor]:
        if self.special_ids:
            ids = _on_device(self.special_ids, at.tokens.device)
            yield ~torch.isin(at.tokens[:, start:stop], ids).to(x.device)
        columns = torch.arange(at.past + start, at.past + stop, device=x.device)
        if at.doc is not None:
            continues = torch.zeros_like(at.doc, dtype=torch.bool)
            continues[:, 1:] = (at.doc[:, 1:] == at.doc[:, :-1]) & (at.doc[:, 1:] >= 0)
            yield continues[:, start:stop].to(x.device)
        elif at.attention_mask is None:
            if at.past == 0 and start == 0:
                yield (columns > 0).expand(x.shape[0], -1)
        else:
            real = at.attention_mask.to(x.device) > 0
            first = real.to(torch.int8).argmax(dim=1, keepdim=True)
            yield real[:, at.past + start : at.past + stop] & (columns > first)
        if self.outlier_norm is not None:
            yield x[:, start:stop].float().norm(dim=-1) <= self.outlier_norm


@functools.lru_cache
def _on_device(ids: frozenset[int], device: torch.device) -> Tensor:
    """Token ids as a tensor, kept: a copy to the device for each decoded token would wait for it."""
    return torch.tensor(sorted(ids), device=device)


def coefficients(kind: str, acts: Float[Tensor, "N n"] | None, amounts: Float[Tensor, " n"]) -> Tensor:
    """How much of each vector is added: clamp c − f, add c, scale (s − 1)·f, ablate −f."""
    if kind == "add":
        return amounts
    assert acts is not None, f"{kind} needs the features' activations"
    if kind == "clamp":
        return amounts - acts
    if kind == "scale":
        return (amounts - 1) * acts
    assert kind == "ablate", kind
    return -acts


@dataclass(frozen=True)
class Edit:
    """One edit at one hook, callable as a host's hook: (x [B, T, d], Pass) → new x, or None for no change.

    vectors [n, d] and amounts [n] are float32; `read` gives the n activations of rows [N, d] (None for add).
    """

    kind: str
    vectors: Float[Tensor, "n d"]
    amounts: Float[Tensor, " n"]
    where: Where
    read: Callable[[Float[Tensor, "N d"]], Float[Tensor, "N n"]] | None = None

    def __call__(self, x: Tensor, at: Pass) -> Tensor | None:
        start, stop = self.where.columns(at)
        if start >= stop:
            return None
        rows = x.flatten(2)[:, start:stop]  # hook_z of a bridge comes as [B, T, H, d_head]
        new = self.apply(rows.reshape(-1, rows.shape[-1])).view(rows.shape)
        mask = self.where.mask(x.flatten(2), at, start, stop)
        if mask is not None:
            new = torch.where(mask[..., None], new, rows)
        if rows.shape[1] == x.shape[1]:
            return new.view(x.shape)
        whole = x.flatten(2).clone()
        whole[:, start:stop] = new
        return whole.view(x.shape)

    def apply(self, rows: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
        """The edit on rows of activations, every one of them, in the rows' dtype."""
        vectors, amounts = self.vectors.to(rows.device), self.amounts.to(rows.device)
        acts = None if self.read is None else self.read(rows).to(rows.device, torch.float32)
        return (rows.float() + coefficients(self.kind, acts, amounts) @ vectors).to(rows.dtype)


def feature_edit(
    sae: SAE, dials: list[Dial], where: Where, *, kind: str = "clamp", select: str | None = None
) -> Edit | None:
    """The edit that sets these features of `sae`; None when every dial is off.

    select   how an activation is read: "topk" ranks it against all features (plain TopK only), "threshold"
             reads only the features' own encoder rows; None is the architecture's own rule
    """
    if kind not in KINDS:
        raise UserError(f"kind: '{kind}' is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}. Choose one of them.")
    rule = sae.check_select(select)
    sae.check_features([dial.feature for dial in dials])  # an off dial out of range is a mistake too
    live = [dial for dial in dials if dial.amount is not None]
    if not live:
        return None
    amounts = torch.tensor([raw_amount(dial, sae, kind) for dial in live], dtype=torch.float32)
    device = sae.device
    features = [dial.feature for dial in live]

    def read(rows: Tensor) -> Tensor:
        if rule == "topk" and device.type == "cpu":
            return ranked_acts(sae, rows.to(device), features)
        return sae.feature_acts(rows.to(device), features, select=rule)

    vectors = sae.W_dec.detach()[features].float()
    return Edit(kind, vectors, amounts.to(device), where, None if kind == "add" else read)


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


def direction_edit(vector: Float[Tensor, " d"], amount: float, where: Where) -> Edit:
    """x + amount · vector/‖vector‖; needs no encoder."""
    unit = vector.detach().float() / vector.detach().float().norm()
    return Edit("add", unit[None], torch.tensor([amount], device=unit.device), where)


def row_edit(
    sae: SAE | None,
    which: Sequence[int] | Float[Tensor, "B d"],
    amounts: Sequence[float] | Float[Tensor, " B"],
    where: Where,
) -> Callable[[Tensor, Pass], Tensor | None]:
    """An edit with a dial of its own in each row of a batch: row i of every forward has `which[i]` at `amounts[i]`.

    which     features of `sae`, clamped to raw amounts and read by the SAE's thresholds (plain TopK: the calibrated
              one); or directions [B, d] (`sae` None), scaled to length 1 and added
    A row with the amount 0 is a clamp to 0 for a feature, and nothing for a direction. Rows may not leave the batch.
    """
    size = torch.as_tensor(amounts, dtype=torch.float32)
    if isinstance(which, Tensor) and which.ndim == 2:
        vectors = which.detach().float() / which.detach().float().norm(dim=1, keepdim=True)
        encoder, bias, floor = None, None, None
    else:
        assert sae is not None, "features need their SAE"
        rows = torch.as_tensor(sae.check_features([int(i) for i in which]), device=sae.device)
        sae.check_select("threshold")
        vectors, encoder = sae.W_dec.detach()[rows].float(), sae.encoder.detach()[rows].float()
        bias = sae.b_enc.detach()[rows].float()
        floor = torch.zeros_like(bias) if sae.threshold is None else sae.threshold.detach()[rows].float().clamp_min(0)
    if len(vectors) != len(size):
        raise UserError(f"row_edit: {len(vectors):,} rows and {len(size):,} amounts. Give one amount a row.")

    def edit(x: Tensor, at: Pass) -> Tensor | None:
        start, stop = where.columns(at)
        if start >= stop:
            return None
        if len(x) != len(vectors):
            raise UserError(f"row_edit: made for {len(vectors):,} rows, this forward has {len(x):,}. Make it anew.")
        part = x[:, start:stop].float()
        added = size.to(x.device)[:, None].expand(part.shape[:2])
        if encoder is not None:
            assert sae is not None and bias is not None and floor is not None
            pre = (sae.centred(part).float() * encoder[:, None]).sum(-1) + bias[:, None]
            added = added - torch.where(pre > floor[:, None], pre, 0.0)
        new = (part + added[..., None] * vectors.to(x.device)[:, None]).to(x.dtype)
        mask = where.mask(x, at, start, stop)
        whole = x.clone()
        whole[:, start:stop] = new if mask is None else torch.where(mask[..., None], new, x[:, start:stop])
        return whole

    return edit
