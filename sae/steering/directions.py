"""Directions of any origin, to be steered by the door that features go through.

A Direction is a unit vector at a hook with the two scales its strength is told in: its own largest projection
on the concept's texts ("2x") and the typical norm of the host's activations there (`share`). Only ordinary
positions count: no special tokens, not the first of a text, no outlier norms (above ten medians). One forward
a text; sums in float64.

| function | which vector | source |
|---|---|---|
| `difference_of_means` | mean of all tokens with the concept less mean without | AxBench's DiffMean (Wu et al. 2025) |
| `contrastive_addition` | mean over pairs of the difference at the last token | CAA (Rimsky et al. 2024) |
| `pca_of_pairs` | first component of the pairs' centred differences | RepE (Zou et al. 2023) |
| `probe` | weight of a logistic regression on mean activations | |
| `unembedding` | what makes a token likely, read through the final norm | |
| `of_feature` | decoder row of a feature | |
| `of_vector` | a vector of the user's own | |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import files
from sae.autoencoder import SAE
from sae.documents import documents
from sae.errors import UserError
from sae.features.lens import unembedding_rows
from sae.features.logistic import logistic
from sae.host import Host

if TYPE_CHECKING:
    from jaxtyping import Float

_FORMAT = "goldengate-direction-1"


@dataclass(frozen=True, repr=False)
class Direction:
    """`vector` [d] of length 1; `max_act` and `norm` (median ‖x‖) in raw units."""

    hook: str
    vector: Float[Tensor, " d"]
    max_act: float
    norm: float
    host_fingerprint: str = ""
    outlier_norm: float | None = None

    def __repr__(self) -> str:
        return f"Direction({self.hook}, {len(self.vector)} wide, max_act={self.max_act:.3g}, norm={self.norm:.3g})"

    def share(self, fraction: float) -> float:
        """The raw strength that adds a vector of this share of the typical norm (0.5 is a good start)."""
        return fraction * self.norm

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """One safetensors file, whole or not at all; `notes` go into its metadata."""
        facts = {"format": _FORMAT, "hook": self.hook, "max_act": self.max_act, "norm": self.norm,
                 "host_fingerprint": self.host_fingerprint, "outlier_norm": self.outlier_norm}  # fmt: skip
        metadata = {**(notes or {}), **{k: str(v) for k, v in facts.items()}}
        files.write_safetensors(path, {"vector": self.vector.contiguous()}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """What `save` wrote. Raises UserError for any other file."""
        tensors, facts = files.read_safetensors(path)
        if facts.get("format") != _FORMAT or "vector" not in tensors:
            raise UserError(f"{path}: is not a direction that Direction.save wrote. Give of_vector() a bare vector.")
        vector = tensors["vector"]
        try:
            limit = None if facts["outlier_norm"] == "None" else float(facts["outlier_norm"])
            scales = float(facts["max_act"]), float(facts["norm"])
            hook, host = facts["hook"], facts["host_fingerprint"]
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: its facts are damaged ({error}). Save the direction again.") from error
        numbers = torch.tensor([*scales, *([] if limit is None else [limit]), float(vector.float().norm())])
        if vector.ndim != 1 or not bool(numbers.isfinite().all()) or numbers[-1] == 0:
            raise UserError(f"{path}: is not one vector of finite length and scales. Save the direction again.")
        return cls(hook, vector, *scales, host, limit)


def difference_of_means(
    host: Host, hook: str, positive: Sequence[str], negative: Sequence[str], *, context: int = 128
) -> Direction:
    """Unit difference of mean activations, texts with a concept minus texts without (AxBench's DiffMean)."""
    with_it, without = _read(host, hook, positive, negative, context)
    difference = _pooled(with_it) - _pooled(without)
    return _made(host, hook, difference, with_it, without)


def contrastive_addition(
    host: Host, hook: str, positive: Sequence[str], negative: Sequence[str], *, context: int = 128
) -> Direction:
    """Mean over pairs of texts of the difference at their last token (CAA; Rimsky et al. 2024)."""
    with_it, without = _read(host, hook, positive, negative, context, paired=True)
    difference = torch.stack([a[-1].double() - b[-1].double() for a, b in zip(with_it, without, strict=True)])
    return _made(host, hook, difference.mean(dim=0), with_it, without)


def pca_of_pairs(
    host: Host, hook: str, positive: Sequence[str], negative: Sequence[str], *, context: int = 128
) -> Direction:
    """First principal component of the pairs' differences at the last token (RepE; Zou et al. 2023).

    Every second difference is taken with the other sign, so that the centring does not take the concept out; the
    component's sign is that of the mean difference.
    """
    with_it, without = _read(host, hook, positive, negative, context, paired=True)
    difference = torch.stack([a[-1].double() - b[-1].double() for a, b in zip(with_it, without, strict=True)])
    if len(difference) < 2:
        raise UserError("directions: one pair has no principal component. Give two pairs or more.")
    signed = difference * torch.tensor([1.0, -1.0]).repeat(len(difference))[: len(difference), None]
    component = torch.linalg.svd(signed - signed.mean(dim=0), full_matrices=False).Vh[0]
    sign = 1.0 if float(difference.mean(dim=0) @ component) >= 0 else -1.0
    return _made(host, hook, sign * component, with_it, without)


def probe(
    host: Host,
    hook: str,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    C: float = 0.01,
    context: int = 128,
) -> Direction:
    """Weight of a logistic regression that tells the texts' mean activations apart, in raw units; C is its inverse
    penalty on standardised activations."""
    with_it, without = _read(host, hook, positive, negative, context)
    X = torch.stack([rows.double().mean(dim=0) for rows in (*with_it, *without)])
    y = torch.arange(len(X)) < len(with_it)
    scale = X.std(dim=0).clamp_min(1e-12)
    weight = logistic(((X - X.mean(dim=0)) / scale), y, (C,))[0, :-1]
    return _made(host, hook, weight / scale, with_it, without)


def unembedding(host: Host, hook: str, token: str, texts: Sequence[str], *, context: int = 128) -> Direction:
    """What makes a token likely: its unembedding row through the final norm's linear part, less the vocabulary's mean.
    `texts` give the scales."""
    ids = host.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"directions: {token!r} is {len(ids)} tokens of this host. Give one; mind the leading space.")
    return of_vector(host, hook, unembedding_rows(host, ids)[0], texts, context=context)


