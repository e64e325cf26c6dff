"""What a store says of itself: manifest.json, its facts, and whether a file is such a manifest at all.

Whoever reads a store reads this first. A manifest is checked field by field, for it may come from anywhere: what is not
as ours are is one line, and no name in it leads out of the store's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from sae.activations.shards import STORED, Entry, Layout
from sae.errors import UserError
from sae.places import Place

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TextFacts:
    """What the token rows were made of, and how; the same for all readings."""

    source: str | dict[str, float]
    column: str
    part: str
    """train, held_out or all."""
    held_out: float
    max_tokens: int | None
    context: int
    isolate_documents: bool
    positions: str | None
    tokenizer: str
    """Its fingerprint."""
    shard_rows: int


@dataclass(frozen=True)
class Reading:
    """One host's pass over the token rows."""

    host: str
    host_fingerprint: str
    computed: str
    """Number format of the forward."""
    hooks: dict[str, int]
    """Canonical name → width."""
    dtype: str
    """Number format on disk."""
    outlier_norm: dict[str, float]
    """By hook: rows whose norm is larger are masked."""


def sequences_a_shard(text: Mapping[str, Any]) -> int:
    return max(1, text["shard_rows"] // text["context"])


def cut(text: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """Block, first sequence in it and end of each shard; a shard is of one block, so that each is read once."""
    step = sequences_a_shard(text)
    return [
        (number, start, min(start + step, block["sequences"]))
        for number, block in enumerate(blocks)
        for start in range(0, block["sequences"], step)
    ]


def layout_of(manifest: Mapping[str, Any], reading: int) -> Layout:
    """Of the shards of a reading. Their id names the text, its token rows (by checksum) and the reading of it."""
    facts, context = manifest["readings"][reading]["facts"], manifest["text"]["context"]
    all_of_it = [manifest["text"], [block["sha256"] for block in manifest["blocks"]], facts]
    name = sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:16]
    return Layout(name, context, facts["hooks"], facts["dtype"])


def read_manifest(place: Place) -> dict[str, Any] | None:
    """The manifest of a store, None where there is none; a UserError for one that is not ours, or of another format."""
    if not place.exists(MANIFEST):
        return None
    manifest = place.read_json(MANIFEST, ["format"])
    if manifest["format"] != FORMAT:
        newer = isinstance(manifest["format"], int) and manifest["format"] > FORMAT
        do = "Upgrade goldengate-sae." if newer else "Delete it and harvest again."
        raise UserError(f"{place.named(MANIFEST)}: format {manifest['format']!r}, this version reads {FORMAT}. {do}")
    wrong = _wrong(manifest)
    if wrong:
        raise foreign(place, wrong)
    return manifest


def _count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**48


def _name(value: Any) -> bool:
    """A file of the store itself: nothing that leads out of its folder."""
    return isinstance(value, str) and value != "" and not set(value) & set("/\\:\0") and not value.startswith(".")


def _wrong(manifest: dict[str, Any]) -> str:
    """The first place in a manifest that is not as ours are, in words; empty where all is well."""
    kinds: dict[str, type] = {"text": dict, "counts": dict, "blocks": list, "shards": list, "readings": list}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            return key
    text, shards = manifest["text"], manifest["shards"]
    if set(text) != {one.name for one in fields(TextFacts)}:
        return "the fields of text"
    words = all(isinstance(text[key], str) for key in ("column", "part", "tokenizer"))
    if not words or not isinstance(text["source"], str | dict) or not isinstance(text["held_out"], int | float):
        return "text"
    if isinstance(text["source"], dict) and not all(isinstance(one, int | float) for one in text["source"].values()):
        return "text.source"
    if not _count(text["context"], 2) or not _count(text["shard_rows"], 1):
        return "text.context or text.shard_rows"
    counted = ("documents", "tokens", "positions", "padding", "special", "first", "sliced", "sequences")
    if not all(_count(manifest["counts"].get(key)) for key in counted):
        return "counts"
    for block in manifest["blocks"]:
        if not isinstance(block, dict) or not all(_name(block.get(key)) for key in ("rows", "documents")):
            return "blocks"
        if not _count(block.get("sequences"), 1) or not _count(block.get("n_documents")):
            return "the counts of a block"
        if not all(isinstance(block.get(key), str) for key in ("sha256", "documents_sha256")):
            return "the checksums of a block"
    if not shards or not all(_count(rows, 1) for rows in shards):
        return "shards"
    if shards != [(stop - start) * text["context"] for _, start, stop in cut(text, manifest["blocks"])]:
        return "shards, which are not those of its blocks"
    return next((wrong for one in manifest["readings"] if (wrong := _wrong_reading(one, shards))), "")


def _wrong_reading(one: Any, shards: list[int]) -> str:
    if not isinstance(one, dict) or not {"facts", "shards"} <= set(one) or not isinstance(one["facts"], dict):
        return "readings"
    facts = one["facts"]
    if set(facts) != {field.name for field in fields(Reading)}:
        return "the fields of a reading"
    if not all(isinstance(facts[key], str) for key in ("host", "host_fingerprint", "computed")):
        return "a reading"
    hooks, norms = facts["hooks"], facts["outlier_norm"]
    if not isinstance(hooks, dict) or not hooks or not all(_count(width, 1) for width in hooks.values()):
        return "the hooks of a reading"
    if not isinstance(norms, dict) or not all(isinstance(norm, int | float) for norm in norms.values()):
        return "the norms of a reading"
    if not isinstance(facts["dtype"], str) or facts["dtype"] not in STORED:
        return f"dtype {facts['dtype']!r}"
    if one["shards"] is None:
        return ""
    if not isinstance(one["shards"], list) or len(one["shards"]) != len(shards):
        return "the shards of a reading"
    entries = zip(one["shards"], shards, strict=True)
    return next((wrong for entry, rows in entries if (wrong := wrong_entry(entry, rows))), "")


def wrong_entry(entry: Any, rows: int) -> str:
    """What is wrong with what is noted of a shard of so many rows; empty where nothing is."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Entry)}:
        return "the fields of a shard"
    if not _name(entry["file"]) or not isinstance(entry["sha256"], str) or entry["rows"] != rows:
        return "a shard"
    if not _count(entry["valid"]) or entry["valid"] > rows or not _count(entry["bytes"], 1):
        return "the counts of a shard"
    return ""


def foreign(place: Place, why: object) -> UserError:
    return UserError(f"{place.named(MANIFEST)}: not a manifest of ours ({why}). Delete the store and harvest again.")
