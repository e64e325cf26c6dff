"""Every kernel equals its plain float32 twin: odd shapes, rows with nothing active, features that never fire, ties."""

import importlib

import pytest
import torch

from sae import kernels
from sae.codes import Codes, from_dense, from_topk
from sae.errors import UserError
from sae.kernels import Adam, RowGradients, Rule, Work
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
        monkeypatch.setattr(encoding, "TILE_BYTES", tile[1])
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


def test_batch_topk_finds_what_a_first_guess_hides(backend, monkeypatch):
    """The first tile is the strongest, or the weakest: the floor guessed from it must not decide."""
    monkeypatch.setattr(encoding, "ROWS", 64)
    monkeypatch.setattr(encoding, "TILE_BYTES", 64 * 128 * 4)
    x = torch.randint(0, 3, (192, 8), generator=torch.Generator().manual_seed(0)).float()
    for order in (torch.arange(512), torch.arange(512).flip(0)):
        encoder = (order[:, None] // 64 + torch.arange(8) % 2).float()
        fast = kernels.encode_select(x, encoder, torch.zeros(512), kernels.BatchTopK(3))
        plain = kernels.encode_select(x, encoder, torch.zeros(512), kernels.BatchTopK(3), implementation="plain")
        assert_same_codes(fast, plain)


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


@pytest.mark.parametrize("B,d,F,k", SHAPES)
def test_reconstruct_equals_the_plain_version(B, d, F, k):
    x, _, W_dec, _, b_dec = make(B, d, F)
    codes = codes_of(B, F, k)
    fast = kernels.reconstruct(codes, W_dec, b_dec, x)
    plain = kernels.reconstruct(codes, W_dec, b_dec, x, implementation="plain")
    torch.testing.assert_close(fast.error, plain.error, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.value_grads, plain.value_grads, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.squared, plain.squared, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("B,d,F,k", [*SHAPES, (64, 24, 1500, 6)])
@pytest.mark.parametrize("with_extra", [False, True])
def test_update_rows_equals_the_plain_version(B, d, F, k, with_extra):
    x, encoder, W_dec, _, _ = make(B, d, F)
    codes = codes_of(B, F, k)
    g = torch.Generator().manual_seed(3)
    value_grads = torch.randn(codes.values.shape[0], generator=g)
    error = torch.randn(B, d, generator=g)
    extra = None
    if with_extra:
        features = torch.tensor(sorted({0, F // 2, F - 1}))
        n = len(features)
        extra = RowGradients(features, torch.randn(n, d, generator=g), torch.randn(n, d, generator=g), torch.zeros(n))
    results = []
    for implementation in (None, "plain"):
        enc, dec, low = encoder.clone(), W_dec.clone(), encoder.to(torch.bfloat16)
        moments = tuple(Adam(torch.full_like(enc, 0.1), torch.full_like(enc, 0.2), step=7) for _ in range(2))
        kernels.update_rows(
            enc, dec, low, moments, Work(codes, x, error[None], value_grads, (F,), True, extra),
            kernels.by_feature(codes), Rule(1e-2, (0.9, 0.999), 1e-8), implementation=implementation,
        )  # fmt: skip
        results.append(
            {
                "encoder": enc,
                "W_dec": dec,
                "enc.m": moments[0].m,
                "enc.v": moments[0].v,
                "dec.m": moments[1].m,
                "dec.v": moments[1].v,
            }
        )
        assert torch.equal(low, enc.to(torch.bfloat16))
        torch.testing.assert_close(dec.norm(dim=1), torch.ones(F))
    for name in results[0]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_update_rows_follows_torch_adam_for_idle_rows_too():
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
