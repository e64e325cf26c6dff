"""The forwards of an evaluation: clean, with the SAE spliced in, zero- and mean-ablated, with random
errors.

All run on the same rows and change the same positions: those that the text's mask keeps and whose norm is
below the SAE's outlier limit; the rest keep x. A loss counts where the position is changed and its target is
a real token of the same document; KL counts at every changed position. The clean forward is also the reading
of x, from which the others go on without the layers below the hook; its log-softmax is held (float32, counted
positions only) while they are compared with it. A transcoder is evaluated where it writes: what it makes of the
activation that it reads is spliced in there, and compared with what stood there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae.evaluation.intervals import ClusterSums
from sae.evaluation.reconstruction import Reconstruction, first_features
from sae.host import HookFn, Host
from sae.text import Rows, loss_mask, segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int

POSITIONS = 256  # positions whose softmax is taken at a time
KEPT = 2**28  # bytes of x that are kept from the clean forward for mean ablation; the rest is read again


@dataclass
class _Reading:
    """What a batch of rows gave where the SAE writes: x [B, T, d], which positions count, and x̂ where they do."""

    x: Tensor
    counted: Tensor
    rebuilt: Tensor  # [n counted, d], float32


class Forwards:
    """State of one evaluation: sums for reconstruction, for losses (predictions) and for KL (positions)."""

    def __init__(
        self,
        sae: Any,
        host: Host,
        hook: str,
        written: str,
        text: Rows,
        clusters: Tensor,
        n_clusters: int,
        noise_draws: int,
        seed: int,
    ):
        self.sae, self.host, self.text, self.clusters = sae, host, text, clusters
        self.hook, self.written = hook, written  # one, but for a transcoder
        self.noise_draws, self.seed = noise_draws, seed
        # a stand-in with encode_sparse and decode(codes, x) will do
        decoder: Tensor | None = getattr(sae, "W_dec", None)
        self.device = None if decoder is None else decoder.device
        norms = None if decoder is None else decoder.norm(dim=1).cpu()
        widths = getattr(sae.cfg.metadata, "matryoshka_widths", ())
        self.reconstruction = Reconstruction(n_clusters, sae.cfg.d_sae, norms, widths)
        self.losses, self.kl = ClusterSums(n_clusters), ClusterSums(n_clusters)
        self.counted = torch.zeros_like(text.mask)  # text's mask and the outlier limit
        self.seen: dict[str, set[int]] = {"reconstruction": set(), "losses": set(), "kl": set()}
        self.predicts, self.segments = loss_mask(text), segments(text)
        self.kept: dict[int, Tensor] = {}  # x of a batch of rows, by its first row, until its mean ablation
        self.room = KEPT
        self.generator = torch.Generator().manual_seed(seed)

    def _logits(self, at: Tensor, x: Tensor) -> Tensor:
        """Logits with x where the SAE writes."""
        tokens, pos, doc = self._inputs(at)
        return self.host.logits_from(self.written, x, tokens, pos=pos, doc=doc)

    def _read(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """What the SAE reads, and what stands where it writes."""
        tokens, pos, doc = self._inputs(at)
        found = self.host.activations(tokens, [self.hook, self.written], pos=pos, doc=doc)
        return found[self.hook], found[self.written]

    def _inputs(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, position ids and segments on the host's device."""
        tokens, pos, segment = (
            t[at].long().to(self.host.device) for t in (self.text.tokens, self.text.pos, self.segments)
        )
        return tokens, pos, segment

    def read(self, at: Tensor) -> None:
        """Reconstruction only: the forward stops at the hook."""
        self._rebuild(at, *self._read(at))

    def spliced(self, at: Tensor) -> None:
        """Reconstruction, and the losses of clean, SAE and zero; the clean forward is also the reading."""
        captured: dict[str, Tensor] = {}

        def capture(hook: str) -> tuple[str, HookFn]:
            return hook, lambda x, _: captured.update({hook: x.clone()})

        tokens, pos, doc = self._inputs(at)
        edits = [capture(hook) for hook in {self.hook, self.written}]
        logits = self.host.logits(tokens, pos=pos, doc=doc, edits=edits)
        reading = self._rebuild(at, captured[self.hook], captured[self.written])
        counted, cluster = reading.counted, self.clusters[at][reading.counted.cpu()]
        if not len(cluster):
            return
        clean = _log_softmax(logits[counted])
        del logits
        predicts = (self.predicts[at] & counted.cpu())[counted.cpu()]
        target = self.text.tokens[at].roll(-1, 1).long()[counted.cpu()]
        kl: dict[str, Tensor] = {}
        loss = {"clean": _nll(clean, target)}
        for name, value in {"sae": reading.rebuilt, "zero": torch.zeros_like(reading.rebuilt)}.items():
            kl[name], loss[name] = self._against(clean, target, at, reading, value)
        for name, value in self._noise(reading):
            found, _ = self._against(clean, target, at, reading, value)
            kl[name] = kl.get(name, torch.zeros_like(found)) + found / self.noise_draws
        self.kl.add(cluster, n=torch.ones(len(cluster)), **kl)
        loss = {name: value[predicts] for name, value in loss.items()}
        self.losses.add(cluster[predicts], n=torch.ones(int(predicts.sum())), **loss)
        documents = self.text.doc[at][counted.cpu()]
        self.seen["kl"].update(documents.tolist())
        self.seen["losses"].update(documents[predicts].tolist())
        if self.room >= reading.x.nbytes:
            self.room -= reading.x.nbytes
            self.kept[int(at[0])] = reading.x

    def mean_ablated(self, at: Tensor, mean: Tensor) -> None:
        """The loss with every counted position at the mean; needs the mean, so it comes after all else."""
        counted = self.counted[at]
        predicts = self.predicts[at] & counted
        if not bool(counted.any()):
            return
        x = self.kept.pop(int(at[0])) if int(at[0]) in self.kept else self._read(at)[1]
        x = torch.where(counted.to(x.device)[..., None], mean.to(x), x)
        logits = self._logits(at, x)
        target = self.text.tokens[at].roll(-1, 1).long()[predicts]
        loss = _nll(_log_softmax(logits[predicts.to(logits.device)]), target)
        self.losses.add(self.clusters[at][predicts], mean=loss)

    def _rebuild(self, at: Tensor, x: Tensor, target: Tensor) -> _Reading:
        """Run the SAE on the positions of x that count, and add what it makes of them to the sums."""
        limit = self.sae.cfg.metadata.outlier_norm
        counted = self.text.mask[at].to(x.device)
        if limit is not None:
            counted &= x.float().norm(dim=-1) < limit
        valid = x[counted].float().to(self.device or x.device)
        codes = self.sae.encode_sparse(valid)
        rebuilt = self.sae.decode(codes, valid).to(x.device)
        here = counted.cpu()
        row = torch.arange(len(at))[:, None].expand_as(here)[here]
        widths = self.reconstruction.widths
        prefixes = [self.sae.decode(first_features(codes, width), valid).to(x.device) for width in widths]
        self.reconstruction.add(target[counted].float(), rebuilt, codes, self.clusters[at][here], row, prefixes)
        self.counted[at] = here
        self.seen["reconstruction"].update(self.text.doc[at][here].tolist())
        return _Reading(target, counted, rebuilt)

    def _against(
        self, clean: Tensor, target: Tensor, at: Tensor, reading: _Reading, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """KL from clean, and loss, at every counted position, of a forward with `value` put there."""
        x = reading.x.clone()
        x[reading.counted] = value.to(x.dtype)
        logits = self._logits(at, x)
        return _kl_and_nll(clean, logits[reading.counted], target)

    def _noise(self, reading: _Reading) -> Iterable[tuple[str, Tensor]]:
        """x plus errors of the SAE's own norm, in random directions and along differences of activations."""
        valid = reading.x[reading.counted].float()
        size = (valid - reading.rebuilt).norm(dim=1, keepdim=True)
        for _ in range(self.noise_draws):
            isotropic = torch.randn(valid.shape, generator=self.generator).to(valid.device)
            one, other = (torch.randint(len(valid), (len(valid),), generator=self.generator) for _ in range(2))
            for name, way in {"noise": isotropic, "noise_covariance": valid[one] - valid[other]}.items():
                yield name, valid + size * nn.functional.normalize(way, dim=1)


def _log_softmax(picked: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """Float32, in place where it can be."""
    picked = picked.float()
    for rows in picked.split(POSITIONS):
        rows.sub_(rows.logsumexp(1, keepdim=True))
    return picked.clamp_(min=-1e4)  # a vocabulary entry that is switched off (-inf) must give 0·0 in KL, not NaN


def _nll(logp: Float[Tensor, "n V"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return -logp.gather(1, target.to(logp.device)[:, None]).flatten().double().cpu()


def _kl_and_nll(clean: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    kl, nll = [], []
    for p, rows, at in zip(clean.split(POSITIONS), logits.split(POSITIONS), target.split(POSITIONS), strict=True):
        q = _log_softmax(rows)
        nll.append(_nll(q, at))
        kl.append((p.exp() * (p - q)).sum(1, dtype=torch.float32).double().cpu())
    return torch.cat(kl), torch.cat(nll)
