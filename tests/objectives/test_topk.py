"""The hand-written gradients of TopK + AuxK against float64 autograd, each by its name."""

import pytest
import torch

from sae.objectives import topk
from sae.objectives.terms import Params, aux_k
from tests.reference.topk import losses_and_gradients


def make(B=37, d=24, F=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, d, generator=g)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    params = Params(
        W_dec + 0.1 * torch.randn(F, d, generator=g),
        W_dec,
        0.1 * torch.randn(F, generator=g),
        torch.randn(d, generator=g),
    )
    return params, torch.randn(B, d, generator=g) * 3


def gradients(params, work):
    """Dense gradients of the work, as update_rows and RowAdam would sum them."""
    rows = work.codes.rows()
    d = {name: torch.zeros_like(getattr(params, name)) for name in ("encoder", "W_dec", "b_enc")}
    d["W_dec"].index_add_(0, work.codes.indices, work.codes.values[:, None] * work.error[0, rows])
    d["encoder"].index_add_(0, work.codes.indices, work.value_grads[:, None] * work.inputs[rows])
    d["b_enc"].index_add_(0, work.codes.indices, work.value_grads)
    if work.extra is not None:
        d["W_dec"].index_add_(0, work.extra.features, work.extra.W_dec)
        d["encoder"].index_add_(0, work.extra.features, work.extra.encoder)
        d["b_enc"].index_add_(0, work.extra.features, work.extra.b_enc)
    d["b_dec"] = work.error[0].sum(0) - d["b_enc"] @ params.encoder
    return d


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("n_dead", [0, 7, 60])
def test_gradients_equal_float64_autograd(implementation, n_dead):
    params, x = make()
    dead = torch.zeros(101, dtype=torch.bool)
    dead[torch.randperm(101, generator=torch.Generator().manual_seed(1))[:n_dead]] = True
    work, losses = topk.loss(params, x, dead, k=5, variance=7.0, aux_coefficient=1 / 32, implementation=implementation)
    loss, expected = losses_and_gradients(params, x, 5, variance=7.0, dead=dead, aux_coefficient=1 / 32)
    ours = losses.mse / 7.0 + losses.aux / 32
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(params, work).items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def test_aux_k_is_the_power_of_two_nearest_half_the_width():
    assert (aux_k(576), aux_k(768), aux_k(1024)) == (256, 512, 512)


def test_aux_loss_reaches_the_encoder():
    params, x = make()
    dead = torch.zeros(101, dtype=torch.bool)
    dead[3] = True
    params.b_enc[3] = 50.0
    with_aux, _ = topk.loss(params, x, dead, k=5, variance=1.0, aux_coefficient=1.0)
    assert with_aux.extra is not None and with_aux.extra.encoder.abs().sum() > 0
