"""Composes the rooms into the verbs: harvest, verify, train, evaluate, steer, info; finding.py has those that look for
features. Used alike by the command line, notebooks and scripts; it prints nothing but progress on stderr, and gives
back objects.
"""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae import bundled, files, labels
from sae.activations import build
from sae.activations import store as stores
from sae.activations.manifest import MANIFEST, read_manifest
from sae.activations.verify import faults
from sae.autoencoder import SAE
from sae.documents import documents, told
from sae.errors import UserError
from sae.features import index as indexes
from sae.finding import atlas, classify, diff, find, host_of, index, label, sae_of, show, text_recipe
from sae.finish import evaluate_on
from sae.harvesting import checked_by_host, forecast, harvest, masked
from sae.host import Host
from sae.places import Place
from sae.steering import side_by_side, steer
from sae.steering.calibrate import SHARES, Effort, tokens_asked
from sae.steering.calibrate import calibrate as steer_calibrate
from sae.steering.directions import typical_norm
from sae.steering.scores import Lexicon
from sae.trainer import train, train_many
from sae.training import checkpoint
from sae.training.log import Progress

__all__ = ["atlas", "calibrate", "classify", "diff", "evaluate", "find", "forecast", "harvest", "index", "info",
    "label", "show", "steer_prompt", "train", "train_many", "verify"]  # fmt: skip


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
    sae = sae_of(sae)
    recipe = text_recipe(sae)
    if text is not None and text != recipe.source:
        recipe = dataclasses.replace(recipe, source=text, held_out=0.0, max_tokens=None)
    return evaluate_on(sae, host or host_of(sae), recipe, tokens, ce_tokens, progress)


# ---- steer, info, verify ---------------------------------------------------------------------------------


def steer_prompt(
    sae: str | Path,
    dials: str | Sequence[str],
    prompt: str,
    *,
    host: Host | None = None,
    how: Mapping[str, Any] | None = None,
    stream_plain: Callable[[str], None] | None = None,
    stream_steered: Callable[[str], None] | None = None,
    **sampling: Any,
) -> tuple[str, str]:
    """The plain and the steered answer to one prompt; `how` are keywords of `steer` (kind, positions, when, …)."""
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    steering = steer(host, loaded, dials, **(how or {}))
    return side_by_side(host, steering, prompt, stream_plain=stream_plain, stream_steered=stream_steered, **sampling)


def calibrate(
    sae: str | Path,
    feature: int | str,
    names: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    host: Host | None = None,
    effort: Effort | None = None,
    shares: Sequence[float] = SHARES,
    keep: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """How far to turn a feature (its number or label): the cells of `steering.calibrate`, chosen strength included.

    names    words that count as speaking of the concept; none: the feature's label without its article
    keep     a JSON file that cells are kept in as they end; what stands in it for this feature is not asked again
    """
    loaded = SAE.load(sae)
    number = feature if isinstance(feature, int) else labels.feature_of(feature, loaded.labels)
    label = re.sub(r"^(the|an?) ", "", loaded.labels.get(number, ""))
    if not names and not label:
        raise UserError(f"calibrate: feature {number} has no label. Say what counts: --names 'golden gate,bridge'.")
    lexicon = Lexicon(tuple(names) or (label,), tuple(parts))
    host, effort = host or host_of(loaded), effort or Effort()
    facts = {"sae": files.checksum(Path(sae) / "sae_weights.safetensors"), "feature": number, "names": lexicon.names,
             "parts": lexicon.parts, "effort": dataclasses.asdict(effort), "shares": list(shares)}  # fmt: skip
    facts = json.loads(files.json_text(facts))
    before = files.read_json(keep) if keep and Path(keep).exists() else {"cells": []}
    known = before["cells"] if before.get("facts") == facts else []
    if keep and before["cells"] and not known:
        raise UserError(f"{keep}: has the cells of another feature or setting. Give another file or remove it.")
    hook = loaded.cfg.metadata.hook_name
    some = [document.text for document in itertools.islice(documents("bundled"), 32)]
    norm = typical_norm(host, hook, some)
    todo = tokens_asked(len(shares), effort)
    say(f"about {todo:,} tokens to write, {len(known)} cells known: {_minutes(host, todo)} where none is")
    cells = list(known)
    for cell in steer_calibrate(host, loaded, number, lexicon, norm, known=known, shares=shares, effort=effort):
        cells.append(cell)
        if keep:
            files.write_json(keep, {"facts": facts, "cells": cells})
        about, overall = (cell[key]["value"] for key in ("about", "overall"))
        say(f"{cell['half']} {cell['arm']}: about it {about:.0%}, overall {overall:.2f}")
    return cells


def _minutes(host: Host, tokens: int) -> str:
    """How long the host writes so many tokens in batches, from a short try."""
    start = time.perf_counter()
    host.generate(bundled.questions()["reporting"][:32], max_new_tokens=8, temperature=0)
    return f"about {max(1, round(tokens * (time.perf_counter() - start) / (32 * 8) / 60))} min"


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
        facts = dataclasses.asdict(indexes.Index.open(path).facts)
        return {"what": "feature index", **facts, "parts": len(facts["parts"])}
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
