"""TopK + AuxK by float64 autograd: the twin of sae/objectives/topk.py."""

import torch

from sae.objectives.revive import aux_k
from sae.objectives.terms import Params


def losses_and_gradients(params: Params, x, k, *, variance=1.0, dead=None, aux_coefficient=0.0, dtype=torch.float64):
    """Return (total loss, {name: gradient}) in `dtype`; the decoder's gradient is not projected."""
    names = ("encoder", "W_dec", "b_enc", "b_dec")
    p = {name: getattr(params, name).to(dtype, copy=True).requires_grad_(True) for name in names}
    x = x.to(dtype)
    pre = (x - p["b_dec"]) @ p["encoder"].T + p["b_enc"]
    values, indices = pre.topk(k, dim=1)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    recon = acts @ p["W_dec"] + p["b_dec"]
    loss = (x - recon).square().sum(1).mean() / variance
    if dead is not None and dead.any() and aux_coefficient:
        loss = loss + aux_coefficient * aux_loss(p, x, (x - recon).detach(), dead)
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in p.items()}


def aux_loss(p, x, e, dead):
    """AuxK: the dead features of `p` alone predict e, which is detached."""
    pre = (x - p["b_dec"]) @ p["encoder"][dead].T + p["b_enc"][dead]
    top, at = pre.topk(min(aux_k(x.shape[1]), int(dead.sum())), dim=1)
    acts = torch.zeros_like(pre).scatter(1, at, top.relu())
    miss = acts @ p["W_dec"][dead] - e
    return miss.square().sum() / (e - e.mean(0)).square().sum()
