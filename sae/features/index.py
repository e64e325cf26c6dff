"""An index on disk: where every feature of an SAE fires in a text, read as it is asked for.

FOLDER/part-00000.safetensors        rows of text (tokens, doc, pos, mask), the codes of each row (CSR, bfloat16), the
                                     maxima of the part's documents (CSR, float32)
FOLDER/documents-00000.jsonl         their texts, by number
FOLDER/feature_stats.safetensors     how often and how strongly each feature fires
FOLDER/examples.safetensors          CSR by feature into the rows: the strongest, samples by tenth, a uniform sample
FOLDER/top_tokens.safetensors        tokens that have most of a feature's activation
FOLDER/lens.safetensors              what it promotes, its output score, what it makes the host say, if there was one
FOLDER/search.sqlite                 full-text search (words.py); a cache
FOLDER/index.json                    the facts; last, so a folder that has it is whole

writing.py writes it, parts.py reads the parts. Activations are in raw units; only rows in the mask count. Opening reads
index.json only, and neither transformers nor transformer_lens is ever imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.features.gather import BANDS
from sae.features.parts import Parts, StoredMaxima, opened
from sae.features.pool import spans

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.autoencoder import SAE
    from sae.features.rows import FeatureList

FORMAT = 2
FACTS = "index.json"
DOCUMENT = ("text", "topic", "form", "group")


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
    """A token at which a feature fires: `position` is a row of the index, `act` in raw units."""

    position: int
    act: float
    document: int


class ContextToken(NamedTuple):
    """A token near a position; `firing` marks the one at it, `act` is the feature's activation where it is known."""

    text: str
    firing: bool
    act: float | None = None


class TopToken(NamedTuple):
    """A token on which a feature fires: its share of all the feature's activation, how often it fires there
    (`firing`), and on what share of the token's occurrences (`sensitivity`)."""

    token: int
    text: str
    share: float
    firing: int
    sensitivity: float


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
    parts: list[int]
    """Rows of each part."""
    text: dict[str, Any] = field(default_factory=dict)
    """What it was read from."""


@dataclass(frozen=True)
class IndexedDocument:
    """A document as the index keeps it; the fields are those of text.Document."""

    text: str
    topic: str = ""
    form: str = ""
    group: str = ""


