"""ReLU + L1: gradients against float64 autograd on both paths, the start, the warm-up."""

import pytest
import torch

from sae.objectives import objective, relu
from sae.recipe import Recipe, SAERecipe
from tests.objectives.gradients import assert_equal, gradients, make, some
from tests.reference.relu import losses_and_gradients

DEAD = some(0)


@pytest.mark.parametrize("path", ["sparse", "plain", "dense"])
def test_gradients_equal_float64_autograd(path):
    params, x = make(unit_norm=False)
    facts = {"dense": path == "dense", "implementation": "plain" if path == "plain" else None}
    work, losses = relu.loss(params, x, DEAD, 1.0, coefficient=5.0, warm_up=0.05, **facts)
    loss, expected = losses_and_gradients(params, x, 5.0)
    assert_equal(gradients(params, work), expected)
    torch.testing.assert_close((losses.mse + losses.sparsity).double(), loss, rtol=1e-5, atol=0)


def test_the_coefficient_rises_over_the_first_part_of_the_run():
    params, x = make(unit_norm=False)

    def sparsity(share, warm_up):
        return float(relu.loss(params, x, DEAD, share, coefficient=5.0, warm_up=warm_up)[1].sparsity)

    whole = sparsity(1.0, 0.05)
    assert sparsity(0.0, 0.05) == 0
    assert sparsity(0.01, 0.05) == pytest.approx(whole / 5)
    assert sparsity(0.05, 0.05) == sparsity(0.0, 0.0) == whole


def test_it_starts_with_decoder_norms_of_a_tenth_and_leaves_them_free():
    chosen = objective(Recipe(sae=SAERecipe(architecture="relu", d_sae=101)), 7.0, low=False)
    params = chosen.begin(torch.randn(50, 24))
    torch.testing.assert_close(params.W_dec.norm(dim=1), torch.full((101,), 0.1))
    assert torch.equal(params.encoder, params.W_dec)
    assert params.b_enc.abs().sum() == params.b_dec.abs().sum() == 0
    assert not chosen.unit_norm
    work, _ = chosen.loss(params, torch.randn(37, 24), DEAD, 0.5)
    assert not work.subtracts_b_dec


def test_its_codes_are_what_is_positive():
    params, x = make()
    torch.testing.assert_close(relu.encode(params, x).dense(), (x @ params.encoder.T + params.b_enc).relu())
