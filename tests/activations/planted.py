"""Stores of planted rows, made without a language model: what a row holds is a function of its token."""

import torch

from sae.activations import build
from sae.activations.harvest import Block
from sae.activations.manifest import Reading, TextFacts
from sae.documents import Document
from sae.parallel import Rank
from sae.places import Place
from sae.text import Rows

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
CONTEXT = 8


class Packer:
    """Sequence s is document s; token t of it is s * CONTEXT + t; the first position does not count."""

    def __init__(self, sequences, note, context=CONTEXT):
        self.sequences, self.note, self.context = sequences, note, context
        self.counts = dict.fromkeys(("documents", "tokens", "positions", "padding", "special", "first", "sliced"), 0)
        self.sources = {}

    def __iter__(self):
        for start in range(0, self.sequences, 5):
            s = torch.arange(start, min(start + 5, self.sequences), dtype=torch.int32)
            for number in s.tolist():
                self.note(Document(f"text {number}\u2028and\x85more", group=f"g{number}", topic="t"))
            t = torch.arange(self.context, dtype=torch.int32)
            tokens = s[:, None] * self.context + t
            pos = t.expand_as(tokens).contiguous()
            self.counts["documents"] += len(s)
            self.counts["positions"] += tokens.numel()
            self.counts["tokens"] += tokens.numel()
            self.counts["first"] += len(s)
            yield Rows(tokens, s[:, None].expand_as(tokens).contiguous(), pos, pos > 0)


def acts_of(tokens, width=16, hook=HOOK):
    """Exact in bfloat16: the token in base 128, and a constant of the hook."""
    out = torch.zeros(len(tokens), width)
    out[:, 0], out[:, 1], out[:, 2] = tokens % 128, tokens // 128 % 128, tokens // 16384
    out[:, 3] = 1.0 if hook == HOOK else 2.0
    return out.to(torch.bfloat16)


def token_of(acts):
    return (acts[:, 0].float() + 128 * acts[:, 1].float() + 16384 * acts[:, 2].float()).long()


def forward(hooks, width=16, each=lambda: None):
    def run(rows):
        for start in range(0, len(rows), 4):
            each()
            part = rows.part(start, start + 4)
            tokens = part.tokens.reshape(-1)
            acts = {hook: acts_of(tokens, width, hook) for hook in hooks}
            flat = (getattr(part, name).reshape(-1) for name in ("doc", "pos", "mask"))
            yield Block(acts, tokens, *flat)

    return run


def text_facts(**changes):
    facts = {"source": "memory", "column": "text", "part": "train", "held_out": 0.1, "max_tokens": None}
    facts |= {"context": CONTEXT, "isolate_documents": True, "positions": None, "tokenizer": "t0k", "shard_rows": 80}
    return TextFacts(**(facts | changes))


def reading_facts(hooks=(HOOK,), width=16, **changes):
    facts = {"host": "tiny", "host_fingerprint": "f00d", "computed": "bfloat16", "dtype": "bfloat16"}
    facts |= {"hooks": dict.fromkeys(hooks, width), "outlier_norm": dict.fromkeys(hooks, 99.0)}
    return Reading(**(facts | changes))


def make(path, sequences=43, *, hooks=(HOOK,), width=16, rank=None, text=None, each=lambda: None, fits=None, **reading):
    """Build a store, or go on building it; the finished store, or None where other ranks have work left."""
    place, rank = Place(path), rank or Rank()
    facts, wanted = text or text_facts(), reading_facts(hooks, width, **reading)
    with build.writing(place, rank):
        with build.changing_manifest(place):
            manifest = build.planned(
                place,
                facts,
                lambda: build.plan(
                    place, facts, lambda note: Packer(sequences, note, facts.context), fits or (lambda rows: None)
                ),
            )
            numbers, missing = build.begun(place, manifest, wanted)
            number = numbers[0] if numbers else None
            if missing:
                manifest["readings"].append({"facts": vars(wanted), "shards": None})
                number = len(manifest["readings"]) - 1
                place.write_json(build.MANIFEST, manifest)
        there = build.finished(place, manifest, number)
        mine = [n for n in rank.mine(range(len(manifest["shards"]))) if n not in there]
        build.run(place, manifest, number, mine, forward(hooks, width, each))
        return build.merged(place, number, rank)
