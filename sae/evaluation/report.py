"""The report of an evaluation: SAEBench core's JSON shape, and every figure of ours with its interval
beside it.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import __version__
from sae.architectures import LOADED
from sae.evaluation.forwards import Forwards
from sae.evaluation.intervals import Interval, ratio, wilson
from sae.evaluation.weights import weight_metrics

if TYPE_CHECKING:
    from jaxtyping import Float

NOTES = {
    "explained_variance": "1 - fvu, pooled and centred on the mean of the whole set; SAEBench's own differs",
    "explained_variance_legacy": "SAELens's: mean over tokens of 1 - ratio, about each batch's mean",
    "mse": "summed over d, mean over tokens, raw units",
    "l1": "scale-free: activations times decoder norms, summed over features, mean over tokens",
    "positions": "masked positions keep x in every spliced forward; ablations act where the SAE does",
    "token_stats": "valid positions only",
    "fvu_by_width": "of a Matryoshka SAE: the FVU of each prefix of features alone",
    "calibration": "how the threshold of a BatchTopK SAE was set, in raw units; l0 is on the calibration's own rows, "
    "ema_l0 with the running threshold of training instead",
    "intervals": "95 %; clusters resampled 1,000 times, or linearised with Student's t below 30 clusters; "
    "shares of features: Wilson",
}


def make_report(run: Forwards, *, details: bool, mean_given: bool, asked: tuple[int, int]) -> dict[str, Any]:
    ours = _figures(run)
    values = {name: figure["value"] for name, figure in ours.items()}
    weights = weight_metrics(run.sae, run.reconstruction.fired > 0)
    density = run.reconstruction.density
    cfg, metadata = run.sae.cfg, run.sae.cfg.metadata
    tokens = run.reconstruction.n_tokens
    metrics = {
        "model_behavior_preservation": _pick(
            values, kl_div_score="kl_div_score", kl_div_with_ablation="kl_zero", kl_div_with_sae="kl"
        ),
        "model_performance_preservation": _pick(
            values,
            ce_loss_score="recovered_zero",
            ce_loss_with_ablation="ce_zero",
            ce_loss_with_sae="ce_sae",
            ce_loss_without_sae="ce_clean",
            ce_loss_with_mean_ablation="ce_mean",
            ce_loss_score_mean="recovered_mean",
            ce_loss_delta="ce_delta",
        ),
        "reconstruction_quality": {
            **_pick(values, explained_variance="explained_variance", mse="mse", cossim="cossim"),
            "explained_variance_legacy": run.reconstruction.legacy,
        },
        "shrinkage": _pick(
            values,
            l2_norm_in="l2_norm_in",
            l2_norm_out="l2_norm_out",
            l2_ratio="l2_ratio",
            relative_reconstruction_bias="relative_reconstruction_bias",
        ),
        "sparsity": _pick(values, l0="l0", l1="l1"),
        "token_stats": {
            "total_tokens_eval_reconstruction": ours["kl"]["tokens"],
            "total_tokens_eval_sparsity_variance": tokens,
        },
        "misc_metrics": {
            **_pick(
                values,
                freq_over_1_percent="freq_over_1_percent",
                freq_over_10_percent="freq_over_10_percent",
                frac_alive="frac_alive",
            ),
            **{f"normalized_freq_over_{p}_percent": _normalized(density, p / 100) for p in (1, 10)},
            "average_max_encoder_cosine_sim": weights["average_max_encoder_cosine_sim"],
            "average_max_decoder_cosine_sim": weights["average_max_decoder_cosine_sim"],
        },
    }
    by_width = {str(width): ours.pop(f"fvu_{width}") for width in run.reconstruction.widths}
    extra = {"fvu_by_width": by_width, "calibration": getattr(metadata, "calibration", None)}
    notes = NOTES | {
        "mean_ablation": "the mean given by the caller"
        if mean_given
        else "the mean of the evaluated positions (none was given)"
    }
    if weights["average_max_decoder_cosine_sim"] is None:
        notes["weights"] = "this SAE has no weight matrices to compare"
    config = {
        "model_name": run.host.name,
        "hook_name": run.hook,
        **({} if run.written == run.hook else {"hook_name_out": run.written}),
        "llm_dtype": str(run.host.dtype).removeprefix("torch."),
        "context_size": run.text.tokens.shape[1],
        "units": "raw",
        "selection": _selection(cfg),
        "outlier_norm": metadata.outlier_norm,
        "n_tokens_asked": asked[0],
        "n_ce_tokens_asked": asked[1],
        "n_tokens": tokens,
        "n_documents": len(run.seen["reconstruction"]),
        "seed": run.seed,
    }
    return {
        "eval_type_id": "core",
        "eval_config": config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": _details(run, weights) if details else [],
        "sae_bench_commit_hash": "none: written by goldengate-sae",
        "sae_lens_id": metadata.hook_name,
        "sae_lens_release_id": metadata.model_name,
        "sae_lens_version": f"goldengate-sae {__version__}",
        "sae_cfg_dict": asdict(cfg) if is_dataclass(cfg) and not isinstance(cfg, type) else {},
        "eval_result_unstructured": {
            "goldengate": {
                **ours,
                **{name: value for name, value in extra.items() if value},
                "masked": _masked(run),
                "density_histogram": _density_histogram(density),
                "weights": {name: value for name, value in weights.items() if not isinstance(value, Tensor)},
                "notes": notes,
            }
        },
    }


def _selection(cfg: Any) -> str:
    if cfg.k is not None:
        return f"{cfg.architecture}, k={cfg.k}"
    return cfg.architecture if cfg.architecture in LOADED else f"{cfg.architecture}, by threshold"


def _figures(run: Forwards) -> dict[str, dict[str, Any]]:
    """Every figure by our name, with interval, positions, documents and clusters."""
    rec = run.reconstruction
    clusters = int((rec.sums.sums["n"] > 0).sum())
    where = {"tokens": rec.n_tokens, "documents": len(run.seen["reconstruction"]), "clusters": clusters}
    found = {name: _figure(one, where) for name, one in rec.metrics(seed=run.seed).items()}
    F, never = len(rec.fired), int((rec.fired == 0).sum())
    shares = {"dead_frac": never, "frac_alive": F - never}
    shares |= {f"freq_over_{p}_percent": int((rec.density > p / 100).sum()) for p in (1, 10)}
    found |= {name: _figure(wilson(count, F), where) for name, count in shares.items()}

    losses = {
        "ce_clean": ratio("clean"),
        "ce_sae": ratio("sae"),
        "ce_zero": ratio("zero"),
        "ce_mean": ratio("mean"),
        "ce_delta": lambda s: (s["sae"] - s["clean"]) / s["n"],
        "recovered_zero": lambda s: (s["zero"] - s["sae"]) / (s["zero"] - s["clean"]),
        "recovered_mean": lambda s: (s["mean"] - s["sae"]) / (s["mean"] - s["clean"]),
    }
    kls = {"kl": ratio("sae"), "kl_zero": ratio("zero"), "kl_div_score": lambda s: 1 - s["sae"] / s["zero"]}
    if run.noise_draws:
        kls |= {"kl_error_ratio": ratio("sae", "noise")}
        kls |= {"kl_error_ratio_covariance": ratio("sae", "noise_covariance")}
    for kind, sums, statistics in (("losses", run.losses, losses), ("kl", run.kl, kls)):
        if not sums.sums or not float(sums.sums["n"].sum()):
            nothing = {"tokens": 0, "documents": 0, "clusters": 0}
            found |= {name: _figure(Interval(math.nan), nothing) for name in statistics}
            continue
        estimates = sums.estimates(seed=run.seed)
        where = {
            "tokens": int(estimates.totals["n"]),
            "documents": len(run.seen[kind]),
            "clusters": estimates.n_clusters,
        }
        found |= {name: _figure(estimates.of(statistic), where) for name, statistic in statistics.items()}
    return found


def _figure(one: Interval, where: dict[str, int]) -> dict[str, Any]:
    ends = (None if end is None or math.isnan(end) else end for end in (one.value, one.low, one.high))
    return dict(zip(("value", "low", "high"), ends, strict=True)) | where


def _pick(values: dict[str, Any], **names: str) -> dict[str, Any]:
    return {theirs: values[ours] for theirs, ours in names.items()}


def _normalized(density: Float[Tensor, " F"], over: float) -> float:
    """Share of all firing that features denser than `over` account for."""
    return float(density[density > over].sum() / density.sum().clamp_min(1e-300))


def _density_histogram(density: Float[Tensor, " F"]) -> dict[str, Any]:
    """Features by log10 of density: ten bins a decade from 1e-8 to 1, and those that never fired."""
    fired = density[density > 0]
    at = ((fired.log10() + 8) * 10 + 1e-9).floor().long().clamp(0, 79)
    return {
        "log10_edges": [round(-8 + i / 10, 1) for i in range(81)],
        "counts": torch.bincount(at, minlength=80).tolist(),
        "never": int((density == 0).sum()),
    }


def _masked(run: Forwards) -> dict[str, Any]:
    """How many positions each cause removed, and their share of all positions of the rows."""
    text = run.text
    real = text.doc >= 0
    start = real & ~text.mask & (text.pos == 0)
    special = torch.isin(text.tokens, torch.tensor(sorted(run.host.special_ids), dtype=text.tokens.dtype))
    by_text = real & ~text.mask & ~start
    counts = {
        "padding": ~real,
        "document_start": start,
        "special_token": by_text & special,
        "other_text": by_text & ~special,
        "outlier_norm": text.mask & ~run.counted,
        "kept": run.counted,
    }
    n = text.mask.numel()
    return {name: {"positions": int(where.sum()), "share": int(where.sum()) / n} for name, where in counts.items()}


def _details(run: Forwards, weights: dict[str, Any]) -> list[dict[str, Any]]:
    """SAEBench's line for each feature; -1 stands for what this SAE does not have, 0 where it never fired."""
    rec = run.reconstruction
    F = len(rec.fired)
    none = torch.full((F,), -1.0)
    has = hasattr(run.sae, "W_enc")
    columns = {
        "feature_density": rec.density,
        "consistent_activation_heuristic": rec.fired / rec.fired_rows.clamp_min(1),
        "encoder_bias": run.sae.b_enc if hasattr(run.sae, "b_enc") else none,
        "encoder_norm": run.sae.W_enc.norm(dim=0) if has else none,
        **{
            name: weights.get(name, none)
            for name in ("encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim")
        },
    }
    listed = {name: column.tolist() for name, column in columns.items()}
    return [{"index": i} | {name: column[i] for name, column in listed.items()} for i in range(F)]


def headline(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures one looks at first, each {value, low, high, n}; n counts positions."""
    names = (
        "fvu",
        "l0",
        "dead_frac",
        "ce_clean",
        "ce_sae",
        "ce_delta",
        "recovered_mean",
        "recovered_zero",
        "kl",
    )
    ours = report["eval_result_unstructured"]["goldengate"]
    found = ours | {f"fvu_{width}": figure for width, figure in ours.get("fvu_by_width", {}).items()}
    prefixes = [name for name in found if name not in ours]
    return {
        name: {
            "value": found[name]["value"],
            "low": found[name]["low"],
            "high": found[name]["high"],
            "n": found[name]["tokens"],
        }
        for name in (*names, "cossim", *prefixes)
        if name in found
    }
