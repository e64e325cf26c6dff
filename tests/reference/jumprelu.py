"""JumpReLU by float64 autograd, in its three forms: the twin of sae/objectives/jumprelu.py.

The pseudo-derivatives are autograd functions, written from the publications; everything else is left to autograd.
"""

import torch

from sae.objectives.terms import Params

NAMES = ("encoder", "W_dec", "b_enc", "b_dec", "log_threshold")


def kernel(pre, threshold, bandwidth):
    return ((pre - threshold).abs() < bandwidth / 2).double()


class Anthropic(torch.autograd.Function):
    """pre·1[pre > e^t]; the kernel's gradient goes into pre too, and into t without the factor e^t of θ = e^t."""

    @staticmethod
    def forward(ctx, pre, t, bandwidth):
        ctx.save_for_backward(pre, t.exp())
        ctx.bandwidth = bandwidth
        return pre * (pre > t.exp())

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        jump = threshold / ctx.bandwidth * kernel(pre, threshold, ctx.bandwidth)
        return grad * ((pre > threshold) + jump), (-grad * jump).sum(0), None


class DeepMind(torch.autograd.Function):
    """pre·1[pre > θ]: ∂/∂θ = −(θ/ε)K, ∂/∂pre = 1[pre > θ]."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        K = kernel(pre, threshold, ctx.bandwidth)
        return grad * (pre > threshold), (-grad * threshold / ctx.bandwidth * K).sum(0), None


class Step(torch.autograd.Function):
    """1[pre > θ]: ∂/∂θ = −(1/ε)K, nothing for pre."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).double()

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        return None, (-grad / ctx.bandwidth * kernel(pre, threshold, ctx.bandwidth)).sum(0), None


def losses_and_gradients(params: Params, x, mode, *, bandwidth, coefficient, pre_act=0.0, k=1, tanh_scale=4.0):
    """Return (total loss, {name: gradient}) in float64."""
    p = {name: getattr(params, name).double().clone().requires_grad_(True) for name in NAMES}
    x = x.double()
    pre = x @ p["encoder"].T + p["b_enc"]
    threshold = p["log_threshold"].exp()
    norm = p["W_dec"].norm(dim=1)
    if mode == "tanh":
        # f >= 0, and written without |f|: autograd's derivative of that is 0 at 0, where the window's entries are
        f = Anthropic.apply(pre, p["log_threshold"], bandwidth)
        sparsity = coefficient * torch.tanh(tanh_scale * f * norm).sum(1).mean()
        sparsity = sparsity + pre_act * ((threshold - pre).relu() * norm).sum(1).mean()
    else:
        f = DeepMind.apply(pre, threshold, bandwidth)
        l0 = Step.apply(pre.detach(), threshold, bandwidth).sum(1).mean()
        sparsity = coefficient * (l0 if mode == "step" else (l0 / k - 1) ** 2)
    loss = (x - f @ p["W_dec"] - p["b_dec"]).square().sum(1).mean() + sparsity
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in p.items()}
