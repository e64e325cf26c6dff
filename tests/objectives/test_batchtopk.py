"""BatchTopK and Matryoshka: gradients against float64 autograd, the running threshold, the nested widths."""

import pytest
import torch

from sae.objectives import batchtopk, objective
from sae.objectives.batchtopk import RATE, UNSET
from sae.objectives.matryoshka import widths
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from tests.objectives.gradients import assert_equal, gradients, make, some
from tests.reference.batchtopk import losses_and_gradients


def trained(**sae):
    return objective(Recipe(sae=SAERecipe(**sae), training=TrainingRecipe(aux_coefficient=1 / 32)), 7.0, low=False)


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("n_dead", [0, 7, 60])
@pytest.mark.parametrize("levels", [None, (3, 20, 50, 101)])
def test_gradients_equal_float64_autograd(levels, n_dead, implementation):
    params, x = make(ema_threshold=torch.tensor(UNSET))
    dead = some(n_dead)
    facts = {"variance": 7.0, "aux_coefficient": 1 / 32}
    weights = None if levels is None else (1 / len(levels),) * len(levels)
    work, losses = batchtopk.loss(
        params, x, dead, k=5, levels=levels, weights=weights, implementation=implementation, **facts
    )
    loss, expected, smallest = losses_and_gradients(params, x, 5, levels=levels, dead=dead, **facts)
    assert_equal(gradients(params, work), expected)
    assert work.codes.values.numel() == 37 * 5
    torch.testing.assert_close(params.ema_threshold.double(), smallest, rtol=1e-5, atol=0)
    if levels is None:
        torch.testing.assert_close((losses.mse / 7.0 + losses.aux / 32).double(), loss, rtol=1e-5, atol=0)


def test_the_objective_weighs_every_width_once():
    """dictionary_learning's 1/G of a mean makes AuxK G times as heavy as the paper's."""
    params, x = make(ema_threshold=torch.tensor(UNSET))
    dead = some(9)
    chosen = trained(architecture="matryoshka", d_sae=101, k=5, matryoshka_widths=(3, 20, 50, 101))
    work, losses = chosen.loss(params, x, dead, 0.0)
    _, expected, _ = losses_and_gradients(
        params, x, 5, levels=(3, 20, 50, 101), variance=7.0, dead=dead, aux_coefficient=1 / 32
    )
    assert_equal(gradients(params, work), expected)
    spread = (x - x.mean(0)).square().sum()
    for width, told in ((3, losses.more["metrics/fvu_3"]), (50, losses.more["metrics/fvu_50"]), (101, losses.fvu)):
        error = x - params.b_dec - work.codes.dense()[:, :width] @ params.W_dec[:width]
        torch.testing.assert_close(told, error.square().sum() / spread, rtol=1e-5, atol=0)


def test_widths_are_groups_of_a_32nd_a_16th_an_8th_a_4th_and_the_rest():
    assert widths(SAERecipe(d_sae=8192)) == (256, 768, 1792, 3840, 8192)
    assert widths(SAERecipe(d_sae=8192, matryoshka_widths=(128, 8192))) == (128, 8192)
    assert widths(SAERecipe(d_sae=20)) == (1, 4, 9, 20)
    assert widths(SAERecipe(d_sae=1)) == (1,)


def test_the_first_batch_sets_the_threshold_and_later_ones_move_it():
    params, x = make(ema_threshold=torch.tensor(UNSET))
    facts = {"k": 5, "variance": 7.0, "aux_coefficient": 0.0}
    first, _ = batchtopk.loss(params, x, some(0), **facts)
    start = float(first.codes.values.min())
    assert float(params.ema_threshold) == pytest.approx(start)
    second, _ = batchtopk.loss(params, 2 * x, some(0), **facts)
    expected = (1 - RATE) * start + RATE * float(second.codes.values.min())
    assert float(params.ema_threshold) == pytest.approx(expected, rel=1e-6)
    assert params.ema_threshold.dtype == torch.float32


def test_the_codes_of_evaluation_are_those_above_the_threshold():
    params, x = make(ema_threshold=torch.tensor(1.5))
    pre = (x - params.b_dec) @ params.encoder.T + params.b_enc
    torch.testing.assert_close(batchtopk.encode(params, x).dense(), pre * (pre > 1.5))
    params.ema_threshold.fill_(UNSET)
    torch.testing.assert_close(batchtopk.encode(params, x).dense(), pre.relu())


def test_a_batch_with_nothing_positive_leaves_the_threshold_and_the_weights_alone():
    params, x = make(ema_threshold=torch.tensor(1.5))
    params.b_enc -= 1000
    work, losses = batchtopk.loss(params, x, some(0), k=5, variance=7.0, aux_coefficient=0.0)
    assert float(params.ema_threshold) == 1.5
    assert gradients(params, work)["encoder"].abs().sum() == 0
    assert bool(losses.mse.isfinite())


def test_a_batch_keeps_k_on_average_not_in_every_row():
    params, x = make(ema_threshold=torch.tensor(UNSET))
    x[:10] *= 5
    work, _ = batchtopk.loss(params, x, some(0), k=5, variance=7.0, aux_coefficient=0.0)
    l0 = work.codes.l0()
    assert float(l0.mean()) == 5 and float(l0[:10].mean()) > 5
