"""The learning rate at a step: linear warm-up, constant, linear decay over the last fifth."""


def steps_of(tokens: int, batch: int) -> int:
    """Steps of a run: whole batches, at least one."""
    return max(1, tokens // batch)


def peak_lr(lr: float | None, d_sae: int, steps: int) -> float:
    """The recipe's rate, or 2e-4·√(2^14/F) (Gao et al. 2024's scaling) raised for short runs, which have no time
    for small steps: times √(40,000/steps), at most 16 times. Measured: experiments/log.md, 'learning rate'."""
    if lr is not None:
        return lr
    return 2e-4 * (2**14 / d_sae) ** 0.5 * min(16.0, max(1.0, (40_000 / steps) ** 0.5))


def lr_at(step: int, steps: int, peak: float) -> float:
    """Rate of step 0 … steps−1; warm-up over min(1,000, 5%) of the steps."""
    warm_up = max(1, min(1_000, steps // 20))
    decay = max(1, steps // 5)
    return peak * min((step + 1) / warm_up, 1.0, (steps - step) / decay)
