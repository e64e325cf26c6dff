"""Composes the rooms into the verbs: harvest, verify, train, evaluate, steer, convert, push, info; finding.py has those
that look for features. Used alike by the command line, notebooks and scripts; it prints nothing but progress on
stderr, and gives back objects.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from sae import files
from sae.activations import build
from sae.activations import store as stores
from sae.activations.manifest import MANIFEST, read_manifest
from sae.activations.verify import faults
from sae.autoencoder import SAE
from sae.converting import convert, convert_layout
from sae.dialling import calibrate, effects, steer_prompt
from sae.documents import told
from sae.errors import UserError
from sae.features import index as indexes
from sae.finding import atlas, classify, diff, find, host_of, index, label, sae_of, show, text_recipe
from sae.finish import evaluate_on
from sae.formats import layouts
from sae.harvesting import checked_by_host, forecast, harvest, masked
from sae.host import Host
from sae.places import Place
from sae.trainer import train, train_many
from sae.training import checkpoint
from sae.training.log import Progress

__all__ = [
    "atlas", "calibrate", "classify", "convert", "convert_layout", "diff", "effects", "evaluate", "find", "forecast",
    "harvest", "index", "info", "label", "push", "show", "steer_prompt", "train", "train_many", "verify",
]  # fmt: skip

# ---- evaluate --------------------------------------------------------------------------------------------


def evaluate(
    sae: SAE | str | Path,
    *,
    host: Host | str | None = None,
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
    return evaluate_on(sae, host_of(sae, host), recipe, tokens, ce_tokens, progress)


# ---- push ------------------------------------------------------------------------------------------------


def push(sae: str | Path, repo: str, path: str | None = None, **options: Any) -> str:
    """Put the SAE of a folder on the Hub (SAE.push_to_hub, with its options), with the README.md that is there or a
    card from the facts; its address."""
    own = Path(sae) / "README.md"
    try:
        readme = own.read_text(encoding="utf-8") if own.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{own}: cannot be read as text ({error}). Mend or remove it.") from error
    return SAE.load(sae).push_to_hub(repo, path, readme=readme, **options)


# ---- info, verify ------------------------------------------------------------------------------------------


def info(path: str | Path) -> dict[str, Any]:
    """What a folder is (SAE, store, index, run) and what is known of it."""
    if "://" in str(path):  # only stores lie elsewhere
        return _store_info(stores.Store.open(path))
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder. Check the path.")
    if layouts.recognised(path) is not None:
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
        facts |= {"host": metadata.model_name, "hook": metadata.hook_name, "units": metadata.units}
        if metadata.units == "normalised":
            facts["norm factor"] = metadata.norm_factor or "not noted"
        more = {"writes": metadata.hook_name_out, "d_out": sae.cfg.d_out, "skip": sae.W_skip is not None}
        more |= {"came from": metadata.layout, "norms tokens": sae.cfg.normalize_activations.removesuffix("none")}
        facts |= {name: value for name, value in more.items() if value}
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
    layouts.refuse_root(path)
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
