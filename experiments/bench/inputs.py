"""The activations that benchmarks run on: of a file, a store, the bundled host, or (other widths) synthetic.

Everything is [N, d] bfloat16 in raw units unless said otherwise. What the bundled host gives is made once
and kept under the user's cache folder, `bench/`: the train part and the held-out part of the bundled corpus,
by documents.
"""

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

HOOK = "blocks.15.hook_resid_post"
HELD_OUT = 0.1


def activations(d: int, n: int, source: str | None) -> tuple[Tensor, str]:
    """About n activations of width d and one word on where they come from."""
    if source is not None:
        acts = parts(source, n, 0)["train"][:n]
        if acts.shape[1] != d:
            raise SystemExit(f"{source}: width {acts.shape[1]}, the shape says {d}. Change --shape.")
        return acts, source
    if d == 576:
        return parts(None, n, 0)["train"], f"smollm2 {HOOK}"
    return synthetic(d, n), "synthetic"


def normed(acts: Tensor) -> Tensor:
    """Scaled so that the mean norm is sqrt(d)."""
    factor = acts.shape[1] ** 0.5 / acts.float().norm(dim=1).mean()
    return (acts.float() * factor).to(acts.dtype)


def synthetic(d: int, n: int, seed: int = 0) -> Tensor:
    """Sparse mixtures of 8·d random unit directions; direction i fires with odds ~ 1/i, about 30 a row."""
    generator = torch.Generator().manual_seed(seed)
    G = 8 * d
    directions = torch.nn.functional.normalize(torch.randn(G, d, generator=generator), dim=1)
    odds = 1 / torch.arange(1, G + 1)
    odds = (30 * odds / odds.sum()).clamp(max=0.5)
    rows = []
    for start in range(0, n, 1024):
        B = min(1024, n - start)
        fires = torch.rand(B, G, generator=generator) < odds
        strength = torch.empty(B, G).exponential_(generator=generator)
        rows.append((fires * strength) @ directions + 0.02 * torch.randn(B, d, generator=generator))
    return torch.cat(rows).bfloat16()


def parts(source: str | None, n_train: int, n_held_out: int) -> dict[str, Tensor]:
    """`train` and `held_out` [N, d] from a safetensors file, an activation store, or the bundled host."""
    if source is None:
        return _bundled(n_train, n_held_out)
    if Path(source).is_dir():
        return _from_store(source)
    return load_file(source)


def _from_store(folder: str) -> dict[str, Tensor]:
    """A store's first hook; documents are held out by the package's own rule where both parts are there."""
    from sae.activations.store import Store
    from sae.text import part_of

    store = Store.open(folder)
    hook = next(iter(store.hooks))
    held = torch.tensor([part_of(document, HELD_OUT) == "held_out" for document in store.documents])
    found: dict[str, list[Tensor]] = {"train": [], "held_out": []}
    for block in store.blocks(hook):
        is_held = held[block.doc.long().clamp(min=0)]
        found["train"].append(block.acts[hook][block.mask & ~is_held])
        found["held_out"].append(block.acts[hook][block.mask & is_held])
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _bundled(n_train: int, n_held_out: int) -> dict[str, Tensor]:
    from sae import files
    from sae.bundled import corpus_path

    corpus = files.checksum(corpus_path())[:8]
    path = files.cache_dir() / "bench" / f"smollm2-15-{corpus}-{n_train}-{n_held_out}.safetensors"
    if not path.exists():
        files.write_safetensors(path, _harvested(n_train, n_held_out))
    return load_file(path)


def _harvested(n_train: int, n_held_out: int) -> dict[str, Tensor]:
    """Run the bundled host over its corpus until enough positions are there, or the corpus ends."""
    from sae.activations.harvest import outlier_limits, stream
    from sae.host import Host
    from sae.text import documents, pack, part_of

    host = Host.load("smollm2")
    limits = None
    found = {}
    for part, wanted in (("train", n_train), ("held_out", n_held_out)):
        if not wanted:
            continue
        texts = (text for text in documents("bundled") if part_of(text, HELD_OUT) == part)
        rows = iter(pack(texts, host.tokenizer, 128, special_ids=host.special_ids, rows_per_batch=32))
        if limits is None:
            first = next(rows)
            limits = outlier_limits(host, first, [HOOK])
            rows = itertools.chain([first], rows)
        pieces, have = [], 0
        for block in stream(host, rows, [HOOK], outlier_norm=limits):
            pieces.append(block.acts[HOOK][block.mask].bfloat16())
            have += pieces[-1].shape[0]
            if have >= wanted:
                break
        found[part] = torch.cat(pieces)[:wanted]
    return found


def order(n_rows: int, tokens: int, seed: int) -> Tensor:
    """Row numbers [tokens]: one permutation after another, the same for everybody who trains on them."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-tokens // n_rows)
    return torch.cat([torch.randperm(n_rows, generator=generator) for _ in range(epochs)])[:tokens]
