"""The model card of an SAE: README.md in Markdown under a YAML header, from the facts that the SAE has, and no others.

What a user, a model or somebody's file wrote (labels, names, a recipe's values) stands in code spans and code blocks,
in one line each: no Markdown, no HTML and no header can begin in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sae import hub, table

if TYPE_CHECKING:
    from sae.autoencoder import SAE, Metadata

TAGS = ("sparse-autoencoder", "saelens", "goldengate-sae")
FIGURES = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_frac": "dead features",
    "ce_delta": "cross-entropy added (nats)",
    "recovered_mean": "cross-entropy recovered, mean ablation",
    "recovered_zero": "cross-entropy recovered, zero ablation",
    "kl": "KL (nats)",
}
LIMITS = """For reading and steering the host above, at the hook above. Another host, also one tuned from it, and
another hook have activations that this SAE has not learnt. What it was trained on bounds what its features stand for;
figures are of text like that. A label is somebody's name for a feature, no proof of what it does, and a feature that
detects a concept need not write about it: measure a dial before it is relied on (`sae calibrate`), and what it changes
besides (`sae effects`)."""
_TRANSCODES = """For reading the host above, at the hooks above, and for putting what it writes in the place of what is
there (`host.run_with_saes`). Another host, also one tuned from it, and other hooks have activations that it has not
learnt. A label is somebody's name for a feature, no proof of what it does."""
_RECIPE = {
    "tokens": ("training", "tokens"),
    "batch": ("training", "batch"),
    "learning rate": ("training", "lr"),
    "k": ("sae", "k"),
    "target L0": ("sae", "target_l0"),
    "seed": ("training", "seed"),
}
_NAMED, _LONGEST = 20, 200


