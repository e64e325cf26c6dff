"""Composes the rooms into the verbs: harvest, verify, train, evaluate, index, find, show, steer, diff, classify. Used
alike by the command line, notebooks and scripts; it prints nothing but progress on stderr, and gives back objects.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sae import files
from sae.activations import build
from sae.activations import store as stores
from sae.activations.harvest import Block, stream
from sae.activations.manifest import MANIFEST, read_manifest
from sae.activations.verify import faults
from sae.autoencoder import SAE
from sae.documents import told
from sae.errors import UserError
from sae.features import compare, labelled, probe, search
from sae.features import index as indexes
from sae.finish import check_host, evaluate_on
from sae.harvesting import checked_by_host, forecast, harvest, masked
from sae.host import Host
from sae.places import Place
from sae.recipe import TextRecipe
from sae.steering import side_by_side, steer
from sae.token_rows import Text
from sae.trainer import train, train_many
from sae.training import checkpoint
from sae.training.log import Progress

__all__ = ["classify", "diff", "evaluate", "find", "forecast", "harvest", "index", "info", "show", "steer_prompt",
    "train", "train_many", "verify"]  # fmt: skip


# ---- evaluate --------------------------------------------------------------------------------------------


def evaluate(
    sae: SAE | str | Path,
    *,
    host: Host | None = None,
    text: str | None = None,
    tokens: int = 20_000,
    ce_tokens: int = 5_000,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate on the held-out documents of the SAE's own text, or on all of another `text`. A report for JSON;
    `sae.evaluation.core.headline` has its figures."""
    sae = _sae(sae)
    recipe = _text_recipe(sae)
    if text is not None and text != recipe.source:
        recipe = dataclasses.replace(recipe, source=text, held_out=0.0, max_tokens=None)
    return evaluate_on(sae, host or host_of(sae), recipe, tokens, ce_tokens, progress)


# ---- index, find, show, steer ----------------------------------------------------------------------------


def index(
    sae: SAE | str | Path,
    *,
    host: Host | None = None,
    text: str | None = None,
    store: str | Path | None = None,
    out: str | Path | None = None,
    tokens: int | None = None,
    scores: bool = True,
    progress: bool = True,
) -> indexes.Index:
    """Where every feature fires, over the SAE's own text (all parts), another `text`, or a `store`.

    scores  also every feature's output score; without them a search computes those of its candidates
    """
    path = sae if isinstance(sae, str | Path) else None
    sae = _sae(sae)
    if out is None:
        if path is None:
            raise UserError("index: an SAE object has no folder. Say where the index goes with out=.")
        out = Path(path) / "index"
    host = host or host_of(sae)
    check_host(sae, host)
    hook = host.hook(sae.cfg.metadata.hook_name)
    if store is not None:
        opened = stores.Store.open(store)
        opened.check(host.fingerprint, hook, tokenizer=host.tokenizer_fingerprint, width=host.width(hook))
        total = opened.n_rows if tokens is None else min(tokens, opened.n_rows)
        blocks, found = _first(opened.blocks(hook, host.fingerprint), total), opened.documents
    else:
        recipe = _text_recipe(sae)
        if text is not None and text != recipe.source:
            recipe = dataclasses.replace(recipe, source=text, max_tokens=None)
        if tokens is not None:
            recipe = dataclasses.replace(recipe, max_tokens=tokens)
        source, found = Text(recipe, host, "all"), []
        limit = sae.cfg.metadata.outlier_norm
        blocks = stream(host, source.rows(found.append), [hook], outlier_norm=None if limit is None else {hook: limit})
        total = source.expected_tokens()
    bar = Progress(total, 0, "tok", name="index", shown=progress)
    scored = Progress(sae.cfg.d_sae, 0, "features", name="output scores", shown=progress and scores)
    strings = host.text_of(list(range(len(host.tokenizer))))
    try:
        return indexes.build(
            sae,
            blocks,
            found,
            strings,
            Path(out),
            hook=hook,
            host=host,
            scores=scores,
            progress=bar.update,
            score_progress=scored.update,
        )
    finally:
        bar.close()
        scored.close()