def fingerprint(sae: SAE) -> str:
    """Names the weights of an SAE, so that an index is not read beside another one."""
    digest = hashlib.sha256()
    parts: list[Tensor] = [sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec]
    if sae.threshold is not None and sae.cfg.architecture == "jumprelu":  # a TopK SAE's decides nothing here
        parts.append(sae.threshold)
    for tensor in parts:
        digest.update(tensor.detach().cpu().float().contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


class Index:
    """An index on disk, read as it is asked for."""

    def __init__(self, path: Path, facts: Facts):
        self.path = path
        self.facts = facts
        self.parts = Parts(path, facts.parts)

    def __repr__(self) -> str:
        f = self.facts
        sizes = f"{f.n_features:,} features, {f.n_tokens:,} tokens, {f.n_documents:,} documents"
        return f"Index({str(self.path)!r}: {sizes})"

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open a folder that `build` wrote. Raises UserError for what is missing or of another version."""
        path = Path(path)
        if not (path / FACTS).exists():
            raise UserError(f"{path}: no feature index there. Make one with `sae index`.")
        facts = files.read_json_object(path / FACTS, newest=FORMAT)
        if facts.get("format") != FORMAT:
            raise UserError(
                f"{path}: an index of format {facts.get('format')}, written by an earlier version. Make it again with "
                "`sae index`."
            )
        try:
            return cls(path, Facts(**facts))
        except TypeError as error:
            raise UserError(
                f"{path / FACTS}: not an index of ours ({error}). Make it again with `sae index`."
            ) from error

    def find(self, concept: str | None = None, **options: Any) -> FeatureList:
        """Features that stand for a concept, as `sae.features.find`."""
        from sae.features.search import find

        return find(self, concept, **options)

    def check(self, sae: SAE) -> None:
        """Raise UserError unless this index was made with exactly this SAE."""
        own = fingerprint(sae)
        if own != self.facts.sae:
            raise UserError(
                f"{self.path}: made with another SAE ({self.facts.sae}, this one is {own}). "
                "Make it again with `sae index`."
            )

    def check_feature(self, feature: int) -> int:
        """The feature; one out of range is a UserError."""
        if not 0 <= feature < self.facts.n_features:
            raise UserError(
                f"feature {feature:,} does not exist: this SAE has {self.facts.n_features:,} "
                f"(0 to {self.facts.n_features - 1:,}). Look one up with `sae find`."
            )
        return feature

    # ---- every feature -----------------------------------------------------------------------------------

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        """max_act, density, document_density, p999 [F]; firing tokens by tenth of the maximum (`bands` [F, 10]) and by
        octave from 2^-16 on (`octaves` [F, 34])."""
        return self._all("feature_stats.safetensors", "max_act density document_density p999 mass bands octaves")

    @cached_property
    def lens(self) -> dict[str, Tensor]:
        """top, top_values, bottom, bottom_values [F, 20]; output_score [F], says, says_p [F, 10]; empty
        without host."""
        return self._all("lens.safetensors", "top top_values") if (self.path / "lens.safetensors").exists() else {}

    @cached_property
    def maxima(self) -> StoredMaxima:
        """The maximum of every feature in every document."""
        return StoredMaxima(self.parts, self.facts.n_documents, self.facts.n_features)

    @cached_property
    def documents(self) -> list[IndexedDocument]:
        found = []
        for number in range(len(self.facts.parts)):
            path = self.path / f"documents-{number:05}.jsonl"
            try:
                found += [IndexedDocument(**line) for line in files.read_lines(path)]
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path}: not readable ({error}). Make the index again with `sae index`.") from error
        if len(found) != self.facts.n_documents:
            raise UserError(
                f"{self.path}: has {len(found):,} documents, index.json says {self.facts.n_documents:,} (cut short?). "
                "Make the index again with `sae index`."
            )
        return found

    @cached_property
    def vocab(self) -> list[str]:
        """The display string of every token id."""
        found = files.read_json(self.path / "vocab.json")
        if not isinstance(found, list):
            raise UserError(f"{self.path / 'vocab.json'}: not a list of tokens. Make the index again with `sae index`.")
        return found

    @cached_property
    def token_counts(self) -> Int[Tensor, " V"]:
        """How often each token occurs at counted rows."""
        counts = torch.zeros(len(self.vocab), dtype=torch.int64)
        for number in range(len(self.facts.parts)):
            tokens, mask = (self.parts.open(number).get_tensor(name) for name in ("tokens", "mask"))
            counts += torch.bincount(tokens[mask.bool()], minlength=len(counts))[: len(counts)]
        return counts

    @cached_property
    def top_token_ids(self) -> Int[Tensor, "F n"]:
        """The tokens that have most of each feature's activation, -1 where there are fewer."""
        return self._top_tokens["token"]

    @cached_property
    def token_shares(self) -> Float[Tensor, "F n"]:
        """The share of a feature's activation that each of its top tokens has."""
        return self._top_tokens["mass"] / self.stats["mass"].clamp(min=1e-9)[:, None]

    @property
    def token_firings(self) -> Int[Tensor, "F n"]:
        """How often a feature fires on each of its top tokens."""
        return self._top_tokens["firing"]

    def token(self, token_id: int) -> str:
        """One token's display string."""
        return self.vocab[token_id] if 0 <= token_id < len(self.vocab) else f"<{token_id}>"

    def strings(self, tokens: Int[Tensor, " n"], n: int = 10) -> list[str]:
        """Display strings of the first n tokens; -1 is none."""
        return [self.token(token) for token in tokens[:n].tolist() if token >= 0]

    # ---- one feature -------------------------------------------------------------------------------------

    def examples(self, feature: int, n: int = 20) -> list[Example]:
        """A feature's strongest documents, strongest first, at most one example a document."""
        return self._of_kind(feature, 0)[:n]

    def by_band(self, feature: int) -> list[list[Example]]:
        """Up to five random tokens from each tenth of [0, maximum], the weakest tenth first."""
        return [self._of_kind(feature, band + 1) for band in range(BANDS)]

    def deciles(self, feature: int) -> list[list[Example]]:
        """A uniform sample of up to 50 tokens at which it fires, cut into tenths of equal count, the weakest first."""
        sample = self._of_kind(feature, BANDS + 1)[::-1]
        cuts = [round(len(sample) * tenth / BANDS) for tenth in range(BANDS + 1)]
        return [sample[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]

    def silent(self, feature: int, n: int = 5) -> list[Example]:
        """Random counted positions, each in a document in which the feature never fires."""
        generator = torch.Generator().manual_seed(self.check_feature(feature))
        found: list[Example] = []
        for position in torch.randint(self.facts.n_positions, (40 * n,), generator=generator).tolist():
            row = self.parts.rows(position, position + 1)
            document = int(row["doc"][0])
            if not row["mask"][0] or document in [other.document for other in found]:
                continue
            _, features, _ = self.maxima.select(torch.tensor([document]))
            if not bool((features == feature).any()):
                found.append(Example(position, 0.0, document))
                if len(found) == n:
                    break
        return found

    def top_tokens(self, feature: int, n: int = 10) -> list[TopToken]:
        """The tokens that have most of a feature's activation."""
        self.check_feature(feature)
        columns = (self.top_token_ids, self.token_shares, self.token_firings)
        return [
            TopToken(token, self.token(token), share, firing, firing / max(int(self.token_counts[token]), 1))
            for token, share, firing in zip(*(column[feature][:n].tolist() for column in columns), strict=True)
            if token >= 0
        ]

    def cofiring(self, feature: int, n: int = 10) -> list[tuple[int, float, int]]:
        """(feature, Jaccard, tokens of both): those that fire at the same tokens most, of at least three.

        Over all tokens, or where there are more than 16M codes over evenly chosen parts of that size.
        """
        self.check_feature(feature)
        F = self.facts.n_features
        both, each = torch.zeros(F, dtype=torch.int64), torch.zeros(F, dtype=torch.int64)
        for part in self.parts.some():
            offsets, features = part.get_tensor("codes.offsets"), part.get_tensor("codes.features")
            at = (features == feature).nonzero().flatten()
            each += torch.bincount(features, minlength=F)
            row = torch.searchsorted(offsets, at, right=True) - 1
            both += torch.bincount(features[spans(offsets, row)[1]], minlength=F)
        own, both[feature] = int(each[feature]), 0
        jaccard = torch.where(both >= 3, both / (own + each - both).clamp(min=1), 0.0)
        best = jaccard.topk(min(n, F))
        return [
            (other, value, int(both[other]))
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value > 0
        ]

    def context(
        self, position: int, before: int = 12, after: int = 8, *, act: float | None = None, feature: int | None = None
    ) -> list[ContextToken]:
        """The tokens around a position, inside its document; the one at `position` is the firing one. With `feature`
        every token has its activation, else the firing one `act`."""
        start, end = max(0, position - before), min(self.facts.n_positions, position + after + 1)
        kept = self.parts.rows(start, end)
        tokens, doc, pos = (kept[name].tolist() for name in ("tokens", "doc", "pos"))
        acts = None if feature is None else self.parts.acts(feature, start, end)
        at = position - start
        return [
            ContextToken(self.token(tokens[i]), i == at, acts[i] if acts else act if i == at else None)
            for i in range(len(tokens))
            # a row may hold several documents, and a document's next piece may stand elsewhere
            if doc[i] == doc[at] and pos[i] - pos[at] == i - at
        ]

    # ---- files -------------------------------------------------------------------------------------------

    def _of_kind(self, feature: int, kind: int) -> list[Example]:
        kept = self.all_examples
        start, end = kept["offsets"][self.check_feature(feature) : feature + 2].tolist()
        kinds = kept["kind"][start:end]
        rows = (kinds == kind).nonzero().flatten() + start
        columns = (kept[name][rows].tolist() for name in ("row", "act", "document"))
        return [Example(*row) for row in zip(*columns, strict=True)]

    def _all(self, name: str, needed: str) -> dict[str, Tensor]:
        with opened(self.path / name) as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        if missing := [key for key in needed.split() if key not in found]:
            raise UserError(f"{self.path / name}: has no {missing[0]}. Make the index again with `sae index`.")
        return found

    @cached_property
    def all_examples(self) -> dict[str, Tensor]:
        """examples.safetensors: offsets [F+1]; kind, row, act, document of each (gather.py says the kinds)."""
        return self._all("examples.safetensors", "offsets kind row act document")

    @cached_property
    def _top_tokens(self) -> dict[str, Tensor]:
        return self._all("top_tokens.safetensors", "token mass firing")
