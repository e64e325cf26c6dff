"""Writes an index: one streaming pass over text, in parts, whole or not at all, and from where it stopped.

While it is under way everything lies in `OUT.unfinished`: a part for every 16,384 rows (its tokens, the codes of each,
the maxima of its documents), the documents' texts, and the state of the pass. A pass that was interrupted goes on
behind the last part that its state knows, and gives the same index. Memory: the state (gather.py) and one part; the
text's length does not matter. Disk: some 300 bytes a token at k = 32. Cost: the host, an encoding and little else; then
the output scores, whose cost lens.py has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae import files, locks
from sae.errors import UserError
from sae.features import gather, words
from sae.features import lens as lenses
from sae.features.index import DOCUMENT, FACTS, FORMAT, Facts, Index, Text, fingerprint
from sae.features.parts import opened
from sae.features.pool import Entries, counted, entries, in_csr, reader, strongest
from sae.places import Place

if TYPE_CHECKING:
    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.host import Host

PART_ROWS = 16_384
N_LENS, N_TOKENS = 20, 20
_STATE, _STATE_FORMAT = "state.safetensors", 1
_PART = "part-{:05}.safetensors"
_SCORED = 512  # features whose output scores are kept as soon as they are there
_SHARE = 20  # the state is saved when so many times as long has passed as saving it takes


class Step(NamedTuple):
    """A block, the documents that were numbered since the last one, and how a source goes on behind it."""

    block: Block
    documents: Sequence[Text]
    state: Any = None


Source = Callable[[Any], Iterable[Step]]
"""Given None, or the state of an earlier step after a way through JSON, the steps from there on."""


def build(
    sae: SAE,
    blocks: Iterable[Block],
    documents: Sequence[Text],
    token_strings: Sequence[str],
    out: str | Path,
    **options: Any,
) -> Index:
    """`write` the index of blocks that are at hand; their `doc` numbers `documents`. Not resumable."""

    def steps(state: Any) -> Iterator[Step]:
        left = documents
        for block in blocks:
            yield Step(block, left)
            left = []

    return write(sae, steps, token_strings, out, **options)


def write(
    sae: SAE,
    source: Source,
    token_strings: Sequence[str],
    out: str | Path,
    *,
    hook: str,
    host: Host | None = None,
    about: Any = None,
    top: int = gather.TOP,
    scores: bool = True,
    n_beginnings: int = 5,
    progress: Callable[[int], object] | None = None,
    score_progress: Callable[[int], object] | None = None,
) -> Index:
    """Write the index of a source to the folder `out`, whole or not at all, and open it.

    token_strings  display string of every vocabulary id
    host           adds the logit lens of every feature and, with `scores`, the output score of those that fired, over
                   the first `n_beginnings` neutral beginnings (lens.py has their cost)
    about          what the source is, for JSON: an unfinished index is gone on with where it is the same. None, and a
                   source whose steps have no state: never
    progress       called with the number of rows read since the last call, those of an earlier pass among them
    score_progress called with the number of features scored since the last call
    Raises UserError for a block without the hook, a document that was not given, no counted token at all, and another
    process that writes the same index.
    """
    out = Path(out)
    unfinished = out.resolve().with_name(f"{out.name}.unfinished")
    files.check_folder(out, FACTS)  # before the work, not after it
    files.check_folder(unfinished, _PART.format(0))
    key = {
        "format": [FORMAT, _STATE_FORMAT], "sae": fingerprint(sae), "hook": hook, "about": about, "top": top,
        "part": PART_ROWS, "beginnings": n_beginnings, "host": None if host is None else host.fingerprint,
    }  # fmt: skip
    with locks.lock(Place(out.resolve().parent), f"index-{out.name}"):
        work = _Work(unfinished, key, top, sae.cfg.d_sae)
        try:
            _read(work, sae, source, hook, progress)
            _finish(work, sae, host, hook, token_strings, scores, n_beginnings, score_progress)
        except BaseException:
            if not work.saved:
                files.remove_folder(work.folder)
            raise
        files.publish_folder(work.folder, out, marker=FACTS)
    return Index.open(out)


class _Work:
    """An index that is being written: what is gathered, the open part, and how far it is."""

    def __init__(self, folder: Path, key: dict[str, Any], top: int, n_features: int):
        self.folder, self.key, self.F = folder, json.loads(json.dumps(key)), n_features
        self.gather = gather.Gather(n_features, top)
        self.rows: list[int] = []  # of each closed part
        self.docs: list[Tensor] = []  # of each closed part, those of which a token was counted
        self.n_tokens = self.n_documents = 0
        self.state: Any = None
        self.is_read = False
        self.saved = False
        self.last_save, self.cost = time.monotonic(), 0.0
        if (folder / _STATE).exists():
            self._go_on(top)
        if not self.saved:
            files.remove_folder(folder)
        self.open = _Part(sum(self.rows))

    def _go_on(self, top: int) -> None:
        tensors, metadata = files.read_safetensors(self.folder / _STATE)
        known = json.loads(metadata.get("progress", "{}"))
        if known.get("key") != self.key:
            return
        self.docs = [tensors.pop(f"docs.{number}") for number in range(len(known["rows"]))]
        self.gather = gather.Gather.of(tensors, self.F, top)
        for name in ("rows", "n_tokens", "n_documents", "state", "is_read"):
            setattr(self, name, known[name])
        self.saved = True

    def close_part(self, state: Any) -> None:
        """Write the open part. The pass's own state goes with it when that is worth its cost, or everything is read."""
        number = len(self.rows)
        tensors, documents = self.open.content(self.F)
        files.write_safetensors(self.folder / _PART.format(number), tensors)
        lines = (json.dumps({name: getattr(d, name) for name in DOCUMENT}, ensure_ascii=False) for d in documents)
        files.write_text(self.folder / f"documents-{number:05}.jsonl", "".join(line + "\n" for line in lines))
        self.rows.append(self.open.n_rows)
        self.docs.append(tensors["max.docs"])
        self.gather.close_part()
        self.open, self.state = _Part(sum(self.rows)), state

    def save(self) -> None:
        """Keep how far it is, if a source can go on from there."""
        if self.key["about"] is None or (self.state is None and not self.is_read):
            return
        began = time.monotonic()
        names = ("key", "rows", "n_tokens", "n_documents", "state", "is_read")
        known = {name: getattr(self, name) for name in names}
        tensors = self.gather.tensors() | {f"docs.{number}": docs for number, docs in enumerate(self.docs)}
        files.write_safetensors(self.folder / _STATE, tensors, {"progress": json.dumps(known)})
        self.saved, self.last_save = True, time.monotonic()
        self.cost = self.last_save - began

    def save_is_due(self) -> bool:
        return not self.saved or time.monotonic() - self.last_save > _SHARE * self.cost


