"""JumpReLU: gradients of every form against float64 autograd, by both paths; published constants in our units."""

import math
from dataclasses import replace

import pytest
import torch

from sae.objectives import jumprelu, objective
from sae.objectives.jumprelu import Form, form_of
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from tests.objectives.gradients import assert_equal, gradients, make, some
from tests.reference.jumprelu import losses_and_gradients

DEAD = some(0)


def made(mode, unit_norm=False):
    """Thresholds around 1.5, some entries on either side of every window."""
    params, x = make(unit_norm=unit_norm)
    params.log_threshold = 0.4 + 0.2 * torch.randn(101, generator=torch.Generator().manual_seed(2))
    # a large weight for the pre-activation loss, so that an error in it shows
    return params, x, Form(mode, 1.3, 0.1, 3.0, 0.5, k=20, pre_act_coefficient=0.3)


@pytest.mark.parametrize("path", ["sparse", "plain", "dense"])
@pytest.mark.parametrize("mode", ["tanh", "step", "quadratic"])
def test_gradients_equal_float64_autograd(mode, path):
    params, x, form = made(mode)
    facts = {"dense": path == "dense", "implementation": "plain" if path == "plain" else None}
    work, losses = jumprelu.loss(params, x, DEAD, 1.0, form=form, **facts)
    loss, expected = losses_and_gradients(params, x, mode, bandwidth=1.3, coefficient=3.0, pre_act=0.3, k=20)
    assert_equal(gradients(params, work), expected)
    ours = losses.mse + losses.sparsity + losses.more.get("losses/pre_act_loss", 0)
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["tanh", "step"])
def test_entries_below_the_threshold_learn_where_the_kernel_reaches_them(mode):
    """dictionary_learning takes its window from the gated strength, so that the lower half of it is lost."""
    params, x, form = made(mode)
    work, _ = jumprelu.loss(params, x, DEAD, 1.0, form=form, dense=False)
    threshold = params.log_threshold.exp()[work.codes.indices]
    pre = (x @ params.encoder.T + params.b_enc)[work.codes.rows(), work.codes.indices]
    gated = work.codes.values == 0
    assert gated.any() and bool((pre[gated] <= threshold[gated]).all())
    assert bool((pre[gated] > threshold[gated] - form.bandwidth / 2).all())
    if mode == "tanh":
        assert (work.value_grads[gated] != 0).all()


def test_a_larger_coefficient_asks_for_fewer_features():
    """SAELens #719: between its default and its documented coefficient nothing changes."""
    params, x, form = made("step")
    slope = []
    for coefficient in (1.0, 5.0, 25.0):
        facts = {**vars(form), "l0_coefficient": coefficient}
        work, _ = jumprelu.loss(params, x, DEAD, 1.0, form=Form(**facts))
        slope.append(float(work.vectors["log_threshold"].sum()))
    assert slope[0] > slope[1] > slope[2]  # the gradient asks for higher thresholds, ever more strongly
    assert slope[2] < 0


def test_quadratic_asks_for_k_from_both_sides():
    params, x, form = made("quadratic")
    l0 = float(jumprelu.loss(params, x, DEAD, 1.0, form=form)[1].more["metrics/l0"])

    def share_of_l0(k):
        facts = {**vars(form), "k": k}
        asked = jumprelu.loss(params, x, DEAD, 1.0, form=Form(**facts))[0].vectors["log_threshold"]
        plain = jumprelu.loss(params, x, DEAD, 0.0, form=Form(**facts))[0].vectors["log_threshold"]
        return float((asked - plain).sum())

    assert share_of_l0(math.ceil(l0) + 5) > 0 > share_of_l0(math.floor(l0) - 5)


def test_the_coefficient_warms_up():
    params, x, form = made("tanh")

    def sparsity(share):
        return float(jumprelu.loss(params, x, DEAD, share, form=form)[1].sparsity)

    assert sparsity(0.0) == 0
    assert sparsity(0.25) == pytest.approx(sparsity(1.0) / 2)
    assert sparsity(0.5) == sparsity(1.0)


