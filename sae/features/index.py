"""The index: one streaming pass over text that records where every feature fires, and how strongly.

Per feature: density, share of documents, maximum, 99.9th percentile, counts in tenths of the maximum, and its
top examples (at most one a document). Per document: the maximum of every feature that fired in it, so that
contrast queries need no host. Only positions in the blocks' mask count. Activations are in raw units. Memory
while building: 13 bytes a token, 16 bytes a (document, feature) pair that fired, 768 bytes a feature. Opening
is lazy: it reads index.json only, and neither transformers nor transformer_lens is ever imported for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.features import lens as lenses

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.host import Host

FORMAT = 1
_FACTS = "index.json"
N_LENS = 20
_CHUNK = 4096  # rows encoded at once
_PENDING = 4_000_000  # (document, feature) pairs gathered before they are merged
_PER_OCTAVE, _LOWEST, _OCTAVES = 8, -8, 24  # the histogram of activations: 192 bins from 2^-8 to 2^16
_LATEST = torch.iinfo(torch.int64).max


class Text(Protocol):
    """What is kept of a document: the fields of text.Document."""

    @property
    def text(self) -> str: ...
    @property
    def topic(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def group(self) -> str: ...


class Example(NamedTuple):
    """Where a feature fires most in a document: `position` is a row of the index's tokens, `act` in raw
    units."""

    position: int
    act: float
    document: int


class ContextToken(NamedTuple):
    """A token near an example; `act` is known for the firing token only."""

    text: str
    firing: bool
    act: float | None = None


@dataclass(frozen=True)
class DocumentMaxima:
    """Max-pooled activations of documents in CSR: document j has `features[offsets[j]:offsets[j+1]]`.

    `seen` is False for documents of which no token was counted: nothing is known about those.
    """

    offsets: Int[Tensor, " D_plus_1"]
    features: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    seen: Tensor  # bool [D]
    n_features: int

    def select(self, documents: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
        """(row among the selected, feature, maximum) of every entry of some documents."""
        starts, counts = self.offsets[documents], self.offsets[documents + 1] - self.offsets[documents]
        rows = torch.repeat_interleave(torch.arange(len(documents)), counts)
        before = counts.cumsum(0) - counts
        entries = torch.arange(len(rows)) - before[rows] + starts[rows]
        return rows, self.features[entries].long(), self.values[entries]


class _Pass:
    """What is gathered while blocks stream by."""

    def __init__(self, n_features: int):
        self.F = n_features
        self.count = torch.zeros(n_features, dtype=torch.int64)
        self.histogram = torch.zeros(n_features * _PER_OCTAVE * _OCTAVES, dtype=torch.int32)
        self.seen = torch.zeros(0, dtype=torch.bool)
        self.n_tokens = self.n_rows = 0
        self.merged = (torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int32))
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self.n_pending = 0

    def add(self, sae: SAE, block: Block, hook: str) -> None:
        valid = (block.mask & (block.doc >= 0)).nonzero().flatten().cpu()
        doc = block.doc.cpu()[valid].long()
        self._grow(int(doc.max()) + 1 if len(doc) else 0)
        self.seen[doc] = True
        acts = block.acts[hook]
        for part in torch.arange(len(valid)).split(_CHUNK):
            codes = sae.encode_sparse(acts[valid[part].to(acts.device)].to(sae.W_dec.device))
            fired = (codes.values > 0).cpu()
            rows, features = codes.rows().cpu()[fired], codes.indices.cpu()[fired].long()
            values = codes.values.detach().cpu().float()[fired]
            self.count += torch.bincount(features, minlength=self.F)
            bins = features * (_PER_OCTAVE * _OCTAVES) + _bin(values)
            self.histogram.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))
            where = (self.n_rows + valid[part][rows]).int()
            pairs = _maxima(doc[part][rows] * self.F + features, values, where)
            self.pending.append(pairs)
            self.n_pending += len(pairs[0])
        self.n_tokens += len(valid)
        self.n_rows += len(block.mask)
        if self.n_pending > max(_PENDING, len(self.merged[0])):
            self.merge()

    def _grow(self, n_documents: int) -> None:
        more = max(0, n_documents - len(self.seen))
        self.seen = torch.cat([self.seen, torch.zeros(more, dtype=torch.bool)])

    def merge(self) -> None:
        columns = zip(self.merged, *self.pending, strict=True)
        self.merged = _maxima(*(torch.cat(column) for column in columns))  # type: ignore[arg-type]
        self.pending, self.n_pending = [], 0

    def maxima(self, n_documents: int) -> DocumentMaxima:
        if len(self.seen) > n_documents:
            raise UserError(
                f"index: a block holds document {len(self.seen) - 1:,}, only {n_documents:,} documents were "
                "given. Give the documents that the blocks were made from."
            )
        self._grow(n_documents)
        self.merge()
        keys, values, _ = self.merged
        offsets = torch.searchsorted(keys, torch.arange(n_documents + 1) * self.F)
        return DocumentMaxima(offsets, (keys % self.F).int(), values, self.seen, self.F)

    def examples(self, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """offsets [F+1], position, act, document: each feature's strongest documents, strongest first."""
        keys, values, where = self.merged
        order = values.argsort(descending=True, stable=True)
        order = order[(keys[order] % self.F).argsort(stable=True)]
        features = keys[order] % self.F
        counts = torch.bincount(features, minlength=self.F)
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[features]
        order = order[rank < top]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.clamp(max=top).cumsum(0)])
        return offsets, where[order], values[order], (keys[order] // self.F).int()

    def stats(self) -> dict[str, Tensor]:
        keys, values, _ = self.merged
        features = keys % self.F
        max_act = torch.zeros(self.F).scatter_reduce_(0, features, values, "amax")
        histogram = self.histogram.view(self.F, -1)
        return {
            "max_act": max_act,
            "density": (self.count / max(self.n_tokens, 1)).float(),
            "document_density": (torch.bincount(features, minlength=self.F) / max(int(self.seen.sum()), 1)).float(),
            "p999": _quantile(histogram, max_act, 0.999),
            "bands": _bands(histogram, max_act),
        }


def _maxima(keys: Tensor, values: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of entries with equal keys the largest value, and the first position that reached it; sorted by key."""
    unique, inverse = torch.unique(keys, return_inverse=True)
    best = torch.zeros(len(unique)).scatter_reduce_(0, inverse, values, "amax")
    at_best = values == best[inverse]
    first = torch.full((len(unique),), _LATEST).scatter_reduce_(0, inverse[at_best], where[at_best].long(), "amin")
    return unique, best, first.int()


def _bin(values: Tensor) -> Tensor:
    return ((values.log2() - _LOWEST) * _PER_OCTAVE).floor().long().clamp(0, _PER_OCTAVE * _OCTAVES - 1)


def _edges() -> Tensor:
    return 2.0 ** (_LOWEST + torch.arange(_PER_OCTAVE * _OCTAVES + 1) / _PER_OCTAVE)


def _quantile(histogram: Tensor, max_act: Tensor, q: float) -> Tensor:
    """The quantile over firing tokens, to within one bin (9 %), never above the maximum; 0 where nothing
    fired."""
    cumulative = histogram.cumsum(1)
    target = (cumulative[:, -1:] * q).ceil().clamp(min=1)
    return torch.minimum(_edges()[(cumulative < target).sum(1).clamp(max=histogram.shape[1] - 1) + 1], max_act)


def _bands(histogram: Tensor, max_act: Tensor) -> Tensor:
    """Firing tokens in each tenth of [0, max] [F, 10], to within what one bin of the log histogram
    resolves."""
    cumulative = torch.cat([torch.zeros(len(histogram), 1), histogram.cumsum(1).float()], 1)
    edges = _edges()
    below = []
    for tenth in range(1, 10):
        level = (max_act * tenth / 10)[:, None].clamp(min=float(edges[0]))
        at = _bin(level)
        share = ((level - edges[at]) / (edges[at + 1].minimum(max_act[:, None]) - edges[at])).clamp(0, 1)
        below.append(cumulative.gather(1, at) + share.nan_to_num(0) * histogram.gather(1, at))
    columns = torch.cat([torch.zeros(len(histogram), 1), *below, cumulative[:, -1:]], 1)
    return columns.round().diff(dim=1).int()


def fingerprint(sae: SAE) -> str:
    """Names the weights of an SAE, so that an index is not read beside another one."""
    digest = hashlib.sha256()
    parts: list[Tensor] = [sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec]
    if sae.threshold is not None and sae.cfg.architecture == "jumprelu":  # a TopK SAE's decides nothing here
        parts.append(sae.threshold)
    for tensor in parts:
        digest.update(tensor.detach().cpu().float().contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def document_maxima(sae: SAE, blocks: Iterable[Block], n_documents: int, *, hook: str) -> DocumentMaxima:
    """Max-pooled activations of documents that are not in an index (a search by the user's own texts)."""
    gathered = _Pass(sae.cfg.d_sae)
    for block in blocks:
        gathered.add(sae, block, hook)
    return gathered.maxima(n_documents)


def build(
    sae: SAE,
    blocks: Iterable[Block],
    documents: Sequence[Text],
    token_strings: Sequence[str],
    out: str | Path,
    *,
    hook: str,
    host: Host | None = None,
    top: int = 20,
    scores: bool = True,
    n_beginnings: int = 5,
    progress: Callable[[int], object] | None = None,
    score_progress: Callable[[int], object] | None = None,
) -> Index:
    """Write the index of `blocks` to the folder `out`, whole or not at all, and open it.

    blocks         in order; their `doc` numbers `documents`; a document may span blocks
    token_strings  display string of every vocabulary id
    host           adds the logit lens of every feature and, with `scores`, the output score of those that
                   fired, over the first `n_beginnings` neutral beginnings (lens.py has their cost)
    progress       called with the number of positions read since the last call
    score_progress called with the number of features scored since the last call
    Raises UserError for a block without the hook, a document that was not given, or no counted token at all.
    """
    files.check_folder(out, _FACTS)  # before the work, not after it
    gathered = _Pass(sae.cfg.d_sae)
    columns: dict[str, list[Tensor]] = {"tokens": [], "doc": [], "pos": [], "mask": []}
    for block in blocks:
        if hook not in block.acts:
            raise UserError(f"index: the blocks hold {', '.join(block.acts)}, not {hook}. Use one of those hooks.")
        gathered.add(sae, block, hook)
        for name in ("tokens", "doc", "pos"):
            columns[name].append(getattr(block, name).cpu().int())
        columns["mask"].append(block.mask.cpu().to(torch.uint8))
        if progress is not None:
            progress(len(block.mask))
    if gathered.n_tokens == 0:
        raise UserError("index: the text holds no token that counts. Give more text.")
    maxima = gathered.maxima(len(documents))
    stats = gathered.stats()
    offsets, position, act, document = gathered.examples(top)
    lens = None
    if host is not None and sae.cfg.d_in == host.d_model:  # hook_z: its directions are not the residual stream's
        fired = stats["max_act"].nonzero().flatten() if scores else None
        lens = _lens(sae, host, hook, stats["max_act"], fired, n_beginnings, score_progress)
    with files.atomic_folder(out, marker=_FACTS) as folder:
        files.write_safetensors(
            folder / "tokens.safetensors", {name: torch.cat(parts) for name, parts in columns.items()}
        )
        files.write_safetensors(
            folder / "examples.safetensors",
            {"offsets": offsets, "position": position, "act": act, "document": document},
        )
        files.write_safetensors(folder / "feature_stats.safetensors", stats, {"n_tokens": str(gathered.n_tokens)})
        files.write_safetensors(
            folder / "docmax.safetensors",
            {
                "offsets": maxima.offsets,
                "features": maxima.features,
                "values": maxima.values,
                "seen": maxima.seen.to(torch.uint8),
            },
        )
        if lens is not None:
            files.write_safetensors(folder / "lens.safetensors", lens)
        lines = (json.dumps({name: getattr(d, name) for name in _DOCUMENT}, ensure_ascii=False) for d in documents)
        files.write_text(folder / "documents.jsonl", "".join(line + "\n" for line in lines))
        files.write_text(folder / "vocab.json", json.dumps(list(token_strings), ensure_ascii=False))
        facts = Facts(
            format=FORMAT,
            hook=hook,
            host=host.name if host is not None else sae.cfg.metadata.model_name,
            sae=fingerprint(sae),
            n_features=sae.cfg.d_sae,
            n_tokens=gathered.n_tokens,
            n_positions=gathered.n_rows,
            n_documents=len(documents),
            top=top,
        )
        files.write_json(folder / _FACTS, asdict(facts))
    return Index.open(out)


_DOCUMENT = ("text", "topic", "form", "group")


def _lens(
    sae: SAE,
    host: Host,
    hook: str,
    max_act: Tensor,
    scored: Tensor | None,
    n_beginnings: int,
    progress: Callable[[int], object] | None,
) -> dict[str, Tensor]:
    """lens.safetensors: the logit lens of every feature, and what the `scored` ones make the model say."""
    read = lenses.logit_lens(host, sae.W_dec, N_LENS)
    tensors = {
        "top": read.top,
        "top_values": read.top_values,
        "bottom": read.bottom,
        "bottom_values": read.bottom_values,
    }
    if scored is not None:
        beginnings = lenses.BEGINNINGS[:n_beginnings]
        found = lenses.output_scores(
            host,
            sae,
            scored,
            hook,
            top_tokens=read.top[scored],
            max_act=max_act,
            beginnings=beginnings,
            progress=progress,
        )
        F, m = sae.cfg.d_sae, found.says.shape[1]
        tensors["output_score"] = torch.full((F,), float("nan")).index_copy_(0, scored, found.score)
        tensors["says"] = torch.full((F, m), -1, dtype=torch.int32).index_copy_(0, scored, found.says)
        tensors["says_p"] = torch.zeros(F, m).index_copy_(0, scored, found.says_p)
    return tensors


@dataclass(frozen=True)
class Facts:
    """index.json."""

    format: int
    hook: str
    host: str
    sae: str
    n_features: int
    n_tokens: int
    n_positions: int
    n_documents: int
    top: int


@dataclass(frozen=True)
class IndexedDocument:
    """A document as the index keeps it; the fields are those of text.Document."""

    text: str
    topic: str = ""
    form: str = ""
    group: str = ""


class Index:
    """An index on disk, read as it is asked for."""

    def __init__(self, path: Path, facts: Facts):
        self.path = path
        self.facts = facts

    def __repr__(self) -> str:
        f = self.facts
        sizes = f"{f.n_features:,} features, {f.n_tokens:,} tokens, {f.n_documents:,} documents"
        return f"Index({str(self.path)!r}: {sizes})"

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open a folder that `build` wrote. Raises UserError for what is missing or written by a newer
        version."""
        path = Path(path)
        if not (path / _FACTS).exists():
            raise UserError(f"{path}: no feature index there. Make one with `sae index`.")
        facts = files.read_json_object(path / _FACTS, newest=FORMAT)
        try:
            return cls(path, Facts(**facts))
        except TypeError as error:
            raise UserError(
                f"{path / _FACTS}: not an index of ours ({error}). Make it again with `sae index`."
            ) from error

    def check(self, sae: SAE) -> None:
        """Raise UserError unless this index was made with exactly this SAE."""
        own = fingerprint(sae)
        if own != self.facts.sae:
            raise UserError(
                f"{self.path}: made with another SAE ({self.facts.sae}, this one is {own}). "
                "Make it again with `sae index`."
            )

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path / name}: not readable ({error}). Make the index again with `sae index`."
            ) from error

    def _all(self, name: str) -> dict[str, Tensor]:
        with self._file(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        """max_act, density, document_density, p999 [F] and bands [F, 10]."""
        return self._all("feature_stats.safetensors")

    @cached_property
    def lens(self) -> dict[str, Tensor]:
        """top, top_values, bottom, bottom_values [F, 20]; output_score [F], says, says_p [F, 10]; empty
        without host."""
        return self._all("lens.safetensors") if (self.path / "lens.safetensors").exists() else {}

    @cached_property
    def maxima(self) -> DocumentMaxima:
        kept = self._all("docmax.safetensors")
        return DocumentMaxima(
            kept["offsets"], kept["features"], kept["values"], kept["seen"].bool(), self.facts.n_features
        )

    @cached_property
    def documents(self) -> list[IndexedDocument]:
        path = self.path / "documents.jsonl"
        try:
            return [IndexedDocument(**line) for line in files.read_lines(path)]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable ({error}). Make the index again with `sae index`.") from error

    @cached_property
    def vocab(self) -> list[str]:
        """The display string of every token id."""
        return files.read_json(self.path / "vocab.json")

    @cached_property
    def _tokens(self) -> Any:
        return self._file("tokens.safetensors")

    @cached_property
    def _examples(self) -> dict[str, Tensor]:
        return self._all("examples.safetensors")

    def token(self, token_id: int) -> str:
        """One token's display string."""
        return self.vocab[token_id] if 0 <= token_id < len(self.vocab) else f"<{token_id}>"

    def check_feature(self, feature: int) -> int:
        """The feature; one out of range is a UserError."""
        if not 0 <= feature < self.facts.n_features:
            raise UserError(
                f"feature {feature:,} does not exist: this SAE has {self.facts.n_features:,} "
                f"(0 to {self.facts.n_features - 1:,}). Look one up with `sae find`."
            )
        return feature

    def examples(self, feature: int, n: int = 20) -> list[Example]:
        """A feature's strongest documents, strongest first, at most one example a document."""
        kept = self._examples
        start, end = kept["offsets"][self.check_feature(feature) : feature + 2].tolist()
        rows = slice(start, min(end, start + n))
        columns = (kept[name][rows].tolist() for name in ("position", "act", "document"))
        return [Example(*row) for row in zip(*columns, strict=True)]

    def context(
        self, position: int, before: int = 12, after: int = 8, *, act: float | None = None
    ) -> list[ContextToken]:
        """The tokens around a position, inside its document; the one at `position` is the firing one."""
        start, end = max(0, position - before), min(self.facts.n_positions, position + after + 1)
        tokens, doc, pos = (self._tokens.get_slice(name)[start:end].tolist() for name in ("tokens", "doc", "pos"))
        at = position - start
        return [
            ContextToken(self.token(tokens[i]), i == at, act if i == at else None)
            for i in range(len(tokens))
            # a row may hold several documents, and a document's next piece may stand elsewhere
            if doc[i] == doc[at] and pos[i] - pos[at] == i - at
        ]