def of_vector(
    host: Host, hook: str, vector: Float[Tensor, " d"], texts: Sequence[str], *, context: int = 128
) -> Direction:
    """A vector of any length and origin; `texts` give the scales."""
    rows = _read(host, hook, texts, texts, context)[0]
    return _made(host, hook, vector.double().cpu(), rows, [])


def of_feature(host: Host, sae: SAE, feature: int, texts: Sequence[str], *, context: int = 128) -> Direction:
    """A feature's decoder row, where the SAE writes it; its scale is the feature's recorded maximum where there is one
    in the units of x."""
    sae.check_features([feature])
    made = of_vector(host, sae.hook_out, sae.W_dec[feature].detach(), texts, context=context)
    known = sae.stats is not None and sae.cfg.normalize_activations == "none"
    maximum = float(sae.stats.max_act[feature]) if sae.stats is not None and known else 0.0
    return Direction(**{**vars(made), "max_act": maximum}) if maximum > 0 else made


def typical_norm(host: Host, hook: str, texts: Sequence[str] = (), *, context: int = 128) -> float:
    """Median ‖x‖ at a hook over ordinary tokens of these texts; without any, of 32 passages of the bundled corpus."""
    texts = texts or [document.text for document in itertools.islice(documents("bundled"), 32)]
    return float(torch.cat(_read(host, hook, texts, texts, context)[0]).norm(dim=1).median())


def _made(host: Host, hook: str, vector: Tensor, with_it: Sequence[Tensor], without: Sequence[Tensor]) -> Direction:
    """The direction of a vector [d] with its scales on these texts' rows."""
    name, length = host.hook(hook), float(vector.norm())
    if vector.shape != (host.width(name),):
        raise UserError(f"directions: the vector is {list(vector.shape)}, {name} is {host.width(name)} wide.")
    if not torch.isfinite(vector).all():
        raise UserError("directions: the vector has NaN or infinite components. Look at where it comes from.")
    if length <= 1e-9 * max(float(rows.norm()) for rows in with_it):
        raise UserError("directions: the vector is zero: both sides have the same mean. Give texts that differ.")
    unit = (vector / length).float()
    rows = torch.cat([*with_it])
    norms = torch.cat([rows, *without]).norm(dim=1)
    return Direction(name, unit, float((rows @ unit).max()), float(norms.median()), host.fingerprint,
                     10 * float(norms.median()))  # fmt: skip


def _pooled(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows)).double().mean(dim=0)


def _read(
    host: Host, hook: str, positive: Sequence[str], negative: Sequence[str], context: int, *, paired: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations [N, d] of each text's ordinary tokens, on both sides; texts without any are left out."""
    for label, texts in (("positive", positive), ("negative", negative)):
        if not texts:
            raise UserError(f"directions: no {label} texts. Give at least one of each kind; ten or more are better.")
    if paired and len(positive) != len(negative):
        raise UserError(
            f"directions: {len(positive)} positive and {len(negative)} negative texts. Pairs need as many of each."
        )
    name = host.hook(hook)
    both = [[_rows(host, name, text, context) for text in texts] for texts in (positive, negative)]
    if paired:
        kept = [i for i, (a, b) in enumerate(zip(*both, strict=True)) if len(a) and len(b)]
        both = [[side[i] for i in kept] for side in both]
    sides = [[rows for rows in side if len(rows)] for side in both]
    if not all(sides):
        raise UserError("directions: the texts have no ordinary tokens. Give longer ones.")
    limit = 10 * float(torch.cat([*sides[0], *sides[1]]).norm(dim=1).median())
    sides = [[rows[rows.norm(dim=1) <= limit] for rows in side] for side in sides]
    return sides[0], sides[1]


def _rows(host: Host, hook: str, text: str, context: int) -> Tensor:
    """Activations [N, d] float32 of a text's ordinary tokens; a text is read up to `context` tokens."""
    ids = host.tokenizer(text, add_special_tokens=False)["input_ids"][:context]
    if len(ids) < 2:
        return torch.zeros(0, host.width(hook))
    tokens = torch.tensor([ids], device=host.device)
    keep = ~torch.isin(tokens[0], torch.tensor(sorted(host.special_ids), dtype=torch.long, device=host.device))
    keep[0] = False
    return host.activations(tokens, [hook])[hook][0][keep].float().cpu()