def test_published_constants_in_units_of_mean_norm_sqrt_d():
    jump = SAERecipe(architecture="jumprelu", l0_coefficient=1.0)
    tanh = form_of(jump, 576, 400.0)
    assert (tanh.mode, tanh.bandwidth, tanh.warm_up, tanh.pre_act_coefficient) == ("tanh", 2.0, 1.0, 3e-6)
    assert tanh.init_threshold == pytest.approx(math.exp(0.1))
    step = form_of(replace(jump, jumprelu_sparsity_loss_mode="step"), 576, 400.0)
    assert step.bandwidth == step.init_threshold == pytest.approx(0.024)
    given = form_of(replace(jump, jumprelu_bandwidth=0.5, l0_coefficient=0.0, l0_warm_up=0.0), 576, 400.0)
    assert (given.bandwidth, given.l0_coefficient, given.warm_up) == (0.5, 0.0, 0.0)


def test_the_tanh_form_starts_with_the_share_of_features_that_it_says():
    sample = torch.randn(2000, 24) + 3
    chosen = jumprelu_objective("tanh", d_sae=101)
    params = chosen.begin(sample)
    fires = (sample @ params.encoder.T + params.b_enc > params.log_threshold.exp()).float().mean(0)
    torch.testing.assert_close(fires, torch.full((101,), jumprelu.FIRST_SHARE), atol=0.01, rtol=0)
    torch.testing.assert_close(params.encoder, params.W_dec * 24 / 101)
    assert params.W_dec.abs().max() <= 24**-0.5 and not chosen.unit_norm


@pytest.mark.parametrize("mode", ["step", "quadratic"])
def test_the_other_forms_start_with_unit_rows_and_see_the_centred_input(mode):
    sample = torch.randn(2000, 24) + 3
    chosen = jumprelu_objective(mode, d_sae=101)
    params = chosen.begin(sample)
    torch.testing.assert_close(params.W_dec.norm(dim=1), torch.ones(101))
    pre = sample @ params.encoder.T + params.b_enc
    torch.testing.assert_close(pre, (sample - sample.mean(0)) @ params.encoder.T, atol=1e-4, rtol=1e-4)
    assert chosen.unit_norm
    assert float(params.log_threshold[0].exp()) == pytest.approx(1e-3 * 24**0.5)


@pytest.mark.parametrize("mode", ["step", "quadratic"])
@pytest.mark.parametrize("d_sae,l0", [(500, 10), (2000, 30)])
def test_where_l0_is_held_some_times_as_many_fire_at_first_and_do_not_overshoot(mode, d_sae, l0):
    sample = torch.randn(2000, 24) * 3 + 3
    recipe = SAERecipe("jumprelu", d_sae=d_sae, jumprelu_sparsity_loss_mode=mode, target_l0=l0)
    chosen = objective(Recipe(sae=recipe), (sample - sample.mean(0)).square().sum(1).mean().item(), low=False)
    params = chosen.begin(sample)
    codes = chosen.encode(params, sample)
    assert codes.values.numel() / 2000 == pytest.approx(jumprelu.START * l0, rel=0.1)
    made = codes.dense() @ params.W_dec
    assert made.square().sum() < 1.5 * (sample - sample.mean(0)).square().sum()


def jumprelu_objective(mode, d_sae):
    recipe = Recipe(
        sae=SAERecipe(architecture="jumprelu", d_sae=d_sae, jumprelu_sparsity_loss_mode=mode, l0_coefficient=1.0),
        training=TrainingRecipe(seed=3),
    )
    return objective(recipe, 7.0, low=False)


def test_its_codes_are_those_above_the_threshold():
    params, x, _ = made("tanh")
    pre = x @ params.encoder.T + params.b_enc
    torch.testing.assert_close(jumprelu.encode(params, x).dense(), pre * (pre > params.log_threshold.exp()))