def _first(blocks: Iterator[Block], rows: int) -> Iterator[Block]:
    """Whole blocks until there are so many rows."""
    done = 0
    while done < rows and (block := next(blocks, None)) is not None:
        done += len(block)
        yield block


def open_index(sae_path: str | Path, index_path: str | Path | None = None) -> indexes.Index:
    """The index of an SAE folder; a UserError that says how to make one."""
    path = Path(index_path) if index_path else Path(sae_path) / "index"
    if not Path(sae_path).exists():
        raise UserError(f"{sae_path}: no such SAE. Check the path.")
    if not path.exists():
        raise UserError(f"{path}: no index. Make it with `sae index {sae_path}`.")
    return indexes.Index.open(path)


def find(
    sae: str | Path,
    concept: str | None = None,
    *,
    pos: Sequence[str] | None = None,
    neg: Sequence[str] | None = None,
    goal: str = "detect",
    n: int = 10,
    index_path: str | Path | None = None,
    host: Host | None = None,
) -> list[search.Found]:
    """Features of the SAE in a folder, by contrast between texts with the concept and texts of the same form without.

    A concept is looked up in the folder's index and needs no host. Own texts (`pos`, `neg`) are run through it, and
    goal "steer" has it answer two questions with each candidate turned up.
    """
    opened = open_index(sae, index_path)
    if pos is None and goal != "steer":
        return search.find(opened, concept, neg=neg, goal=goal, n=n)
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    return search.find(opened, concept, pos=pos, neg=neg, sae=loaded, host=host, goal=goal, n=n)


def show(sae: str | Path, feature: int, *, n: int = 10, index_path: str | Path | None = None) -> search.Feature:
    """One feature of the SAE in a folder, whole."""
    loaded = SAE.load(sae)
    loaded.check_features([feature])
    return search.show(open_index(sae, index_path), feature, loaded, n=n)


def steer_prompt(
    sae: str | Path,
    dials: str | Sequence[str],
    prompt: str,
    *,
    host: Host | None = None,
    positions: Any = "all",
    kind: str = "clamp",
    stream_plain: Callable[[str], None] | None = None,
    stream_steered: Callable[[str], None] | None = None,
    **sampling: Any,
) -> tuple[str, str]:
    """The plain and the steered answer to one prompt."""
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    steering = steer(host, loaded, dials, positions=positions, kind=kind)
    return side_by_side(host, steering, prompt, stream_plain=stream_plain, stream_steered=stream_steered, **sampling)


def diff(
    sae: str | Path,
    a: str,
    b: str,
    *,
    n: int = 10,
    fdr: float = 0.05,
    index_path: str | Path | None = None,
    host: Host | None = None,
    progress: bool = True,
) -> compare.Diff:
    """Which features tell the texts of two files apart; examples come from the SAE's index where there is one."""
    texts = labelled.of_files([a, b])
    indexed = index_path is not None or (Path(sae) / "index").exists()
    index = open_index(sae, index_path) if indexed else None
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    bar = Progress(None, 0, "tok", name="read", shown=progress)
    try:
        return compare.diff(loaded, host, texts, index=index, n=n, fdr=fdr, progress=bar.update)
    finally:
        bar.close()


def classify(
    sae: str | Path,
    paths: Sequence[str],
    *,
    label: str | None = None,
    widths: Sequence[int] = probe.WIDTHS,
    host: Host | None = None,
    progress: bool = True,
) -> probe.Classification:
    """How well few features tell classes of texts apart: a class a file, or one file and the field that names them."""
    if label is not None and len(paths) != 1:
        raise UserError(f"a label field is looked up in one file, here are {len(paths)}. Give one, or no label.")
    texts = labelled.of_files(paths) if label is None else labelled.of_field(paths[0], label)
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    reading = Progress(None, 0, "tok", name="read", shown=progress)
    try:
        texts, data = probe.pooled(loaded, host, texts, reading.update)
    finally:
        reading.close()
    total = len(texts.texts) * (len(texts.classes) if len(texts.classes) > 2 else 1)
    fitting = Progress(total, 0, "texts", name="fit", shown=progress)
    try:
        return probe.classify(texts, data, widths=widths, progress=fitting.update)
    finally:
        fitting.close()


