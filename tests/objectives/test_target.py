"""L0 is held to its target: the controller on a model of what it steers, and in training."""

import math
from dataclasses import replace

import pytest
import torch

from sae import config, files
from sae.errors import UserError
from sae.objectives import target
from sae.recipe import LogRecipe, SAERecipe
from sae.run import train
from tests.training.test_training import planted, recipe

FORMS = {
    "relu": SAERecipe("relu", d_sae=80, target_l0=4.5),
    "tanh": SAERecipe("jumprelu", d_sae=80, target_l0=4.5),
    "step": SAERecipe("jumprelu", d_sae=80, target_l0=4.5, jumprelu_sparsity_loss_mode="step"),
    "quadratic": SAERecipe("jumprelu", d_sae=80, target_l0=4.5, jumprelu_sparsity_loss_mode="quadratic"),
}


def last_tenth(run):
    lines = [line for line in files.read_lines(run / "metrics.jsonl") if "metrics/l0" in line]
    l0 = [line["metrics/l0"] for line in lines if line["step"] >= 0.9 * lines[-1]["step"]]
    return sum(l0) / len(l0)


@pytest.mark.parametrize("sae", FORMS.values(), ids=FORMS)
def test_over_the_last_tenth_of_a_run_l0_is_within_5_per_cent_of_the_target(tmp_path, sae):
    x, _ = planted()
    made = replace(recipe(tmp_path / "run", tokens=200_000), sae=sae, log=LogRecipe(every=1))
    train(made, x, progress=False)
    assert last_tenth(tmp_path / "run") == pytest.approx(4.5, rel=0.05)
    line = files.read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert math.isfinite(line["details/sparsity_coefficient"])


@pytest.mark.parametrize("first", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("lag", [2, 10])
def test_it_finds_the_weight_whatever_it_begins_with(first, lag):
    """L0 = 20 / √weight, a first-order lag behind; the target needs a weight of 0.25."""
    control, l0, steps = target.begin(first), 100.0, 400
    for step in range(steps):
        weight = float(control[0])
        l0 += (20 / math.sqrt(max(weight, 1e-9)) - l0) / lag
        if step >= 0.1 * steps:
            target.follow_(control, l0, 40.0, step / steps, 0.1)
    assert l0 == pytest.approx(40, rel=0.02)
    assert weight == pytest.approx(0.25, rel=0.1)


def test_l0_that_is_no_number_leaves_the_state_as_it_is():
    control = target.begin(2.0)
    before = control.clone()
    target.follow_(control, float("nan"), 40.0, 0.5, 0.1)
    assert torch.equal(control.nan_to_num(-7.0), before.nan_to_num(-7.0))
    assert float(control[0]) == pytest.approx(2.0)


def test_k_is_the_target_unless_a_weight_was_given():
    assert target.l0_of(SAERecipe("jumprelu", k=48)) == 48
    assert target.l0_of(SAERecipe("relu", k=48, target_l0=7.5)) == 7.5
    assert target.l0_of(SAERecipe("relu", l1_coefficient=5.0)) is None
    assert target.l0_of(SAERecipe("jumprelu", l0_coefficient=0.4)) is None
    assert target.l0_of(SAERecipe("jumprelu", l0_coefficient=0.4, target_l0=20)) == 20


def test_a_given_weight_is_left_alone(tmp_path):
    x, _ = planted(2000)
    sae = SAERecipe("relu", d_sae=80, l1_coefficient=0.7, l1_warm_up=0.0)
    train(replace(recipe(tmp_path / "run", tokens=10_000), sae=sae), x, progress=False)
    lines = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all("details/sparsity_coefficient" not in line for line in lines)


@pytest.mark.parametrize(
    ("sae", "line"),
    [
        ({"architecture": "topk", "target_l0": 20}, "sae.target_l0 is for jumprelu and relu"),
        ({"architecture": "relu", "d_sae": 16, "k": 4, "target_l0": 20}, "more than sae.d_sae"),
        ({"architecture": "relu", "target_l0": 0}, "expected above 0"),
    ],
)
def test_a_target_that_nothing_could_hold_is_refused(sae, line):
    with pytest.raises(UserError, match=line):
        config.build({"sae": sae}, "recipe")