class _Part:
    """Rows that are in no file yet."""

    def __init__(self, first_row: int):
        self.first_row, self.n_rows = first_row, 0
        self.columns: dict[str, list[Tensor]] = {"tokens": [], "doc": [], "pos": [], "mask": []}
        self.codes: list[tuple[Tensor, Tensor, Tensor]] = []  # row, feature, act
        self.maxima: list[tuple[Tensor, Tensor, Tensor]] = []  # document, feature, act
        self.documents: list[Text] = []

    @property
    def next_row(self) -> int:
        return self.first_row + self.n_rows

    def add(self, block: Block, counted: Tensor, found: Entries, best: Tensor) -> None:
        for name in ("tokens", "doc", "pos"):
            self.columns[name].append(getattr(block, name).cpu().int())
        self.columns["mask"].append(counted.to(torch.uint8))
        self.codes.append((found.row - self.first_row, found.feature.int(), found.act.bfloat16()))
        one = found[best]
        self.maxima.append((one.document, one.feature, one.act))
        self.n_rows += len(block.mask)

    def content(self, F: int) -> tuple[dict[str, Tensor], list[Text]]:
        tensors = {name: torch.cat(parts) for name, parts in self.columns.items()}
        row, feature, act = (torch.cat(column) for column in zip(*self.codes, strict=True))
        offsets = torch.searchsorted(row, torch.arange(self.n_rows + 1))
        tensors |= {"codes.offsets": offsets, "codes.features": feature, "codes.values": act}
        docs = tensors["doc"][tensors["mask"].bool()].unique()
        document, feature, act = (torch.cat(column) for column in zip(*self.maxima, strict=True))
        all_seen = torch.ones(len(docs), dtype=torch.bool)
        maxima = in_csr(torch.searchsorted(docs, document.int()), feature, act, all_seen, F)
        return tensors | {
            "max.docs": docs,
            "max.offsets": maxima.offsets,
            "max.features": maxima.features,
            "max.values": maxima.values,
        }, self.documents


def _read(work: _Work, sae: SAE, source: Source, hook: str, progress: Callable[[int], object] | None) -> None:
    """From where the work stands to the end of the source."""
    if progress is not None and work.rows:
        progress(sum(work.rows))
    if work.is_read:
        return
    read = reader(sae)
    largest = -1
    for step in source(work.state):
        block = step.block
        if hook not in block.acts:
            raise UserError(f"index: the blocks hold {', '.join(block.acts)}, not {hook}. Use one of those hooks.")
        own = counted(block, hook)
        found = entries(read, block, hook, own, work.open.next_row)
        best = strongest(found, work.F)
        work.gather.add(found, best)
        work.open.add(block, own, found, best)
        work.open.documents += step.documents
        work.n_documents += len(step.documents)
        work.n_tokens += int(own.sum())
        largest = max(largest, int(block.doc.max())) if len(block.doc) else largest
        if work.open.n_rows >= PART_ROWS:
            work.close_part(step.state)
            if work.save_is_due():
                work.save()
        if progress is not None:
            progress(len(block.mask))
    if work.n_tokens == 0:
        raise UserError("index: the text holds no token that counts. Give more text.")
    if largest >= work.n_documents:
        raise UserError(
            f"index: a block holds document {largest:,}, only {work.n_documents:,} documents were "
            "given. Give the documents that the blocks were made from."
        )
    if work.open.n_rows or work.open.documents:
        work.close_part(None)
    work.is_read = True
    work.save()


