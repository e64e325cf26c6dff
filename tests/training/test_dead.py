"""Dead features: counted in tokens, in all the ways in which peers miscounted; begun anew when asked.

peers.md 3D: counters in steps instead of tokens, b_dec counted twice in the auxiliary loss, features that never come
back, resampling gone.
"""

import pytest
import torch

from sae import files
from sae.codes import Codes, from_topk
from sae.kernels import Work
from sae.objectives import objective
from sae.objectives.terms import Params
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from sae.run import train
from sae.training.average import Average
from sae.training.dead import Dead, dead_window
from sae.training.optimizer import RowAdam
from sae.training.resample import ENCODER_SCALE, _draw, resample_, resample_due
from tests.training.test_training import planted, recipe


def test_dead_features_are_counted_in_tokens_and_revived():
    dead = Dead(5, window=20)
    codes = from_topk(torch.tensor([[1.0], [0.0]]), torch.tensor([[1], [2]]), 5)
    for _ in range(11):
        dead.count_(codes)
    assert dead.mask().tolist() == [True, False, True, True, True]
    dead.count_(from_topk(torch.tensor([[0.5]]), torch.tensor([[2]]), 5))
    assert dead.mask().tolist() == [True, False, False, True, True] and dead.share() == 0.6000000238418579


def test_the_window_is_in_tokens_and_short_runs_have_one_too():
    assert dead_window(100_000_000, None) == 5_000_000
    assert dead_window(1_000_000_000, None) == 10_000_000
    assert dead_window(1_000, 7) == 7
    counts = []
    for rows in (1, 10):  # 100 tokens one by one or by ten are as long
        dead = Dead(3, window=99)
        codes = from_topk(torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int64), 3)
        for _ in range(100 // rows):
            dead.count_(codes)
        counts.append(dead.since.tolist())
    assert counts[0] == counts[1] == [0, 100, 100]


def test_an_entry_of_value_zero_has_not_fired_and_the_last_feature_counts_like_any_other():
    dead = Dead(3, window=1)
    codes = from_topk(torch.tensor([[1.0, 0.0, -0.5]]), torch.tensor([[2, 1, 0]]), 3)
    dead.count_(codes)
    assert dead.since.tolist() == [1, 1, 0]


def test_a_dense_objective_tells_who_fired():
    nothing = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), 3)
    dead = Dead(3, window=1)
    dead.count_(nothing, torch.tensor([True, False, True]))
    assert dead.since.tolist() == [0, 4, 0]


# ---- resampling ------------------------------------------------------------------------------------------


def test_resampling_is_due_every_so_many_tokens_but_not_at_the_end():
    due = [step for step in range(100) if resample_due(step, 100, 10, 250)]
    assert due == [24, 49, 74]  # after 250, 500 and 750 of 1,000 tokens
    assert not any(resample_due(step, 100, 10, None) for step in range(100))
    assert [step for step in range(20) if resample_due(step, 20, 100, 30)] == list(range(19))


def state(dead_features=(3, 5), F=8, d=6, B=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    params = Params(2 * rows, rows.clone(), torch.ones(F), torch.zeros(d), (2 * rows).bfloat16(), torch.zeros(F))
    optimizer, dead = RowAdam(params), Dead(F, window=10)
    for moment in optimizer.moments.values():
        moment.m.fill_(1), moment.v.fill_(1)
    dead.since[list(dead_features)] = 11
    error = torch.zeros(1, B, d)
    error[0, 4], error[0, 7] = 3.0, 2.0  # all others are reconstructed perfectly
    empty = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64), F)
    work = Work(empty, torch.randn(B, d, generator=g), error, torch.zeros(0), (F,), True)
    return params, optimizer, dead, work


def test_dead_rows_begin_at_badly_reconstructed_inputs_and_others_stay():
    params, optimizer, dead, work = state()
    before = params.encoder.clone()
    assert resample_(params, optimizer, dead, work, seed=1) == 2
    directions = torch.nn.functional.normalize(work.inputs[[4, 7]], dim=1)
    found = params.W_dec[[3, 5]]
    assert torch.equal(found, directions) or torch.equal(found, directions.flip(0))  # each input once
    torch.testing.assert_close(params.encoder[[3, 5]], found * ENCODER_SCALE * 2)
    assert torch.equal(params.encoder_low, params.encoder.bfloat16())
    alive = [0, 1, 2, 4, 6, 7]
    assert torch.equal(params.encoder[alive], before[alive])
    assert params.b_enc.tolist() == [1, 1, 1, 0, 1, 0, 1, 1]
    for name in ("encoder", "W_dec", "b_enc", "log_threshold"):
        adam = optimizer.moments[name]
        assert not adam.m[[3, 5]].any() and (adam.v == 1).all(), name
    assert dead.mask().sum() == 0


