"""The update against torch's own Adam on the same gradients; clipping; what a checkpoint keeps."""

from functools import partial

import pytest
import torch

from sae.codes import from_dense
from sae.kernels import Work, by_feature
from sae.objectives import topk
from sae.objectives.terms import Objective, Params
from sae.training.average import Average
from sae.training.capture import Captured
from sae.training.dead import Dead
from sae.training.optimizer import FROZEN, ROWS, VECTORS, RowAdam, trained

F, D, B = 30, 8, 12


def made(log_threshold=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    threshold = torch.randn(F, generator=g) if log_threshold else None
    return Params(rows.clone(), rows, torch.randn(F, generator=g), torch.randn(D, generator=g), None, threshold)


def work_of(seed, active=F):
    """Random work in which only the first `active` features have entries."""
    g = torch.Generator().manual_seed(seed)
    acts = torch.rand(B, F, generator=g) * (torch.rand(B, F, generator=g) < 0.3) * (torch.arange(F) < active)
    codes = from_dense(acts)
    grads = torch.randn(codes.values.shape, generator=g)
    vectors = {"log_threshold": torch.randn(F, generator=g) * (torch.arange(F) < active)}
    inputs, error = torch.randn(B, D, generator=g), torch.randn(1, B, D, generator=g)
    return Work(codes, inputs, error, grads, (F,), True, vectors=vectors)


def gradients(params, work):
    """The gradients that a Work stands for, dense (decoder not projected)."""
    rows = work.codes.rows()
    pre = torch.zeros(B, F).index_put_((rows, work.codes.indices), work.value_grads)
    b_enc = pre.sum(0)
    return {
        "encoder": pre.T @ work.inputs,
        "W_dec": work.codes.dense().T @ work.error[0],
        "b_enc": b_enc,
        "b_dec": work.error[0].sum(0) - b_enc @ params.encoder,
        "log_threshold": work.vectors["log_threshold"],
    }


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.5, 0.9)])
def test_updates_are_those_of_torchs_adam_for_busy_and_for_idle_rows(betas):
    """Features come, pause for steps and come again; with β1 = 0 their rows are lazily decayed."""
    mine, theirs = made(), made()
    optimizer = RowAdam(mine, betas=betas, eps=1e-8)
    assert (optimizer.moments["W_dec"].m is None) == (betas[0] == 0)
    reference = {name: weight.requires_grad_() for name, weight in trained(theirs).items()}
    adam = torch.optim.Adam(reference.values(), lr=1e-2, betas=betas, eps=1e-8)
    for step in range(12):
        work = work_of(step, active=F if step % 4 == 0 else 10)
        with torch.no_grad():
            found = gradients(theirs, work)
        for name, weight in reference.items():
            weight.grad = found[name].clone()
        adam.step()
        optimizer.update_(work, 1e-2, unit_norm=False)
        norm = torch.stack([grad.square().sum() for grad in found.values()]).sum().sqrt()
        torch.testing.assert_close(optimizer.norm, norm, rtol=1e-4, atol=1e-5)
    for name, weight in reference.items():
        torch.testing.assert_close(getattr(mine, name), weight.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_a_gradient_is_scaled_by_the_norm_of_the_one_before():
    """The first is not scaled; a second of the same size is scaled to the limit, and Adam's moments show it."""
    free, clipped = made(), made()
    plain, limited = RowAdam(free), RowAdam(clipped, clip=0.5)
    for optimizer in (plain, limited):
        optimizer.update_(work_of(1), 1e-3)
    assert torch.equal(free.encoder, clipped.encoder) and limited.norm > 0.5
    scale = 0.5 / float(limited.norm)
    before = {name: limited.moments[name].m.clone() for name in (*ROWS, *VECTORS)}
    for optimizer in (plain, limited):
        optimizer.update_(work_of(2), 1e-3)
    for name, m in before.items():
        unscaled = plain.moments[name].m - 0.9 * m
        torch.testing.assert_close(limited.moments[name].m - 0.9 * m, unscaled * scale, rtol=1e-3, atol=1e-6)
    wide = RowAdam(made(), clip=1e9)
    wide.update_(work_of(1), 1e-3)
    assert wide._scale() == 1.0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_a_saved_state_goes_on_to_the_bit(betas):
    whole, halves = made(), made()
    first, second = RowAdam(whole, betas=betas, clip=0.7), RowAdam(halves, betas=betas, clip=0.7)
    for step in range(3):
        first.update_(work_of(step, 10), 1e-3)
        second.update_(work_of(step, 10), 1e-3)
    kept = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert ("adam.encoder.fresh" in kept) == (betas[0] == 0) and "adam.log_threshold.v" in kept
    second = RowAdam(halves, betas=betas, clip=0.7)
    second.load_state_dict(kept)
    for step in range(3, 6):
        first.update_(work_of(step), 1e-3)
        second.update_(work_of(step), 1e-3)
    for name, weight in trained(whole).items():
        assert torch.equal(getattr(halves, name), weight), name


def test_the_gradient_of_b_dec_through_few_features_is_that_through_all():
    """One feature of thirty has a gradient: only its row is read."""
    params = made(log_threshold=False)
    work = work_of(3, active=1)
    work.vectors.clear()
    found = RowAdam(params)._vectors(work, by_feature(work.codes))["b_dec"]
    b_enc = torch.zeros(F).index_add_(0, work.codes.indices, work.value_grads)
    torch.testing.assert_close(found, work.error[0].sum(0) - b_enc @ params.encoder)


def test_the_average_follows_the_weights_and_ships_unit_rows():
    params = made()
    average = Average(params, 0.9)
    seen, mean = [params.W_dec.clone()], params.W_dec.clone()
    for step in range(20):
        params.W_dec.copy_(torch.nn.functional.normalize(params.W_dec + 0.1 * torch.randn(F, D), dim=1))
        average.update_(step)
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * params.W_dec
        seen.append(params.W_dec.clone())
    torch.testing.assert_close(average.params(unit_norm=False).W_dec, mean)
    shipped = average.params(unit_norm=True)
    torch.testing.assert_close(shipped.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(shipped.W_dec, torch.nn.functional.normalize(mean, dim=1))
    assert torch.equal(params.W_dec, seen[-1]) and torch.equal(shipped.b_enc, params.b_enc)


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("finetune", ["threshold", "decoder"])
def test_what_is_frozen_keeps_its_bits_and_the_rest_learns_as_it_would(finetune, betas, implementation):
    """The vectors' own Adam sees the same gradients: b_dec's still goes through b_enc's. So after a saved state too."""
    params, free = made(), made()
    params.encoder_low = params.encoder.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in trained(params).items()}
    optimizer, other = RowAdam(params, betas=betas, frozen=FROZEN[finetune]), RowAdam(free, betas=betas)
    optimizer.update_(work_of(0, 10), 1e-2, implementation=implementation)
    other.update_(work_of(0, 10), 1e-2, implementation=implementation)
    for name in before:
        was = before[name] if name in FROZEN[finetune] else getattr(free, name)
        assert torch.equal(getattr(params, name), was), name
    assert set(optimizer.moments) == {*ROWS, *(name for name in VECTORS if name not in FROZEN[finetune])}
    kept = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    resumed = made(seed=5)
    optimizer = RowAdam(resumed, betas=betas, frozen=FROZEN[finetune])
    for name, weight in trained(params).items():
        getattr(resumed, name).copy_(weight)
    resumed.encoder_low = params.encoder.to(torch.bfloat16)
    optimizer.load_state_dict(kept)
    optimizer.update_(work_of(1), 1e-2, implementation=implementation)
    for name in FROZEN[finetune]:
        assert torch.equal(getattr(resumed, name), before[name]), name
    assert torch.equal(resumed.encoder_low, before["encoder"].to(torch.bfloat16))


def test_a_captured_step_puts_frozen_rows_back_too():
    """On the CPU, in the words that are captured on a GPU; no shape or place changes between steps."""
    params = made(log_threshold=False)
    before = {name: weight.clone() for name, weight in trained(params).items()}
    places = {name: weight.data_ptr() for name, weight in trained(params).items()}
    loss = partial(topk.loss, k=3, variance=float(D), aux_coefficient=0.0)
    page = Objective(begin=None, loss=loss, encode=None)
    step = Captured(params, page, RowAdam(params, frozen=FROZEN["decoder"]), Dead(F, 2 * B))
    for number in range(3):
        step([torch.randn(B, D, generator=torch.Generator().manual_seed(number))], 1e-2, 0.0)
    for name, weight in trained(params).items():
        assert torch.equal(weight, before[name]) == (name in FROZEN["decoder"]), name
        assert weight.data_ptr() == places[name]
