"""SAELens's list of releases: the short names by which its users know published SAEs, and where each lies on the Hub.

The list is a file of the package sae-lens, which has to be installed and is not imported: that takes seconds.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import UserError, nearest, printable

_READ = (
    "sae_lens", "sparsify", "dictionary_learning_1", "gemma_2", "gemma_2_transcoder", "gemma_3", "llama_scope",
    "llama_scope_r1_distill",
)  # fmt: skip
"""Its names of the layouts that a page of formats/ reads; the others' are not."""


@dataclass(frozen=True)
class Release:
    """Where SAELens's list says that an SAE lies."""

    repo: str
    folder: str
    overrides: dict[str, Any]
    """What the list says beyond the files, as keys of cfg.json: norm_scaling_factor, neuronpedia_id, dataset_path, …"""


def find(x: str, sae_id: str | None) -> Release | None:
    """The SAE that SAELens calls so; None for a repository's name (user/repo). Its package is not imported.

    Raises UserError for a name that is in no list, and for a layout that is not read.
    """
    if "/" in x:
        return None
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{x}: no folder here. For the name of a SAELens release run `pip install sae-lens` (its list is all that "
            "is used), or give a repository of the Hub (user/repo) and the folder in it."
        )
    path = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    releases = _releases(path)
    if x not in releases:
        raise UserError(
            f"{x}: neither a folder here nor a release of SAELens{nearest(x, releases) or '. Check the name.'}"
        )
    given = releases[x]
    if (layout := given.get("conversion_func") or "sae_lens") not in _READ:
        raise UserError(f"{x}: its files are of the layout {layout}, which is not read. Choose another release.")
    entries = given["saes"]
    if sae_id not in entries:
        what = f"has no SAE {sae_id!r}{nearest(sae_id, entries) or '.'}" if sae_id else "is a release of several SAEs."
        some = ", ".join(list(entries)[:3])
        raise UserError(f"{x}: {what} Give one of its {len(entries):,} as sae_id, such as {some}.")
    entry, overrides = entries[sae_id], dict(given.get("config_overrides") or {})
    for theirs, key in (("neuronpedia", "neuronpedia_id"), ("norm_scaling_factor", "norm_scaling_factor")):
        if entry.get(theirs) is not None:
            overrides[key] = entry[theirs]
    return Release(str(given["repo_id"]), str(entry["path"]), overrides)


@functools.cache
def _releases(path: Path) -> dict[str, Any]:
    """SAELens's list; a second's work, with the C loader where PyYAML has it."""
    import yaml

    try:
        found = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {
            name: {**one, "saes": {str(entry["id"]): entry for entry in one["saes"]}} for name, one in found.items()
        }
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no list of releases ({printable(str(error))[:200]}). Install sae-lens again."
        ) from error
