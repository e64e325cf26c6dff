"""The dense path is the sparse one by other products: same work, same figures; the batch decides which one runs."""

import pytest
import torch

from sae.objectives import dense, elementwise, jumprelu, relu
from sae.objectives.jumprelu import Form
from tests.objectives.gradients import assert_equal, gradients, make, some

DEAD = some(0)
LOSSES = {
    "relu": lambda p, x, **path: relu.loss(p, x, DEAD, 1.0, coefficient=5.0, warm_up=0.05, **path),
    **{
        mode: lambda p, x, mode=mode, **path: jumprelu.loss(
            p, x, DEAD, 1.0, form=Form(mode, 1.3, 0.1, 3.0, 0.5, k=20, pre_act_coefficient=0.3), **path
        )
        for mode in ("tanh", "step", "quadratic")
    },
}


def made(low=False):
    params, x = make(unit_norm=False)
    params.log_threshold = 0.4 + 0.2 * torch.randn(101, generator=torch.Generator().manual_seed(2))
    params.encoder_low = params.encoder.to(torch.bfloat16) if low else None
    return params, x


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("chunk", [101 * 7, dense.CHUNK])
@pytest.mark.parametrize("name", LOSSES)
def test_both_paths_give_the_same_work_and_the_same_figures(name, chunk, low, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    params, x = made(low)
    sparse_work, sparse = LOSSES[name](params, x, dense=False)
    dense_work, other = LOSSES[name](params, x, dense=True)
    assert_equal(gradients(params, dense_work), {k: g.double() for k, g in gradients(params, sparse_work).items()})
    assert dense_work.codes.values.numel() == 0 and dense_work.codes.n_rows == 37
    assert torch.equal(sparse.fired, other.fired)
    assert sparse.more.keys() == other.more.keys()
    for one, two in [
        (sparse.mse, other.mse),
        (sparse.fvu, other.fvu),
        (sparse.sparsity, other.sparsity),
        *((sparse.more[key], other.more[key]) for key in sparse.more),
    ]:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_path_follows_the_density_of_the_batch_and_nothing_else(monkeypatch):
    params, x = made()
    assert LOSSES["relu"](params, x)[0].codes.values.numel() == 0  # half of the entries are positive
    params.b_enc -= 7
    work, losses = LOSSES["relu"](params, x)
    assert 0 < work.codes.values.numel() < dense.SPARSE_BELOW * 37 * 101
    assert float(losses.more["metrics/density"]) == pytest.approx(work.codes.values.numel() / (37 * 101))
    # the rows that tell are spread over the batch: some that differ at its beginning do not decide
    monkeypatch.setattr(elementwise, "PROBE", 5)
    x[5:] *= 50
    assert LOSSES["relu"](params, x)[0].codes.values.numel() == 0
