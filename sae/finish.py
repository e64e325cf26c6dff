"""What follows training: from trained parameters to the SAE that ships, with threshold, statistics and evaluation.

Parameters are in normed units, the SAE is in the host's own (raw) units.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae import config, files
from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.errors import UserError
from sae.evaluation import core
from sae.host import Host
from sae.objectives import Params
from sae.recipe import Recipe, TextRecipe
from sae.sources import Channel, Text
from sae.stats import calibrate_threshold, measure
from sae.text import Document
from sae.training.log import Progress

FINISHED = "feature_stats.safetensors"  # written with the finished SAE
MEASURED = 500_000  # rows at most for the statistics


def finish(folder: Path, recipe: Recipe, params: Params, channel: Channel, host: Host | None, progress: bool) -> SAE:
    """Export, calibrate, measure, save as `folder`, and (where there is a host) evaluate on held-out documents.

    channel   the activations that the parameters were trained on, times channel.scale
    """
    sae = _export(recipe, params, channel, host)
    sae.threshold = torch.full((recipe.sae.d_sae,), calibrate_threshold(sae, [channel.sample]))
    bar = Progress(None, 0, "tok", name="statistics", shown=progress)
    sae.stats = measure(sae, channel.blocks(), max_tokens=MEASURED, progress=bar.update)
    bar.close()
    sae.save(folder)
    if host is not None and recipe.evaluation.tokens:
        report = evaluate_on(sae, host, recipe.text, recipe.evaluation.tokens, recipe.evaluation.ce_tokens, progress)
        sae = _with_evaluation(sae, report)
        sae.save(folder)
        files.write_json(folder / "evaluation.json", report)
    return sae


def _export(recipe: Recipe, params: Params, channel: Channel, host: Host | None) -> SAE:
    """Back to raw units: decoder rows stay of unit norm, so weights stay and biases are divided by the scale."""
    metadata = Metadata(
        model_name=recipe.host.name if host is not None else "",
        host_fingerprint=host.fingerprint if host is not None else "",
        hook_name=channel.hook,
        context_size=recipe.text.context,
        dataset=recipe.text.source if host is not None else "",
        norm_factor=channel.scale,
        outlier_norm=channel.outlier_norm,
        recipe=config.to_dict(recipe),
        git_revision=git_revision(),
    )
    sae = SAE(SAEConfig(recipe.sae.architecture, channel.d_in, recipe.sae.d_sae, recipe.sae.k, metadata))
    with torch.no_grad():
        sae.encoder.copy_(params.encoder)
        sae.W_dec.copy_(params.W_dec)
        sae.b_enc.copy_(params.b_enc / channel.scale)
        sae.b_dec.copy_(params.b_dec / channel.scale)
    return sae.requires_grad_(False)


def git_revision() -> str:
    """Revision of the code that runs, where it is a checkout; else empty."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def evaluate_on(sae: SAE, host: Host, text: TextRecipe, tokens: int, ce_tokens: int, progress: bool) -> dict[str, Any]:
    check_host(sae, host)
    part = "held_out" if text.held_out else "all"
    source = Text(text, host, part)
    rows = source.rows()
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"text: {text.source} has no {part.replace('_', '-')} documents. Hold out more or give another text."
        )
    in_sample = part == "all" and text.source == sae.cfg.metadata.dataset
    about = "in sample: nothing was held out" if in_sample else f"{part.replace('_', '-')} documents"
    if progress:
        print(f"text: {text.source}, {about}", file=sys.stderr)
    bar: Progress | None = None

    def tell(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress(total, 0, "tok", name="evaluate", shown=progress)
        bar.update(done - bar.done)

    try:
        report = core.evaluate(
            sae,
            host,
            itertools.chain([first], rows),
            tokens=tokens,
            ce_tokens=ce_tokens,
            groups=_Groups(source.documents),
            progress=tell,
        )
    finally:
        if bar is not None:
            bar.close()
    report["eval_config"] |= {"text": text.source, "documents": about}
    return report


class _Groups(Sequence[str]):
    """The groups of documents that are still being read."""

    def __init__(self, documents: list[Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number):
        return self.documents[number].group


def _with_evaluation(sae: SAE, report: dict[str, Any]) -> SAE:
    metadata = dataclasses.replace(sae.cfg.metadata, evaluation=core.headline(report))
    sae.cfg = dataclasses.replace(sae.cfg, metadata=metadata)
    return sae


def check_host(sae: SAE, host: Host) -> None:
    """Refuse a host that the SAE was not trained on, saying both."""
    known = sae.cfg.metadata.host_fingerprint
    if known and known != host.fingerprint:
        raise UserError(
            f"the SAE was trained on {sae.cfg.metadata.model_name} ({known}), this host is {host.name} "
            f"({host.fingerprint}). Use its own host."
        )
