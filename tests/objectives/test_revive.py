"""AuxK in the cases that its implementations elsewhere got wrong (each a complaint in their trackers)."""

import pytest
import torch

from sae.objectives import revive, topk
from sae.objectives.revive import aux_k, revive_dead
from tests.objectives.gradients import gradients, make, some


def aux(params, x, dead, e, coefficient=1.0):
    return revive_dead(params, x - params.b_dec, e, dead, coefficient)


def test_aux_k_is_the_power_of_two_nearest_half_the_width():
    assert (aux_k(576), aux_k(768), aux_k(1024)) == (256, 512, 512)


def test_the_decoder_bias_is_not_in_the_prediction():
    """sparsify #132: ê decoded with b_dec counts it twice, since e has it taken off already."""
    params, x = make()
    e = torch.randn_like(x)
    inputs = x - params.b_dec
    _, loss = revive_dead(params, inputs, e, some(7), 1.0)
    params.b_dec += 100
    assert float(revive_dead(params, inputs, e, some(7), 1.0)[1]) == float(loss)


def test_a_perfect_prediction_of_the_error_costs_nothing():
    params, x = make()
    dead = some(3)
    acts = ((x - params.b_dec) @ params.encoder[dead].T + params.b_enc[dead]).relu()
    rows, loss = aux(params, x, dead, acts @ params.W_dec[dead])
    assert float(loss) < 1e-10
    assert rows.W_dec.abs().max() < 1e-5


def test_the_encoder_and_through_it_the_input_bias_learn():
    """sparsify's fused encoder dropped this gradient, so that AuxK never reached the encoder."""
    params, x = make()
    dead = some(1)
    params.b_enc[dead] = 50.0
    facts = {"k": 5, "variance": 1.0}
    with_aux = gradients(params, topk.loss(params, x, dead, aux_coefficient=1.0, **facts)[0])
    without = gradients(params, topk.loss(params, x, dead, aux_coefficient=0.0, **facts)[0])
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        assert (with_aux[name] - without[name]).abs().sum() > 0, name


def test_no_gradient_flows_into_the_error():
    """What the living features do to e is none of AuxK's business: only dead rows have a share."""
    params, x = make()
    dead = some(7)
    work, _ = topk.loss(params, x, dead, k=5, variance=1.0, aux_coefficient=1.0)
    plain, _ = topk.loss(params, x, dead, k=5, variance=1.0, aux_coefficient=0.0)
    torch.testing.assert_close(work.error, plain.error, rtol=0, atol=0)
    torch.testing.assert_close(work.value_grads, plain.value_grads, rtol=0, atol=0)
    assert work.extra.features.tolist() == dead.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("n_dead", [1, 15, 16, 17, 101])
def test_fewer_dead_than_k_aux_are_all_used_and_no_more_than_k_aux(n_dead, monkeypatch):
    params, x = make()
    params.b_enc += 1000  # everything is positive
    monkeypatch.setattr(revive, "aux_k", lambda d: 16)
    rows, _ = aux(params, x, some(n_dead), torch.randn_like(x))
    used = (rows.b_enc != 0).sum().item()
    assert rows.features.numel() == n_dead
    assert min(n_dead, 16) <= used <= n_dead


@pytest.mark.parametrize("case", ["one row", "perfect reconstruction", "equal errors"])
def test_where_the_error_does_not_vary_the_loss_is_0_and_not_nan(case):
    params, x = make()
    e = torch.randn_like(x)
    if case == "one row":
        x, e = x[:1], e[:1]
    elif case == "perfect reconstruction":
        e = torch.zeros_like(x)
    else:
        e = torch.ones_like(x)
    rows, loss = aux(params, x, some(7), e)
    assert float(loss) == 0
    assert all(float(g.abs().sum()) == 0 for g in (rows.encoder, rows.W_dec, rows.b_enc))


def test_dead_features_below_zero_neither_predict_nor_learn():
    params, x = make()
    params.b_enc -= 1000
    e = torch.randn_like(x)
    rows, loss = aux(params, x, some(7), e)
    assert float(loss) == pytest.approx(float(e.square().sum() / (e - e.mean(0)).square().sum()))
    assert rows.encoder.abs().sum() == 0


def test_nothing_dead_or_no_weight_costs_nothing():
    params, x = make()
    assert aux(params, x, some(0), x)[0] is None
    assert aux(params, x, some(7), x, coefficient=0.0)[0] is None


def test_chunks_of_rows_change_nothing(monkeypatch):
    params, x = make()
    e = torch.randn_like(x)
    whole, loss = aux(params, x, some(30), e)
    monkeypatch.setattr(revive, "ROWS", 5)
    chunked, same = aux(params, x, some(30), e)
    torch.testing.assert_close(loss, same)
    for name in ("encoder", "W_dec", "b_enc"):
        torch.testing.assert_close(getattr(whole, name), getattr(chunked, name))


def test_of_too_many_dead_features_every_one_gets_its_turn(monkeypatch):
    params, x = make()
    monkeypatch.setattr(revive, "most", lambda d: 40)
    seen = set()
    for step in range(8):
        rows, _ = revive_dead(params, x - params.b_dec, torch.randn_like(x), some(101), 1.0, step / 2**20)
        assert rows.features.numel() <= 40
        assert rows.features.tolist() == sorted(rows.features.tolist())
        seen |= set(rows.features.tolist())
    assert len(seen) == 101
