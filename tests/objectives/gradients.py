"""What the tests of objectives share: small parameters, and the dense gradients that a work stands for."""

import torch

from sae.objectives.terms import Params


def make(B=37, d=24, F=101, seed=0, unit_norm=True, **more):
    """Parameters and a batch of odd shapes; the decoder and the encoder differ, biases are not 0."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, d, generator=g)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if not unit_norm:
        W_dec *= 0.5 + torch.rand(F, 1, generator=g)
    params = Params(
        W_dec + 0.1 * torch.randn(F, d, generator=g),
        W_dec,
        0.1 * torch.randn(F, generator=g),
        torch.randn(d, generator=g),
        **more,
    )
    return params, torch.randn(B, d, generator=g) * 3


def some(n, F=101, seed=1):
    """A mask of n features."""
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:n]] = True
    return dead


def gradients(params, work):
    """Dense gradients of the work, as update_rows and RowAdam sum them."""
    rows, features = work.codes.rows(), work.codes.indices
    level = torch.searchsorted(torch.tensor(work.levels), features, right=True)
    d = {name: torch.zeros_like(getattr(params, name)) for name in ("encoder", "W_dec", "b_enc")}
    d["W_dec"].index_add_(0, features, work.codes.values[:, None] * work.error[level, rows])
    d["encoder"].index_add_(0, features, work.value_grads[:, None] * work.inputs[rows])
    d["b_enc"].index_add_(0, features, work.value_grads)
    if work.extra is not None:
        for name, gradient in d.items():
            gradient.index_add_(0, work.extra.features, getattr(work.extra, name))
    if work.every is not None:
        d["W_dec"] += work.every.along_decoder[:, None] * params.W_dec
        d["encoder"] += work.every.along_inputs[:, None] * work.every.inputs_sum
    d["b_enc"] += work.vectors.get("b_enc", 0)
    d["b_dec"] = work.error[0].sum(0)
    if work.subtracts_b_dec:
        d["b_dec"] -= d["b_enc"] @ params.encoder
    if "log_threshold" in work.vectors:
        d["log_threshold"] = work.vectors["log_threshold"]
    return d


def assert_equal(ours, expected, bound=1e-5):
    """Every gradient by its name, relative to its norm."""
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < bound, f"{name}: relative error {error:.2e}"
