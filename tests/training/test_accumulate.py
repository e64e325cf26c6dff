"""Work of several batches in one update: the gradients of one batch as large as all of them."""

import torch

from sae.codes import Codes
from sae.kernels import EveryRow, RowGradients, Work
from sae.objectives import topk
from sae.objectives.terms import Losses, initial
from sae.training.accumulate import joined, mean_losses
from sae.training.optimizer import RowAdam, trained
from tests.training.test_training import planted


def test_two_batches_update_as_one_of_twice_the_size():
    x = planted(128)[0]
    constants = {"k": 4, "variance": 20.0, "aux_coefficient": 0.0}
    updated = []
    for parts in (x.split(64), (x,)):
        params = initial(x, d_sae=80, seed=0, low=False)
        nobody = torch.zeros(80, dtype=torch.bool)
        works, losses = zip(*(topk.loss(params, part, nobody, **constants) for part in parts), strict=True)
        work = joined(works)
        assert work.codes.n_rows == 128 and work.error.shape == (1, 128, 24)
        optimizer = RowAdam(params)
        for _ in range(2):
            optimizer.update_(work, 1e-2)
        updated.append((params, mean_losses(losses).mse, optimizer.norm))
    (two, mse_two, norm_two), (one, mse_one, norm_one) = updated
    torch.testing.assert_close(mse_two, mse_one)
    torch.testing.assert_close(norm_two, norm_one)
    for name, weight in trained(one).items():
        torch.testing.assert_close(getattr(two, name), weight, rtol=1e-4, atol=1e-5, msg=name)


def dense(work):
    """The encoder's and decoder's gradients of a Work whose codes are empty."""
    d_enc, d_dec = torch.zeros(5, 3), torch.zeros(5, 3)
    d_enc.index_add_(0, work.extra.features, work.extra.encoder)
    d_dec.index_add_(0, work.extra.features, work.extra.W_dec)
    return d_enc + work.every.along_inputs[:, None] * work.every.inputs_sum, d_dec, work.every.along_decoder


def test_dense_shares_are_averaged_though_their_features_differ():
    g = torch.Generator().manual_seed(0)
    along = torch.randn(5, generator=g)
    works = []
    for features in ([0, 2], [2, 4]):
        rows = [torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g), torch.randn(2, generator=g)]
        codes = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), 5)
        extra = RowGradients(torch.tensor(features), *rows)
        every = EveryRow(torch.randn(5, generator=g), along, torch.randn(3, generator=g))
        vectors = {"b_enc": torch.randn(5, generator=g)}
        inputs, error = torch.randn(4, 3, generator=g), torch.randn(1, 4, 3, generator=g)
        works.append(Work(codes, inputs, error, torch.zeros(0), (5,), False, extra, every, vectors))
    both = joined(works)
    assert both.extra is not None and both.extra.features.tolist() == [0, 2, 4]
    for mine, first, second in zip(dense(both), dense(works[0]), dense(works[1]), strict=True):
        torch.testing.assert_close(mine, (first + second) / 2)
    torch.testing.assert_close(both.vectors["b_enc"], (works[0].vectors["b_enc"] + works[1].vectors["b_enc"]) / 2)


def test_losses_are_means_and_whoever_fired_fired():
    one, two = torch.tensor(1.0), torch.tensor(3.0)
    fired = [torch.tensor([True, False, False]), torch.tensor([False, False, True])]
    losses = [Losses(v, v, v, None, f, {"a": v}) for v, f in zip((one, two), fired, strict=True)]
    mean = mean_losses(losses)
    assert mean.mse == 2 and mean.more["a"] == 2 and mean.sparsity is None
    assert mean.fired is not None and mean.fired.tolist() == [True, False, True]
