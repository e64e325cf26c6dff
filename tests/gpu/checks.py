"""What only a GPU can show of a training step, as plain functions that raise: no waits, the same to the bit, right.

test_gpu.py calls them where there is pytest, experiments/bench/gpu.py where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sae.objectives import Losses, Objective, Params, topk
from sae.training.capture import EVERY, Captured
from sae.training.dead import Dead
from sae.training.loop import Learn, learn
from sae.training.optimizer import RowAdam

B, d, F, k = 512, 192, 4096, 16
LR = 1e-3


def mixture(n: int, width: int, device: str, seed: int = 0) -> Tensor:
    """[n, width] float32, norm about √width: sparse sums of 4·width directions, some of which are in most rows."""
    generator = torch.Generator(device).manual_seed(seed)
    count = 4 * width
    directions = torch.randn(count, width, generator=torch.Generator(device).manual_seed(0), device=device)
    odds = 20 / torch.arange(1, count + 1, device=device).clamp_min(40)
    made = []
    for _ in range(0, n, 4096):
        fires = torch.rand(4096, count, generator=generator, device=device) < odds
        strength = torch.rand(4096, count, generator=generator, device=device)
        made.append((fires * strength) @ directions)
    rows = torch.cat(made)[:n]
    return rows * (width**0.5 / rows.norm(dim=1).mean())


def begun(device: str, *, low: bool, captured: bool) -> tuple[Learn, Params, RowAdam]:
    """A run before its first step, the same on every device; a third of the features are dead after 24 steps."""
    W_dec = torch.randn(F, d, generator=torch.Generator().manual_seed(1))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc = torch.zeros(F)
    b_enc[::3] = -5
    W_dec, b_enc = W_dec.to(device), b_enc.to(device)
    copy = W_dec.bfloat16() if low else None
    params = Params(W_dec.clone(), W_dec, b_enc, torch.zeros(d, device=device), copy)
    loss = partial(topk.loss, k=k, variance=float(d), aux_coefficient=1 / 32)
    trained = Objective(begin=None, loss=loss, encode=None)  # type: ignore[arg-type] - only the loss is asked
    optimizer, dead = RowAdam(params), Dead(F, 24 * B, device)
    if captured:
        return Captured(params, trained, optimizer, dead), params, optimizer
    return partial(learn, params, trained, optimizer, dead), params, optimizer


def steps(n: int, step: Learn, device: str) -> tuple[list[Tensor], Losses]:
    """n steps over the same batches on every device; the loss of each, and all losses of the last."""
    batches = mixture(16 * B, d, "cpu").to(device).split(B)
    seen = []
    losses = None
    for number in range(n):
        _, losses = step([batches[number % len(batches)]], LR, number / n)
        seen.append(losses.fvu.clone())
    assert losses is not None
    return seen, losses


def nothing_waits() -> None:
    """No host sync in a captured step, dead features and change of graphs included, once its graphs are there."""
    step, _, _ = begun("cuda", low=True, captured=True)
    _, losses = steps(6 * EVERY, step, "cuda")
    assert losses.aux > 0, "dead features were at work"
    x = mixture(B, d, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2 * EVERY):
            step([x], LR, number / EVERY)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def the_same_to_the_bit() -> None:
    found = []
    for _ in range(2):
        step, params, _ = begun("cuda", low=True, captured=True)
        steps(4 * EVERY, step, "cuda")
        found.append(params)
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), f"{name} differs from run to run"


def captured_is_eager() -> None:
    """The graph's parameters after a few steps, before the first feature is dead, are the eager step's."""
    found = []
    for captured in (True, False):
        step, params, _ = begun("cuda", low=True, captured=captured)
        steps(8, step, "cuda")
        found.append(params)
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(
            getattr(found[0], name), getattr(found[1], name), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@functools.cache
def losses_on_the_cpu() -> Tensor:
    return torch.stack(steps(200, begun("cpu", low=False, captured=False)[0], "cpu")[0])


def a_run_like_the_cpus(low: bool) -> dict[str, float]:
    """200 steps against plain float32 on the CPU: the first losses agree closely, the last ones within 2%."""
    on_gpu, _ = steps(200, begun("cuda", low=low, captured=True)[0], "cuda")
    gpu, cpu = torch.stack(on_gpu).cpu(), losses_on_the_cpu()
    first = float(((gpu[:20] - cpu[:20]) / cpu[:20]).abs().max())
    last = float(gpu[-20:].mean() / cpu[-20:].mean() - 1)
    assert cpu[-20:].mean() < 0.8 * cpu[:5].mean(), "something is learnt"
    assert first < (1e-2 if low else 1e-3), f"the first 20 losses differ by up to {first:.2g}"
    assert abs(last) < 0.02, f"the last 20 losses differ by {last:+.2%}"
    return {"first_20_max_relative": first, "last_20_relative": last}


CHECKS: dict[str, Callable[[], object]] = {
    "nothing waits": nothing_waits,
    "the same to the bit": the_same_to_the_bit,
    "captured is eager": captured_is_eager,
    "a float32 run like the CPU's": partial(a_run_like_the_cpus, low=False),
    "a bfloat16 run like the CPU's": partial(a_run_like_the_cpus, low=True),
}
"""By name; each raises where it does not hold."""
