"""The learning rate at a step: linear warm-up, the peak, and a decay towards zero at the end.

lr_scheduler_name   constant: stays at the peak, linear decay over the last fifth
                    linear, cosine: that shape over all of the run after the warm-up
lr_warm_up_steps    auto: min(1,000, 5% of the run)
lr_decay_steps      the decay's length at the end of the run where that is wanted otherwise; 0 is no decay
"""

import math


def steps_of(tokens: int, batch: int) -> int:
    """Updates of a run: whole batches (with all that are accumulated into one update), at least one."""
    return max(1, tokens // batch)


def peak_lr(lr: float | None, d_sae: int, steps: int) -> float:
    """The recipe's rate, or 2e-4·√(2^14/F) (Gao et al. 2024's scaling) raised for short runs, which have no time
    for small steps: times √(40,000/steps), at most 16 times. Measured: experiments/log.md, 'learning rate'."""
    if lr is not None:
        return lr
    return 2e-4 * (2**14 / d_sae) ** 0.5 * min(16.0, max(1.0, (40_000 / steps) ** 0.5))


def warm_up_steps(steps: int, given: int | None = None) -> int:
    """Steps from the first to the one that reaches the peak; at least one."""
    return max(1, min(1_000, steps // 20) if given is None else given)


def decay_steps(steps: int, name: str = "constant", given: int | None = None, warm_up: int | None = None) -> int:
    """Steps from the last one at the peak to the end of the run."""
    if given is not None:
        return given
    return max(1, steps // 5) if name == "constant" else max(1, steps - warm_up_steps(steps, warm_up))


def lr_at(
    step: int,
    steps: int,
    peak: float,
    name: str = "constant",
    warm_up: int | None = None,
    decay: int | None = None,
) -> float:
    """Rate of step 0 … steps−1. The first is peak/warm-up, the last (linear) peak/decay; none is zero.

    warm_up, decay   the recipe's steps; None is auto
    """
    decay = decay_steps(steps, name, decay, warm_up)
    left = min(1.0, (steps - step) / decay) if decay else 1.0
    if name == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return peak * min((step + 1) / warm_up_steps(steps, warm_up), left)
