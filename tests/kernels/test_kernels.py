"""Every kernel equals its plain float32 twin: odd shapes, rows with nothing active, features that never fire, ties."""

import importlib

import pytest
import torch

from sae import kernels
from sae.codes import Codes, from_dense, from_topk
from sae.errors import UserError
from sae.kernels import Adam, EveryRow, RowGradients, Rule, Work
from sae.kernels.encode_select import group_size
from sae.kernels.native import native

encoding = importlib.import_module("sae.kernels.encode_select")  # the package gives its function's name to the page

SHAPES = [(37, 24, 101, 5), (1, 8, 64, 1), (300, 16, 512, 4), (65, 24, 1024, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives NaN, so that unwritten memory cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    """The compiled kernels, and torch's where no compiler is."""
    if request.param == "torch":
        monkeypatch.setenv("GOLDENGATE_NATIVE", "0")
    elif native() is None:
        pytest.skip("no compiler on this machine")


def make(B, d, F, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, d, generator=g)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    encoder = torch.randn(F, d, generator=g)
    return (
        torch.randn(B, d, generator=g),
        encoder,
        W_dec,
        torch.randn(F, generator=g),
        torch.randn(d, generator=g),
    )


def codes_of(B, F, k, seed=0):
    """Codes with an empty row, a feature that never fires and strengths of every size."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(B, F, generator=g) * (torch.rand(B, F, generator=g) < k / F)
    dense[0] = 0
    dense[:, F - 1] = 0
    return from_dense(dense)


def exact_inputs(B, d, F, kind, dtype):
    """x, encoder, b_enc whose product is exact in every format and order of summation, so that codes can be equal."""
    g = torch.Generator().manual_seed(F)
    if kind == "equal":
        return torch.ones(B, d), torch.ones(F, d, dtype=dtype), torch.zeros(F)
    if kind == "negative":
        return torch.ones(B, d), -torch.randint(1, 4, (F, d), generator=g).to(dtype), torch.zeros(F)
    top = 2 if kind == "ties" else 4
    x = torch.randint(1 - top, top, (B, d), generator=g).float()
    encoder = torch.randint(1 - top, top, (F, d), generator=g).to(dtype)
    return x, encoder, torch.zeros(F) if kind == "ties" else torch.randn(F, generator=g)


def selections(F, k):
    floor = torch.randn(F, generator=torch.Generator().manual_seed(5)) + 4
    return kernels.TopK(k), kernels.BatchTopK(k), kernels.Above(floor)


def assert_same_codes(got, wanted):
    assert torch.equal(got.offsets, wanted.offsets)
    assert torch.equal(got.indices, wanted.indices)
    assert torch.equal(got.values, wanted.values)
    assert got.n_features == wanted.n_features


@pytest.mark.parametrize("tile", [None, (16, 4096), (7, 1300)], ids=["one tile", "tiles", "odd tiles"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "B,F,k", [(37, 101, 5), (1, 64, 1), (65, 1024, 2), (4, 50, 50), (9, 33, 40), (64, 2000, 64), (3, 4096, 32)]
)
def test_encode_select_keeps_exactly_what_the_plain_version_keeps(B, F, k, dtype, kind, tile, backend, monkeypatch):
    if tile:
        monkeypatch.setattr(encoding, "ROWS", tile[0])
        monkeypatch.setattr(encoding, "TORCH_ROWS", tile[0])
        monkeypatch.setattr(encoding, "TILE_BYTES", tile[1])
        monkeypatch.setattr(encoding, "_ENTRIES", 10)
    x, encoder, b_enc = exact_inputs(B, 8, F, kind, dtype)
    for select in selections(F, k):
        fast = kernels.encode_select(x, encoder, b_enc, select)
        assert_same_codes(fast, kernels.encode_select(x, encoder, b_enc, select, implementation="plain"))


@pytest.mark.parametrize("B,d,F,k", SHAPES)
def test_encode_select_computes_the_product(B, d, F, k, backend):
    x, encoder, _, b_enc, _ = make(B, d, F)
    fast = kernels.encode_select(x, encoder, b_enc, kernels.TopK(k))
    pre = (x.double() @ encoder.double().T + b_enc).topk(k, dim=1).values.relu()
    torch.testing.assert_close(
        fast.values.view(B, k).sort(dim=1, descending=True).values.double(), pre, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("guess", [0.0, 1e9])
def test_batch_topk_is_exact_whatever_the_guess(guess, backend, monkeypatch):
    """Too low, tiles raise the floor as they come, the weakest first or the strongest; too high, all is done again."""
    monkeypatch.setattr(encoding, "ROWS", 64)
    monkeypatch.setattr(encoding, "TORCH_ROWS", 64)
    monkeypatch.setattr(encoding, "TILE_BYTES", 64 * 128 * 4)
    monkeypatch.setattr(encoding, "_guess", lambda *_: torch.tensor(guess))
    x = torch.randint(0, 3, (192, 8), generator=torch.Generator().manual_seed(0)).float()
    for order in (torch.arange(512), torch.arange(512).flip(0)):
        encoder = (order[:, None] // 64 + torch.arange(8) % 2).float()
        fast = kernels.encode_select(x, encoder, torch.zeros(512), kernels.BatchTopK(3))
        plain = kernels.encode_select(x, encoder, torch.zeros(512), kernels.BatchTopK(3), implementation="plain")
        assert_same_codes(fast, plain)


def test_weights_may_be_a_part_of_a_larger_matrix(backend):
    x, encoder, b_enc = exact_inputs(9, 8, 200, "distinct", torch.float32)
    for select in selections(100, 3):
        got = kernels.encode_select(x, encoder[50:150], b_enc[50:150], select)
        assert_same_codes(got, kernels.encode_select(x, encoder[50:150].clone(), b_enc[50:150].clone(), select))


def test_no_rows_give_no_codes(backend):
    for select in selections(64, 4):
        codes = kernels.encode_select(torch.zeros(0, 8), torch.zeros(64, 8), torch.zeros(64), select)
        assert codes.offsets.tolist() == [0] and len(codes.values) == len(codes.indices) == 0


def test_nan_counts_as_the_largest_and_infinity_as_itself(backend):
    x, encoder, b_enc = exact_inputs(5, 8, 300, "distinct", torch.float32)
    b_enc[7], b_enc[11] = torch.inf, -torch.inf
    codes = kernels.encode_select(x, encoder, b_enc, kernels.TopK(300))
    assert torch.equal(codes.dense()[:, [7, 11]], torch.tensor([torch.inf, 0.0]).expand(5, 2))
    b_enc[20] = torch.nan
    codes = kernels.encode_select(x, encoder, b_enc, kernels.TopK(2))
    assert codes.indices.view(5, 2).tolist() == [[7, 20]] * 5
    assert not codes.values.isfinite().any()


def test_codes_do_not_depend_on_the_number_of_threads(backend):
    x, encoder, _, b_enc, _ = make(300, 16, 512)
    threads = torch.get_num_threads()
    for select in selections(512, 4):
        made = []
        try:
            for number in (1, 2):
                torch.set_num_threads(number)
                made.append(kernels.encode_select(x, encoder, b_enc, select))
        finally:
            torch.set_num_threads(threads)
        assert_same_codes(*made)


def test_groups_are_used_where_they_pay():
    assert group_size(16384, 32) >= 16
    assert group_size(101, 5) == 1


@pytest.mark.parametrize("B,d,F,k", SHAPES)
def test_decode_equals_the_plain_version(B, d, F, k):
    _, _, W_dec, _, b_dec = make(B, d, F)
    codes = codes_of(B, F, k)
    fast = kernels.decode(codes, W_dec, b_dec)
    torch.testing.assert_close(fast, kernels.decode(codes, W_dec, b_dec, implementation="plain"), rtol=1e-5, atol=1e-6)
    assert torch.equal(fast[0], b_dec)


def test_decode_refuses_codes_of_another_width():
    with pytest.raises(UserError, match="99 features, the decoder 101"):
        kernels.decode(codes_of(4, 99, 3), torch.zeros(101, 8), torch.zeros(8))


LEVELS = {"one level": lambda F: None, "levels": lambda F: (F // 8, F // 3, F // 3 + 1, F)}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("B,d,F,k", SHAPES)
def test_reconstruct_equals_the_plain_version(B, d, F, k, levels, backend):
    x, _, W_dec, _, b_dec = make(B, d, F)
    ends, codes = LEVELS[levels](F), codes_of(B, F, k)
    weights = None if ends is None else (0.5, 2.0, 0.0, 1.0)
    fast = kernels.reconstruct(codes, W_dec, b_dec, x, levels=ends, weights=weights)
    in_double = codes_in_double(codes), W_dec.double(), b_dec.double(), x.double()
    plain = kernels.reconstruct(*in_double, levels=ends, weights=weights, implementation="plain")
    for name in ("error", "value_grads", "squared"):
        got, wanted = getattr(fast, name), getattr(plain, name)
        torch.testing.assert_close(
            got.double(), wanted.double(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def codes_in_double(codes):
    return Codes(codes.values.double(), codes.indices, codes.offsets, codes.n_features)


def test_long_sums_keep_float32_gradients_within_1e5_of_float64(backend):
    """A feature that fires in every row, a row in which every feature fires."""
    B, d, F = 4096, 8, 300
    x, encoder, W_dec, _, b_dec = make(B, d, F)
    dense = torch.zeros(B, F)
    dense[:, 7] = torch.rand(B, generator=torch.Generator().manual_seed(1)) + 1
    dense[5] = 1
    codes = from_dense(dense)
    made = kernels.reconstruct(codes, W_dec, b_dec, x)
    truth = (dense.double() @ W_dec.double() + b_dec.double()) - x.double()
    grads = (truth @ W_dec.double().T)[codes.rows(), codes.indices]
    assert (made.error[0] - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (made.value_grads - grads).abs().max() < 1e-5 * grads.abs().max()
    moments = fresh_moments(encoder, 0.9)
    work = Work(codes, x, made.error, made.value_grads, (F,), True)
    rule = Rule(1e-3, (0.9, 0.999), 1e-8, unit_norm=False)
    squared = kernels.update_rows(encoder, W_dec, None, moments, work, kernels.by_feature(codes), rule)
    sparse_grads = torch.zeros(B, F, dtype=torch.float64).index_put_((codes.rows(), codes.indices), grads)
    for state, wanted in zip(moments, (sparse_grads.T @ x.double(), dense.double().T @ truth), strict=True):
        assert (state.m.double() / (1 - 0.9) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        squared -= wanted.square().sum()
    assert squared.abs() < 1e-4 * wanted.square().sum()


def fresh_moments(weight, beta1):
    """Of encoder and decoder before the first step; `step` is already that of the first."""
    m = [torch.zeros_like(weight) if beta1 else None for _ in range(2)]
    fresh = [None if beta1 else torch.zeros(len(weight), dtype=torch.int32) for _ in range(2)]
    return tuple(Adam(m[i], torch.zeros_like(weight), 1, fresh[i]) for i in range(2))


@pytest.mark.parametrize("B,F,k", [(37, 101, 5), (300, 64, 8)])
def test_by_feature_is_a_stable_transposition(B, F, k):
    codes = codes_of(B, F, k)
    transposed = kernels.by_feature(codes)
    rebuilt = torch.zeros(F, B)
    for feature in range(F):
        span = slice(transposed.offsets[feature], transposed.offsets[feature + 1])
        rows = transposed.rows[span]
        assert torch.equal(rows, rows.sort().values)
        rebuilt[feature, rows] = codes.values[transposed.order[span]]
    assert torch.equal(rebuilt.T, codes.dense())


def parts(F, d, generator, kind):
    """What an objective may add to the sparse gradients."""
    extra, every = None, None
    if "extra" in kind:
        features = torch.arange(F) if kind == "dense extra" else torch.tensor(sorted({0, F // 2, F - 1}))
        n = len(features)
        rows = torch.randn(2, n, d, generator=generator)
        extra = RowGradients(features, rows[0], rows[1], torch.zeros(n))
    if "every" in kind:
        along = torch.randn(2, F, generator=generator)
        every = EveryRow(along[0], along[1], torch.randn(d, generator=generator))
    return extra, every


RULES = {
    "unit norm": Rule(1e-2, (0.9, 0.999), 1e-8),
    "free norm": Rule(1e-2, (0.9, 0.999), 1e-8, unit_norm=False),
    "scaled": Rule(1e-2, (0.9, 0.999), 1e-8, scale=0.3),
    "no momentum": Rule(1e-2, (0.0, 0.999), 1e-8),
}


@pytest.mark.parametrize("B,d,F,k", [*SHAPES, (64, 27, 1500, 6), (5, 1, 9, 2)])
@pytest.mark.parametrize("kind", ["sparse", "extra", "dense extra", "every", "extra and every"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", LEVELS)
def test_update_rows_equals_the_plain_version(B, d, F, k, kind, rule, levels, backend):
    x, encoder, W_dec, _, _ = make(B, d, F)
    codes, ends = codes_of(B, F, k), LEVELS[levels](F) or (F,)
    g = torch.Generator().manual_seed(3)
    value_grads = torch.randn(codes.values.shape[0], generator=g)
    error = torch.randn(len(ends), B, d, generator=g)
    extra, every = parts(F, d, g, kind)
    work = Work(codes, x, error, value_grads, ends, True, extra, every)
    results = []
    for implementation in (None, "plain"):
        enc, dec, low = encoder.clone(), W_dec.clone(), encoder.to(torch.bfloat16)
        moments = fresh_moments(enc, RULES[rule].betas[0])
        for state in moments:
            state.step = 7
            state.v += 0.2
            if state.m is not None:
                state.m += 0.1
            if state.fresh is not None:
                state.fresh += 6 - torch.arange(F, dtype=torch.int32) % 4  # some rows were idle for up to 3 steps
        norm = kernels.update_rows(
            enc, dec, low, moments, work, kernels.by_feature(codes), RULES[rule], implementation=implementation
        )
        if RULES[rule].betas[0] == 0:
            for state in moments:  # bring idle rows up to date, as the next use of each would
                state.v *= 0.999 ** (7 - state.fresh)[:, None]
        results.append({"encoder": enc, "W_dec": dec, "norm": norm, "enc.v": moments[0].v, "dec.v": moments[1].v})
        if moments[0].m is not None:
            results[-1] |= {"enc.m": moments[0].m, "dec.m": moments[1].m}
        assert torch.equal(low, enc.to(torch.bfloat16))
        if RULES[rule].unit_norm:
            torch.testing.assert_close(dec.norm(dim=1), torch.ones(F))
    for name in results[0]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_without_momentum_300_steps_equal_torch_adam_and_idle_rows_are_not_touched(backend):
    """Rows fire every step, at times, once, or never; v decays lazily and the result is the same."""
    F, d, rule = 40, 6, Rule(1e-2, (0.0, 0.999), 1e-8)
    g = torch.Generator().manual_seed(0)
    start = torch.randn(F, d, generator=g)
    weight = torch.nn.Parameter(start.clone())
    reference = torch.optim.Adam([weight], lr=rule.lr, betas=rule.betas, eps=rule.eps)
    encoder, W_dec, moments = start.clone(), torch.nn.functional.normalize(torch.ones(F, d)), fresh_moments(start, 0)
    for step in range(300):
        indices = torch.tensor([[3, 5 + step % 7, 20 if step == 10 else 30]] * 2)
        x = torch.randn(2, d, generator=g)
        codes = from_topk(torch.ones(2, 3), indices, F)
        before = moments[0].v.clone()
        for state in moments:
            state.step = step + 1
        work = Work(codes, x, torch.zeros(1, 2, d), torch.ones(6), (F,), True)
        kernels.update_rows(encoder, W_dec, None, moments, work, kernels.by_feature(codes), rule)
        weight.grad = torch.zeros(F, d).index_add_(0, indices.flatten(), x.repeat_interleave(3, 0))
        reference.step()
        if native():
            idle = torch.ones(F, dtype=torch.bool).index_fill_(0, indices[0], False)
            assert torch.equal(moments[0].v[idle], before[idle])
    torch.testing.assert_close(encoder, weight.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(encoder[39], start[39])


def test_bfloat16_copies_round_as_torch_does(backend):
    """Ties to even, infinity and NaN, in a row that does not move."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -0.0, 3e38, torch.inf, torch.nan, -2.5])
    encoder, low = ties.expand(3, 8).clone(), torch.zeros(3, 8, dtype=torch.bfloat16)
    codes = from_topk(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), 3)
    work = Work(codes, torch.zeros(1, 8), torch.zeros(1, 1, 8), torch.zeros(1), (3,), True)
    W_dec = torch.nn.functional.normalize(torch.ones(3, 8))
    kernels.update_rows(
        encoder, W_dec, low, fresh_moments(encoder, 0.9), work, kernels.by_feature(codes), RULES["unit norm"]
    )
    torch.testing.assert_close(low, ties.expand(3, 8).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_gradients_do_not_depend_on_the_number_of_threads(backend):
    B, d, F, k = 300, 24, 500, 6
    x, encoder, W_dec, _, b_dec = make(B, d, F)
    codes, threads, results = codes_of(B, F, k), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            made = kernels.reconstruct(codes, W_dec, b_dec, x, levels=(100, F))
            enc, dec, moments = encoder.clone(), W_dec.clone(), fresh_moments(encoder, 0.9)
            work = Work(codes, x, made.error, made.value_grads, (100, F), True)
            norm = kernels.update_rows(enc, dec, None, moments, work, kernels.by_feature(codes), RULES["unit norm"])
            results.append((made.error, made.value_grads, made.squared, enc, dec, moments[1].v, norm))
    finally:
        torch.set_num_threads(threads)
    if native():  # torch's own sums may differ
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_update_rows_follows_torch_adam_for_idle_rows_too(backend):
    """A feature that fires once goes on moving as torch.optim.Adam moves it."""
    weight = torch.nn.Parameter(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    reference = torch.optim.Adam([weight], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    encoder, W_dec = weight.detach().clone(), torch.nn.functional.normalize(torch.ones(40, 6))
    moments = (Adam(torch.zeros(40, 6), torch.zeros(40, 6)), Adam(torch.zeros(40, 6), torch.zeros(40, 6)))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for step in range(30):
        values = torch.ones(3, 1)
        indices = torch.full((3, 1), 5 if step == 0 else 7)
        codes = from_topk(values, indices, 40)
        for state in moments:
            state.step += 1
        kernels.update_rows(
            encoder, W_dec, None, moments, Work(codes, x, torch.zeros(1, 3, 6), torch.ones(3), (40,), True),
            kernels.by_feature(codes), Rule(1e-2, (0.9, 0.999), 1e-8),
        )  # fmt: skip
        weight.grad = torch.zeros(40, 6)
        weight.grad[indices[0, 0]] = x.sum(0)
        reference.step()
    torch.testing.assert_close(encoder, weight.detach(), rtol=1e-5, atol=1e-6)


def test_codes_round_trip_through_dense():
    codes = codes_of(9, 30, 4)
    assert isinstance(codes, Codes)
    assert torch.equal(from_dense(codes.dense()).dense(), codes.dense())
    assert codes.l0()[0] == 0
