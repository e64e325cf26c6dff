"""What follows training: from trained parameters to the SAE that ships, with threshold, statistics and evaluation.

Parameters are in normed units, the SAE is in the host's own (raw) units (export.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import config, files
from sae.activations.harvest import stream
from sae.autoencoder import SAE, Metadata
from sae.documents import Document, told
from sae.errors import UserError
from sae.evaluation import core
from sae.export import calibrate, export
from sae.host import Host
from sae.objectives import Params
from sae.objectives.matryoshka import widths
from sae.recipe import Recipe, TextRecipe
from sae.sources import Channel, first_rows
from sae.stats import calibrate_threshold, measure
from sae.token_rows import Text
from sae.training.log import Progress

MEASURED = 500_000  # rows at most for the statistics
CALIBRATED = 16_384  # rows for the threshold


def finish(
    folder: Path,
    recipe: Recipe,
    params: Params,
    channel: Channel,
    host: Host | None,
    progress: bool,
    read: dict[str, Tensor | None],
) -> SAE:
    """Export, calibrate, measure, save as `folder`, and (where there is a host) evaluate on held-out documents.

    channel   the activations that the parameters were trained on, times channel.scale
    read      held-out activations by hook that were read for another SAE on this stream; what is read here is added
    """
    sae = export(params, recipe.sae, _metadata(recipe, channel, host))
    _set_threshold(sae, recipe, params, channel, host, read)
    bar = Progress(None, 0, "tok", name="statistics", shown=progress)
    finite = (rows[rows.isfinite().all(dim=1)] for rows in channel.blocks())  # training left the others out, too
    sae.stats = measure(sae, finite, max_tokens=MEASURED, progress=bar.update)
    bar.close()
    sae.save(folder)
    if host is not None and recipe.evaluation.tokens:
        report = evaluate_on(sae, host, recipe.text, recipe.evaluation.tokens, recipe.evaluation.ce_tokens, progress)
        sae = _with_evaluation(sae, report)
        sae.save(folder)
        files.write_json(folder / "evaluation.json", report)
    return sae


def _metadata(recipe: Recipe, channel: Channel, host: Host | None) -> Metadata:
    return Metadata(
        model_name=recipe.host.name if host is not None else "",
        host_fingerprint=host.fingerprint if host is not None else "",
        hook_name=channel.hook,
        context_size=recipe.text.context,
        dataset=told(recipe.text.source) if host is not None else "",
        norm_factor=channel.scale,
        outlier_norm=channel.outlier_norm,
        recipe=config.to_dict(recipe),
        git_revision=git_revision(),
        training_architecture=recipe.sae.architecture,
        matryoshka_widths=list(widths(recipe.sae)) if recipe.sae.architecture == "matryoshka" else [],
    )


def _set_threshold(
    sae: SAE, recipe: Recipe, params: Params, channel: Channel, host: Host | None, read: dict[str, Tensor | None]
) -> None:
    """TopK's, for steering, by a sample of what it was trained on; BatchTopK's own by held-out text, where any is."""
    if sae.architecture.selection == "topk":
        sae.threshold = torch.full((sae.cfg.d_sae,), calibrate_threshold(sae, [channel.sample]))
    elif params.ema_threshold is not None:
        rows, about = channel.sample, "training rows"
        if host is not None and recipe.text.held_out:
            if channel.hook not in read:
                read[channel.hook] = _held_out(recipe.text, channel, host)
            held_out = read[channel.hook]
            rows, about = (rows, about) if held_out is None else (held_out, "held-out rows")
        running = float(params.ema_threshold) / channel.scale
        calibrate(sae, rows, recipe.sae.k, running if running >= 0 else None, about)


def _held_out(text: TextRecipe, channel: Channel, host: Host) -> Tensor | None:
    """Raw held-out activations of the channel's hook; None where the text has none."""
    limits = None if channel.outlier_norm is None else {channel.hook: channel.outlier_norm}
    blocks = stream(host, Text(text, host, "held_out").rows(), [channel.hook], outlier_norm=limits)
    found = first_rows(blocks, CALIBRATED)
    return found[channel.hook].float() if found else None


def versions() -> dict[str, str]:
    """Of this package and of those whose code decides what comes out."""
    packages = ("goldengate-sae", "torch", "numpy", "safetensors", "transformers", "transformer-lens", "tokenizers")
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
            found[name] = metadata.version(name)
    return found


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
    read: list[Document] = []
    rows = Text(text, host, part).rows(read.append)
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"text: {told(text.source)} has no {part.replace('_', '-')} documents. Hold out more or give another text."
        )
    in_sample = part == "all" and told(text.source) == sae.cfg.metadata.dataset
    about = "in sample: nothing was held out" if in_sample else f"{part.replace('_', '-')} documents"
    if progress:
        print(f"text: {told(text.source)}, {about}", file=sys.stderr)
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
            groups=_Groups(read),
            progress=tell,
        )
    finally:
        if bar is not None:
            bar.close()
    report["eval_config"] |= {"text": told(text.source), "documents": about}
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
    """Refuse a host that is neither what the SAE was trained on nor an adapter of it, saying both."""
    known = sae.cfg.metadata.host_fingerprint
    if not host.is_own(known):
        of_index = (
            ", or delete the SAE's index/ where that was made with the wrong one" if sae.cfg.metadata.layout else ""
        )
        raise UserError(
            f"the SAE was trained on {sae.cfg.metadata.model_name} ({known}), this host is {host.name} "
            f"({host.fingerprint}). Use its own host{of_index}."
        )