def _finish(
    work: _Work,
    sae: SAE,
    host: Host | None,
    hook: str,
    token_strings: Sequence[str],
    scores: bool,
    n_beginnings: int,
    progress: Callable[[int], object] | None,
) -> None:
    folder, kept = work.folder, work.gather
    stats = kept.stats(work.n_tokens) | {"document_density": _document_density(work)}
    files.write_safetensors(folder / "feature_stats.safetensors", stats, {"n_tokens": str(work.n_tokens)})
    files.write_safetensors(folder / "examples.safetensors", kept.examples())
    files.write_safetensors(folder / "top_tokens.safetensors", kept.top_tokens(N_TOKENS))
    files.write_text(folder / "vocab.json", json.dumps(list(token_strings), ensure_ascii=False))
    if host is not None and sae.d_out == host.d_model:  # hook_z: its directions are not the residual stream's
        fired = stats["max_act"].nonzero().flatten() if scores else None
        lens = _lens(folder, sae, host, hook, stats["max_act"], fired, n_beginnings, progress)
        files.write_safetensors(folder / "lens.safetensors", lens)
    facts = Facts(
        format=FORMAT,
        hook=hook,
        host=host.name if host is not None else sae.cfg.metadata.model_name,
        sae=work.key["sae"],
        n_features=work.F,
        n_tokens=work.n_tokens,
        n_positions=sum(work.rows),
        n_documents=work.n_documents,
        top=work.key["top"],
        parts=work.rows,
        text=work.key["about"] or {},
    )
    files.write_json(folder / FACTS, asdict(facts))
    words.rebuild(Index.open(folder))
    for path in (folder / _STATE, *folder.glob("scores-*.safetensors")):
        files.remove_file(path)


def _document_density(work: _Work) -> Tensor:
    """Share of the documents, of which a token was counted, in which a feature fires."""
    every, times = torch.cat([*work.docs, torch.zeros(0, dtype=torch.int32)]).unique(return_counts=True)
    shared = every[times > 1]  # their entries lie in several parts
    count = torch.zeros(work.F, dtype=torch.int64)
    pairs = [torch.zeros(0, dtype=torch.int64)]
    for number in range(len(work.rows)):
        part = opened(work.folder / _PART.format(number))
        docs, offsets, features = (part.get_tensor(f"max.{name}") for name in ("docs", "offsets", "features"))
        of = docs.repeat_interleave(offsets.diff())
        several = torch.isin(of, shared)
        count += torch.bincount(features[~several], minlength=work.F)
        pairs.append(of[several].long() * work.F + features[several])
    count += torch.bincount(torch.cat(pairs).unique() % work.F, minlength=work.F)
    return (count / max(len(every), 1)).float()


def _lens(
    folder: Path,
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
    names = ("top", "top_values", "bottom", "bottom_values")
    tensors = {name: getattr(read, name) for name in names}
    if scored is None:
        return tensors
    parts: list[dict[str, Tensor]] = []
    for number, some in enumerate(scored.split(_SCORED)):
        path = folder / f"scores-{number:05}.safetensors"
        if not path.exists():
            found = lenses.output_scores(
                host, sae, some, hook, top_tokens=read.top[some], max_act=max_act,
                beginnings=lenses.BEGINNINGS[:n_beginnings], progress=progress,
            )  # fmt: skip
            files.write_safetensors(path, {"score": found.score, "says": found.says, "says_p": found.says_p})
        elif progress is not None:
            progress(len(some))
        parts.append(files.read_safetensors(path)[0])
    F = sae.cfg.d_sae
    m = parts[0]["says"].shape[1] if parts else 0
    score, says, says_p = (torch.cat([part[name] for part in parts]) if parts else torch.zeros(0, m)
                           for name in ("score", "says", "says_p"))  # fmt: skip
    tensors["output_score"] = torch.full((F,), float("nan")).index_copy_(0, scored, score.flatten())
    tensors["says"] = torch.full((F, m), -1, dtype=torch.int32).index_copy_(0, scored, says.int())
    tensors["says_p"] = torch.zeros(F, m).index_copy_(0, scored, says_p)
    return tensors