def info(path: str | Path) -> dict[str, Any]:
    """What a folder is (SAE, store, index, run) and what is known of it."""
    if "://" in str(path):  # only stores lie elsewhere
        return _store_info(stores.Store.open(path))
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Check the path.")
    if (path / "cfg.json").exists():
        sae = SAE.load(path)
        metadata = sae.cfg.metadata
        facts = {
            "architecture": sae.cfg.architecture,
            "trained as": metadata.training_architecture,
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "k": sae.cfg.k,
            "matryoshka_widths": metadata.matryoshka_widths,
            "calibration": metadata.calibration,
        }
        facts = {name: value for name, value in facts.items() if value}  # what this architecture has
        facts |= {"host": metadata.model_name, "hook": metadata.hook_name, "units": "raw"}
        facts |= {name: figure["value"] for name, figure in metadata.evaluation.items() if isinstance(figure, dict)}
        return {
            "what": "SAE",
            **facts,
            "index": (path / "index").exists(),
            "statistics": sae.stats is not None,
        }
    if (path / MANIFEST).exists():
        return _store_info(stores.Store.open(path))
    if (path / "index.json").exists():
        return {"what": "feature index", **dataclasses.asdict(indexes.Index.open(path).facts)}
    if (path / "recipe.yaml").exists():
        saved = checkpoint.all_of(path)
        return {
            "what": "training run",
            "finished": (path / "sae" / "cfg.json").exists(),
            "last checkpoint": saved[-1].name if saved else None,
            "recipe": files.read_json(path / "resolved.json")["recipe"] if (path / "resolved.json").exists() else None,
        }
    raise UserError(f"{path}: neither an SAE, a store, an index nor a run. Give one of these folders.")


def _store_info(store: stores.Store) -> dict[str, Any]:
    return {
        "what": "activation store",
        "rows": store.n_rows,
        "text": dataclasses.asdict(store.text) | {"source": told(store.text.source)},
        "sources": [f"{one.host} {one.hook} ({one.width:,}, {one.dtype})" for one in store.sources],
        "count": [masked(store, i) for i in range(len(store.readings))],
    }


def verify(path: str | Path, *, with_host: bool = False, progress: bool = True) -> dict[str, Any]:
    """Whether a store is what was written: every byte is read; `faults` lists what is not, a line a file.

    with_host   also load each reading's host, compare its fingerprints and run a few rows again
    """
    place = Place(path)
    bar = Progress(None, 0, "B", name="verify", shown=progress)
    try:
        found = list(faults(place, bar.update))
    finally:
        bar.close()
    manifest = read_manifest(place)
    assert manifest is not None, "it was read a moment ago"
    readings = []
    for number, one in enumerate(manifest["readings"]):
        there = build.there(place, manifest, number)
        facts = {
            "host": one["facts"].get("host"),
            "fingerprint": one["facts"].get("host_fingerprint"),
            "hooks": ", ".join(one["facts"].get("hooks", {})),
            "shards": f"{len(there):,} of {len(manifest['shards']):,}",
        }
        if with_host and not found:
            opened = stores.Store.open(path) if one["shards"] is not None else None
            facts |= checked_by_host(opened, opened.numbers.index(number)) if opened else {}
        readings.append(facts)
    return {
        "store": place.url,
        "rows": sum(manifest["shards"]),
        "readings": readings,
        "faults": [f"{fault.file}: {fault.why}" for fault in found],
        "unfinished": not readings or any(one["shards"] is None for one in manifest["readings"]),
        "can be mended": all(fault.shard is not None for fault in found),
    }


def _sae(sae: SAE | str | Path) -> SAE:
    return sae if isinstance(sae, SAE) else SAE.load(sae)


def host_of(sae: SAE) -> Host:
    """Load the host that an SAE was trained on."""
    name = sae.cfg.metadata.model_name
    if not name:
        raise UserError("this SAE does not say which model it was trained on. Pass host=Host.load(...).")
    return Host.load(name)


def _text_recipe(sae: SAE) -> TextRecipe:
    """The text part of the recipe that trained the SAE; the defaults where it is unknown."""
    known = sae.cfg.metadata.recipe.get("text")
    return TextRecipe(**known) if known else TextRecipe(context=sae.cfg.metadata.context_size or 128, held_out=0.0)