def card(
    sae: SAE,
    *,
    repo: str = "",
    folder: str = "",
    title: str = "",
    license: str = "",
    facts: Sequence[str] = (),
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    sections: str = "",
    limits: str = LIMITS,
) -> str:
    """The card as text.

    repo, folder   where it will lie on the Hub, for the lines that load it
    facts          more points for the list on top; with `title`, `sections` and `limits` the caller's own Markdown
    evaluations    figures by what they were measured on; default: the SAE's own, on held-out text
    """
    about = sae.cfg.metadata
    if evaluations is None:
        evaluations = {"held-out text": about.evaluation} if about.evaluation else {}
    kind = "sparse autoencoder" if sae.cfg.d_out is None else "transcoder"
    of = ", ".join(span(name) for name in (_host(about), about.hook_name) if name)
    theirs = "saelens" in sae.facts()[0].said_by()
    parts = [
        _header(license, theirs),
        hub.MARK,
        f"# {title or ' of '.join(part for part in (f'A {kind}', of) if part)}",
        f"{sae.cfg.d_sae:,} features on activations of width {sae.cfg.d_in:,}.",
        "\n".join(f"- {line}" for line in (*_points(sae), *facts)),
        *_evaluation(evaluations),
        sections.strip(),
        *_features(sae),
        "## Loading",
        _loading(repo, folder, theirs),
        "## Use and limits",
        (_TRANSCODES if sae.cfg.d_out is not None and limits == LIMITS else limits).strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def span(value: Any) -> str:
    """A value as a code span, in one line: what it holds is shown and means nothing."""
    text = table.cell(value).encode("utf-8", "replace").decode().strip()
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    if not text:
        return "not noted"
    fence = "`" * (_ticks(text) + 1)
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """Lines as a code block that none of them can end."""
    fence = "`" * max(3, _ticks(text) + 1)
    return f"{fence}{language}\n{text.encode('utf-8', 'replace').decode()}\n{fence}"


def _ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _header(license: str, theirs: bool) -> str:
    lines = [
        f"library_name: {'saelens' if theirs else 'goldengate-sae'}",
        *([f"license: {json.dumps(license)}"] if license else []),
    ]
    tags = [tag for tag in TAGS if theirs or tag != "saelens"]
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---"])


def _points(sae: SAE) -> list[str]:
    about = sae.cfg.metadata
    writes = f", writing to {span(about.hook_name_out)} (width {sae.cfg.d_out:,})" if sae.cfg.d_out is not None else ""
    recipe = {name: _at(about.recipe, *path) for name, path in _RECIPE.items()}
    short = ", ".join(f"{name} {span(value)}" for name, value in recipe.items() if value is not None)
    trained = f"as {span(about.training_architecture or sae.cfg.architecture)}"
    by = f" by goldengate-sae, revision {span(about.git_revision[:12])}" if about.git_revision else ""
    return [
        f"**Host**: {span(_host(about))}, fingerprint {span(about.host_fingerprint)}",
        f"**Hook**: {span(about.hook_name)}{writes}",
        f"**Data**: {span(about.dataset)}" + (f", context {about.context_size:,}" if about.context_size else ""),
        *([f"**Converted** from {span(about.layout)}"] if about.layout not in ("", "training") else []),
        f"**Training**: {trained}{by}" + (f": {short}" if short else ""),
        f"**Units**: {_units(sae, about)}",
        f"**Inference**: {_inference(sae)}",
        *_statistics(sae),
    ]


def _host(about: Metadata) -> str:
    """The host's name; of a folder its last part, where it lay is nobody's business."""
    return about.model_name.rstrip("/").rpartition("/")[2] if about.model_name[:1] in "/~." else about.model_name


def _at(recipe: Mapping[str, Any], section: str, name: str) -> Any:
    inside = recipe.get(section)
    value = inside.get(name) if isinstance(inside, Mapping) else None
    return value if isinstance(value, int | float | str) else None


def _units(sae: SAE, about: Metadata) -> str:
    if about.units == "token":
        said = f"of each token's own scale ({span(sae.cfg.normalize_activations)})"
    elif about.units == "unknown":
        said = "raw, or of x times a factor: the files that it came from do not say"
    elif about.units == "normalised":
        factor = "a factor that nobody noted" if about.norm_factor is None else f"{about.norm_factor:.6g}"
        said = f"activations of features are of x times {factor}; the weights take x as it is"
    else:
        seen = "" if about.norm_factor in (None, 1.0) else f" (training saw it times {about.norm_factor:.6g})"
        said = f"raw activations of the host{seen}"
    norms = sae.W_dec.detach().float().norm(dim=1)
    if bool(((norms - 1).abs() < 1e-2).all()):
        said += "; decoder rows have length 1, so a strength is the length of the vector added"
    else:
        said += (
            f"; decoder rows have lengths from {table.number(float(norms.min()))} to {table.number(float(norms.max()))}"
        )
    if about.outlier_norm is not None:
        said += f"; positions with a norm above {about.outlier_norm:.0f} were left out of training"
    return said


def _inference(sae: SAE) -> str:
    cfg, threshold = sae.cfg, None if sae.threshold is None else sae.threshold.detach().float()
    if cfg.architecture == "jumprelu" and threshold is not None:
        low, high = float(threshold.min()), float(threshold.max())
        each = f"the threshold {table.number(low)}" if low == high else (
            f"its own threshold (from {table.number(low)} to {table.number(high)})"
        )  # fmt: skip
        return f"{span(cfg.architecture)}: a feature is active above {each}"
    rule = f"{span(cfg.architecture)}" + (f" with k = {cfg.k:,}" if cfg.k is not None else "")
    if cfg.architecture == "topk" and threshold is not None:
        rule += f"; the calibrated threshold {table.number(float(threshold[0]))} reads single features"
    return rule


def _statistics(sae: SAE) -> list[str]:
    if sae.stats is None:
        return []
    fires = sae.stats.density > 0
    dead, largest = int((~fires).sum()), sae.stats.max_act[fires].float()
    said = f"features that never fire in {sae.stats.n_tokens:,} tokens: {dead:,} ({dead / sae.cfg.d_sae:.2%})"
    if dead < sae.cfg.d_sae:
        low, middle, high = (table.number(float(one)) for one in (largest.min(), largest.median(), largest.max()))
        said = f"the largest activation of a feature is {middle} in the median, from {low} to {high}; {said}"
    return [f"**Statistics** (`max_act`): {said}"]


def _evaluation(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for key, shown in FIGURES.items():
        figures = {name: _figure(measured.get(key)) for name, measured in evaluations.items()}
        if any(figure is not None for figure in figures.values()):
            rows.append({"": shown, **figures})
    if not rows:
        return ["## Evaluation", "None was made of it here (`sae evaluate`)."]
    return ["## Evaluation", "Value [95% interval by bootstrap over documents].", block(table.text(rows))]


def _figure(given: Any) -> Any:
    """A number, or one with its interval; nothing where a file has something else there."""
    numbers = [given.get(name) for name in ("value", "low", "high")] if isinstance(given, Mapping) else [given]
    return given if all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers) else None


def _features(sae: SAE) -> list[str]:
    if not sae.labels:
        return []
    rows = [
        {"feature": feature, "label": sae.labels[feature][:_LONGEST]}
        | ({} if sae.stats is None else {"max_act": float(sae.stats.max_act[feature])})
        for feature in sorted(sae.labels)[:_NAMED]
    ]
    left = len(sae.labels) - len(rows)
    more = [f"{left:,} more have names in `labels.json`."] if left else []
    return ["## Named features", block(table.text(rows)), *more]


def _loading(repo: str, folder: str, by_saelens: bool) -> str:
    ours = (
        f"SAE.from_pretrained({', '.join(repr(word) for word in (repo, folder) if word)})"
        if repo
        else "SAE.load(folder)"
    )
    theirs = f"SAE.from_pretrained({repo!r}, {folder or '.'!r})" if repo else "SAE.load_from_disk(folder)"
    if not by_saelens:
        return block(f"from sae import SAE\n\nsae = {ours}", "python")
    return "\n\n".join(
        [
            block(f"from sae import SAE\n\nsae = {ours}", "python"),
            "The weights and their config are in SAELens's layout:",
            block(f"from sae_lens import SAE\n\nsae = {theirs}", "python"),
        ]
    )
