"""How good a trained SAE is on rows that it has not seen: pooled FVU, L0, features that never fire. float32.

FVU is pooled over all rows about the mean of the whole set. Dead is the share of features that fire on neither the
held-out rows nor a sample of up to 100k training rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from training_run import Trained

CHUNK = 2048
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw rows [n, d] → their reconstruction [n, d] and the features that fired, one entry each time."""


def topk_forward(sae: dict[str, Tensor], k: int) -> Forward:
    """Of raw-unit weights: relu(topk((x − b_dec)·encoderᵀ + b_enc))·W_dec + b_dec, with nobody's kernels."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x - sae["b_dec"]) @ sae["encoder"].T + sae["b_enc"]
        values, indices = pre.topk(k, dim=1)
        values = values.relu()
        out = torch.einsum("bk,bkd->bd", values, sae["W_dec"][indices]) + sae["b_dec"]
        return out, indices[values > 0]

    return forward


def run_forward(run: Trained) -> Forward:
    """Of one of our runs, selecting as its objective says inference does; the product in float32."""
    run.params.encoder_low = None

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = run.objective.encode(run.params, x * run.factor)
        out = codes.dense() @ run.params.W_dec + run.params.b_dec
        return out / run.factor, codes.indices[codes.values > 0]

    return forward


def measure(forward: Forward, n_features: int, data: dict[str, Tensor]) -> dict[str, float]:
    """Figures from `held_out`, and from `train` at the last 100k of `order` for the dead."""
    held = data["held_out"]
    fires = torch.zeros(n_features, dtype=torch.bool)
    error, total = torch.zeros((), dtype=torch.float64), 0
    for x in held.split(CHUNK):
        x = x.float()
        out, fired = forward(x)
        error += (x - out).double().square().sum()
        total += fired.numel()
        fires[fired] = True
    for x in data["train"][data["order"][-100_000:].unique()].split(CHUNK):
        fires[forward(x.float())[1]] = True
    x64 = held.double()
    return {
        "fvu": (error / (x64 - x64.mean(0)).square().sum()).item(),
        "l0": total / held.shape[0],
        "dead": 1 - fires.float().mean().item(),
    }
