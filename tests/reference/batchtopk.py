"""BatchTopK and Matryoshka BatchTopK by float64 autograd: the twin of objectives/batchtopk.py and matryoshka.py."""

import torch

from sae.objectives.terms import Params
from tests.reference.topk import aux_loss


def losses_and_gradients(
    params: Params, x, k, *, levels=None, variance=1.0, dead=None, aux_coefficient=0.0, dtype=torch.float64
):
    """Return (total loss, {name: gradient}, the smallest kept entry) in `dtype`; every level weighs 1/G."""
    names = ("encoder", "W_dec", "b_enc", "b_dec")
    p = {name: getattr(params, name).to(dtype, copy=True).requires_grad_(True) for name in names}
    x = x.to(dtype)
    pre = (x - p["b_dec"]) @ p["encoder"].T + p["b_enc"]
    kept = pre.relu().flatten().topk(len(x) * k).indices
    acts = torch.zeros(pre.numel(), dtype=dtype).scatter(0, kept, pre.relu().flatten()[kept]).view_as(pre)
    levels = levels or (len(params.b_enc),)
    loss = torch.zeros((), dtype=dtype)
    for width in levels:
        recon = acts[:, :width] @ p["W_dec"][:width] + p["b_dec"]
        loss = loss + (x - recon).square().sum(1).mean() / variance / len(levels)
    if dead is not None and dead.any() and aux_coefficient:
        e = (x - acts @ p["W_dec"] - p["b_dec"]).detach()
        loss = loss + aux_coefficient * aux_loss(p, x, e, dead)
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in p.items()}, acts[acts > 0].min().detach()