def test_resampling_is_the_same_for_a_seed_and_another_for_another():
    loss = torch.rand(50)
    assert torch.equal(_draw(loss, 5, seed=3), _draw(loss, 5, seed=3))
    assert not torch.equal(_draw(loss, 5, seed=3), _draw(loss, 5, seed=4))


def test_inputs_are_drawn_by_their_squared_loss():
    loss = torch.tensor([1.0, 2.0, 0.0])
    drawn = torch.cat([_draw(loss, 1, seed) for seed in range(2000)])
    share = (drawn == 1).float().mean().item()
    assert abs(share - 4 / 5) < 0.03 and not (drawn == 2).any()
    assert len(_draw(loss, 7, 0)) == 7  # more dead features than inputs
    assert len(_draw(torch.zeros(4), 2, 0).unique()) == 2  # nothing is lost, nothing fails


def test_nothing_is_resampled_where_nothing_or_everything_is_dead():
    for features in ((), range(8)):
        params, optimizer, dead, work = state(dead_features=features)
        before = params.W_dec.clone()
        assert resample_(params, optimizer, dead, work, seed=0) == 0
        assert torch.equal(params.W_dec, before)


def test_a_resampled_run_repeats_to_the_bit(tmp_path):
    x, _ = planted(2000)
    given = {"tokens": 60_000, "dead_after": 4_000, "aux_coefficient": 0.0}
    made = recipe(tmp_path / "with", **given, resample_every=8_000)
    assert isinstance(made.training, TrainingRecipe)
    sae = train(made, x, progress=False)
    lines = files.read_lines(tmp_path / "with" / "metrics.jsonl")
    resampled = [line["sparsity/resampled"] for line in lines if "sparsity/resampled" in line]
    assert len(resampled) == 6 and sum(resampled) > 0

    again = train(recipe(tmp_path / "again", **given, resample_every=8_000), x, progress=False)
    assert torch.equal(again.W_dec, sae.W_dec)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_resampled_features_do_not_fire_on_everything(architecture):
    """Inputs with a large mean: what an encoder without b_dec takes from them has the mean taken off again."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=g) + 5 * torch.nn.functional.normalize(torch.randn(24, generator=g), dim=0)
    x = x * (24**0.5 / x.norm(dim=1).mean())
    mode = {"jumprelu_sparsity_loss_mode": "step"} if architecture == "jumprelu" else {}
    made = Recipe(sae=SAERecipe(architecture=architecture, d_sae=80, k=4, **mode))
    trained = objective(made, 20.0, low=False)
    params = trained.begin(x)
    optimizer, dead = RowAdam(params), Dead(80, window=10)
    average = Average(params, 0.999)
    dead.since[:20] = 11
    work, _ = trained.loss(params, x, torch.zeros(80, dtype=torch.bool), 0.0)
    assert resample_(params, optimizer, dead, work, 0, average) == 20
    inputs = x - params.b_dec if work.subtracts_b_dec else x
    fires = (inputs @ params.encoder[:20].T + params.b_enc[:20] > 0).float().mean()
    assert fires < 0.7
    cosines = torch.nn.functional.normalize(params.W_dec[:20], dim=1)
    assert (cosines @ cosines.T).fill_diagonal_(0).mean() < 0.3
    assert torch.equal(average.means["W_dec"][:20], params.W_dec[:20])


def test_adam_goes_on_with_the_moments_of_the_living():
    params, optimizer, dead, work = state()
    optimizer.moments["encoder"].v[[3, 5]] = 0
    resample_(params, optimizer, dead, work, seed=1)
    assert (optimizer.moments["encoder"].v[[3, 5]] == 1).all() and not optimizer.moments["encoder"].m[[3, 5]].any()
