"""Our contenders of step.py: one training step of each architecture as the loop runs it, and what bounds it.

"ours NAME" of VARIANTS is objective, update and dead counters of that recipe, begun from everybody's weights. Where a
threshold or a bias decides what fires, it is set on the first batch such that k features a token do; "dense" leaves
it where training begins. "product FORMAT" is the bare encoder product, "copy" the memory's rate.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from floor import COPY_BYTES
from peer_step import Shape, Trainer, shared_weights, size_of
from torch import Tensor

from sae.kernels import Work
from sae.kernels.native import native
from sae.objectives import Losses, Objective, Params, objective
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from sae.training.dead import Dead
from sae.training.loop import learn
from sae.training.optimizer import RowAdam

LR = 1e-4
SHARE = 0.5  # of the run that is done, for objectives that warm a penalty up
TILE = 16_384  # features in a tile of the bare product, where the whole matrix would not fit well
VARIANTS: dict[str, dict[str, Any]] = {
    "ours topk": {"architecture": "topk"},
    "ours batchtopk": {"architecture": "batchtopk"},
    "ours matryoshka": {"architecture": "matryoshka"},
    "ours jumprelu step": {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "step"},
    "ours relu sparse": {"architecture": "relu"},
    "ours relu dense": {"architecture": "relu"},
}
SET_TO_K = ("ours jumprelu step", "ours relu sparse")


@dataclass
class Parts:
    """A run before its first step."""

    params: Params
    objective: Objective
    optimizer: RowAdam
    dead: Dead
    variance: float


def resolved(dtype: str) -> str:
    """auto is what the machine's flags say, by the package's own rule."""
    from sae.machine import dtype_of

    return str(dtype_of(dtype)).removeprefix("torch.")


def begin(name: str, acts: Tensor, shape: Shape, dtype: str, betas: tuple[float, float] | None = None) -> Parts:
    """The parts of a variant with everybody's weights; `dtype` is the encoder product's, `betas` Adam's."""
    _, _, F, k = shape
    low = resolved(dtype) == "bfloat16"
    recipe = Recipe(sae=SAERecipe(d_sae=F, k=k, **VARIANTS[name]), training=TrainingRecipe(batch=shape[0]))
    sample = acts[:8192].float()
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    trained = objective(recipe, variance, low=low)
    params = trained.begin(sample)
    rows, mean = shared_weights(acts, F)
    for ours, everybodys in ((params.encoder, rows), (params.W_dec, rows), (params.b_dec, mean)):
        ours.copy_(everybodys)
    if params.encoder_low is not None:
        params.encoder_low.copy_(rows)
    optimizer = RowAdam(params) if betas is None else RowAdam(params, betas=betas)
    parts = Parts(params, trained, optimizer, Dead(F, window=10**9), variance)
    if name in SET_TO_K:
        set_to_k(params, acts[:: max(1, len(acts) * F >> 25)].float(), k)  # 2^25 pre-activations at most
    return parts


def set_to_k(params: Params, x: Tensor, k: int) -> None:
    """One threshold (JumpReLU), or one bias (ReLU), for all features such that k a row of x fire. The encoder of both
    reads x as it is: its mean is taken off by the biases."""
    read = params.encoder_read
    centre = params.encoder @ params.b_dec
    pre = (x.to(read.dtype) @ read.T).float() - centre
    level = pre.flatten().topk(k * len(x)).values[-1]
    if params.log_threshold is None:
        params.b_enc.copy_(-centre - level)
    else:
        params.b_enc.copy_(-centre)
        params.log_threshold.fill_(level.log())


def ours(name: str, acts: Tensor, shape: Shape, dtype: str, betas: tuple[float, float] | None = None) -> Trainer:
    """The step of a variant, as the loop takes it."""
    parts = begin(name, acts, shape, dtype, betas)
    last: list[tuple[Work, Losses]] = []

    def step(x: Tensor) -> None:
        last.clear()
        last.append(learn(parts.params, parts.objective, parts.optimizer, parts.dead, [x], LR, SHARE))

    def facts() -> dict[str, Any]:
        work, losses = last[0]
        dense = work.extra is not None and work.codes.values.numel() == 0
        density, l0 = losses.more.get("metrics/density"), losses.more.get("metrics/l0")
        B, F = work.codes.n_rows, work.codes.n_features
        return {
            "nnz": work.codes.values.numel() if density is None else float(density) * B * F,
            "l0": (work.codes.values > 0).sum().item() / B if l0 is None else float(l0),
            "implementation": "torch, dense" if dense else "torch" if native() is None else "native",
        }

    return Trainer(step, lambda: held(parts), facts)


def held(parts: Parts) -> int:
    """Bytes of what is trained (its bfloat16 copy too) and of the optimizer's state."""
    return size_of(vars(parts.params).values()) + size_of(parts.optimizer.state_dict().values())


def product(acts: Tensor, shape: Shape, dtype: torch.dtype) -> Trainer:
    """The bare encoder product into memory that is there: whole, or by 256 rows and TILE features, whichever is
    faster; only tiles where the whole would not fit in memory beside others."""
    B, _, F, _ = shape
    encoder = shared_weights(acts, F)[0].to(dtype)
    fits = B * F <= 2**28
    out = torch.empty(B, F, dtype=dtype) if fits else torch.empty(0, dtype=dtype)
    tile = torch.empty(256, min(F, TILE), dtype=dtype)

    def whole(x: Tensor) -> None:
        torch.mm(x.to(dtype), encoder.T, out=out)

    def tiles(x: Tensor) -> None:
        x = x.to(dtype)
        for first in range(0, F, TILE):
            features = encoder[first : first + TILE]
            for start in range(0, B, 256):
                rows = x[start : start + 256]
                torch.mm(rows, features.T, out=tile[: len(rows), : len(features)])

    x, took = acts[:B].float(), {}
    for form in (whole, tiles, whole, tiles) if fits else (tiles,):
        start = time.perf_counter()
        form(x)
        took[form] = time.perf_counter() - start  # the second round counts: pages are there
    return Trainer(min(took, key=lambda form: took[form]), lambda: 0)


def copy() -> Trainer:
    """One copy of 256 MB, for the memory rate (2 bytes moved for each byte copied)."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)

    def step(_: Tensor) -> None:
        target.copy_(source)

    return Trainer(step, lambda: 0)


def build(name: str, acts: Tensor, shape: Shape, dtype: str) -> Trainer:
    """What peer_step.py runs when the name is not a peer's."""
    if name == "copy":
        return copy()
    if name.startswith("product "):
        return product(acts, shape, getattr(torch, name.removeprefix("product ")))
    return ours(name, acts, shape, dtype)
