"""Logistic regression with an L2 penalty, for probes of some hundred texts: exact, deterministic, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# The inverse penalties C that are tried, strongest penalty first: each fit begins at the one before.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def logistic(
    X: Float[Tensor, "n r"], y: Bool[Tensor, " n"], C: Sequence[float] = PENALTIES
) -> Float[Tensor, "C r_plus_1"]:
    """Weights that minimise Σ log(1 + e^(−s·z)) + |w|²/(2C) for each C; the last column is the intercept, unpenalised.

    s is ±1, z = X·w + b. Newton's method with halved steps in float64, until no component of the gradient is above
    1e-9 of the number of texts: deterministic, and the only minimum, for the function is strictly convex where both
    classes are there. In order of C each fit begins where the last one ended. Cost: a step is n·r² + r³/3.
    """
    n, r = X.shape
    X = torch.cat([X.double(), torch.ones(n, 1, dtype=torch.float64)], 1)
    target, sign = y.double(), y.double() * 2 - 1
    theta, found = torch.zeros(r + 1, dtype=torch.float64), []
    for strength in C:
        penalty = torch.full((r + 1,), 1 / strength, dtype=torch.float64)
        penalty[-1] = 0

        def loss(theta: Tensor, penalty: Tensor = penalty) -> Tensor:
            return torch.nn.functional.softplus(-sign * (X @ theta)).sum() + (penalty * theta**2).sum() / 2

        now = loss(theta)
        for _ in range(100):
            p = torch.sigmoid(X @ theta)
            gradient = X.T @ (p - target) + penalty * theta
            if float(gradient.abs().max()) <= 1e-9 * n:
                break
            hessian = X.T @ (X * (p * (1 - p))[:, None])
            hessian.diagonal().add_(penalty + 1e-12)
            step = torch.linalg.solve(hessian, gradient)
            for _ in range(40):
                if (after := loss(theta - step)) <= now:
                    break
                step /= 2
            else:
                break  # no step lowers the loss: this is the minimum to float64's last bits
            theta, now = theta - step, after
        found.append(theta)
    return torch.stack(found)
