"""The hand-written gradients of TopK + AuxK against float64 autograd, each by its name."""

import pytest
import torch

from sae.objectives import topk
from tests.objectives.gradients import assert_equal, gradients, make, some
from tests.reference.topk import losses_and_gradients


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("n_dead", [0, 7, 60])
def test_gradients_equal_float64_autograd(implementation, n_dead):
    params, x = make()
    dead = some(n_dead)
    work, losses = topk.loss(params, x, dead, k=5, variance=7.0, aux_coefficient=1 / 32, implementation=implementation)
    loss, expected = losses_and_gradients(params, x, 5, variance=7.0, dead=dead, aux_coefficient=1 / 32)
    ours = losses.mse / 7.0 + losses.aux / 32
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-6)
    assert_equal(gradients(params, work), expected)
