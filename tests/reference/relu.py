"""ReLU + L1 on decoder norms by float64 autograd: the twin of sae/objectives/relu.py."""

from sae.objectives.terms import Params


def losses_and_gradients(params: Params, x, coefficient):
    """Return (total loss, {name: gradient}) in float64."""
    names = ("encoder", "W_dec", "b_enc", "b_dec")
    p = {name: getattr(params, name).double().clone().requires_grad_(True) for name in names}
    x = x.double()
    f = (x @ p["encoder"].T + p["b_enc"]).relu()
    error = x - f @ p["W_dec"] - p["b_dec"]
    loss = (error.square().sum(1) + coefficient * (f * p["W_dec"].norm(dim=1)).sum(1)).mean()
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in p.items()}
