"""Which layout a folder has, told from its files; reading it, whichever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from sae.errors import UserError
from sae.formats import checks, dictionary_learning, gemma_scope, openmoss, saelens, sparsify, training
from sae.formats.facts import Facts

PAGES: dict[str, ModuleType] = {
    "saelens": saelens,
    "training": training,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "openmoss": openmoss,
}
"""Each page's `recognises` is tried in this order."""


def recognised(path: Path) -> str | None:
    """The name of the layout, None where no page recognises it."""
    return next((name for name, page in PAGES.items() if page.recognises(home(path))), None)


def home(path: Path) -> Path:
    """The folder of a weights file, where a layout has one SAE a folder; any other path as it is."""
    layout = {saelens.WEIGHTS: saelens, sparsify.WEIGHTS: sparsify}.get(path.name)
    return path.parent if layout is not None and path.is_file() and layout.recognises(path.parent) else path


def layout_of(path: Path) -> str:
    """The name of the layout. Raises UserError for a path that is not there, or that no page recognises."""
    if not os.path.exists(path):  # Path's own raises for a name that is too long
        raise UserError(f"{path}: no such SAE. Check the path.")
    if (name := recognised(path)) is not None:
        return name
    refuse_root(path)
    raise UserError(
        f"{path}: not an SAE folder (no cfg.json in it, nor files of another layout: {', '.join(PAGES)}). "
        "Give the folder that holds the weights."
    )


def refuse_root(path: Path) -> None:
    """Raises UserError, which names one, where SAE folders lie some levels below: a run of several hook points, a
    repository of several SAEs."""
    if not path.is_dir():
        return
    below = (one for pattern in ("*/", "*/*/", "*/*/*/") for one in sorted(path.glob(pattern)))
    if inner := next((one for one in below if recognised(one) is not None), None):
        raise UserError(f"{path}: is not an SAE folder, but there are some in it. Give one, for example {inner}.")


def read(
    path: Path, *, where: str = "", trust_pickle: bool = False, overrides: Mapping[str, Any] | None = None
) -> tuple[str, Facts, dict[str, Tensor]]:
    """(layout, facts, tensors) of a folder of any layout, or of a file in one.

    where         what the folder is called elsewhere ("google/gemma-scope-2b-pt-res/layer_20/…"), for layouts whose
                  names on disk say what they belong to; the path itself where it is empty
    trust_pickle  read pickles with a torch whose guard is known to be broken
    overrides     what a list of releases says beyond the files (releases.py): all of it of SAELens's own layout, of
                  others where activations come from; what their weights are, their files know themselves
    """
    path = home(path)
    name, overrides = layout_of(path), overrides or {}
    more = {"overrides": overrides} if PAGES[name] is saelens else {}
    # the Hub's cache has folders by name, but links for files, to what has no name
    own = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    facts, tensors = PAGES[name].read(path, where=where or str(own), trust_pickle=trust_pickle, **more)
    if overrides:
        said = {key: value for key, value in overrides.items() if key in saelens.FOREIGN}
        metadata = {**facts.metadata, "foreign": {**facts.metadata.get("foreign", {}), **said}}
        metadata["dataset"] = metadata.get("dataset") or checks.text(overrides, "dataset_path")
        facts = replace(facts, metadata=metadata)
    return name, facts, tensors
