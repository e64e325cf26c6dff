"""Every Triton kernel against the plain version, as plain functions: interpreted on any machine, real on a GPU.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_cases      one JSON line a case: {"name", "seconds", "error"}

tests/kernels/test_triton_interpret.py runs that; tests/gpu and experiments/bench/gpu.py call CASES with "cuda". No
pytest here, because a GPU machine may have none. Shapes are small: the interpreter takes 0.1 ms an operation.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes, from_dense
from sae.kernels import Above, Adam, BatchTopK, EveryRow, RowGradients, Rule, Select, TopK, Work, triton
from sae.kernels.triton import by_feature as by_feature_page
from sae.kernels.triton import decode as decode_page
from sae.kernels.triton import encode_select as encode_select_page
from sae.kernels.triton import product as product_page
from sae.kernels.triton import reconstruct as reconstruct_page
from sae.kernels.triton import tuned
from sae.kernels.triton import update_rows as update_rows_page
from sae.objectives import Objective, Params, topk
from sae.training import capture, loop
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam

B, d, F, k = 6, 24, 200, 5
"""200 features are four groups, the last of 8 columns."""
TRAINED = 24
"""Features in the test of whole steps."""
FEW = 10
"""Features in the tests of updates, which take a program for each."""


def normal(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def codes_of(device: str, *, features: int = F, hot: int | None = None) -> Codes:
    """Rows of 0 to 20 entries, a feature that never fires and, if asked, one that fires in every row."""
    generator = torch.Generator().manual_seed(7)
    dense = torch.rand(B, features, generator=generator)
    dense *= torch.rand(B, features, generator=generator) < k / features
    dense[1] = torch.rand(features, generator=generator) * (torch.arange(features) % 10 == 3)
    dense[0] = dense[:, -1] = 0
    if hot is not None:
        dense[:, hot] = 1 + torch.arange(B)
    return from_dense(dense.to(device))


def same(found: Tensor, plain: Tensor, name: str, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.float(), plain.float(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


class Settings:
    """tuned.json's entries of one kernel changed for a while."""

    def __init__(self, kernel: str, **changed):
        self.kernel, self.changed = kernel, changed

    def __enter__(self):
        self.before = tuned.table()[self.kernel]
        everywhere = [entry | self.changed for entry in self.before["default"]]
        tuned.table()[self.kernel] = {"default": everywhere}

    def __exit__(self, *_):
        tuned.table()[self.kernel] = self.before


# ---- encode_select ---------------------------------------------------------------------------------------


def selection(
    device: str, *, select: str, count: int = k, one_chunk: bool = True, library: bool = True, ties: bool = False,
    dtype: torch.dtype = torch.float32, most: int = encode_select_page.MOST,
) -> None:  # fmt: skip
    """Small fractions make every product exact, so that indices must be equal; with `ties` equal entries abound."""
    x, encoder, b_enc = normal(B, d, seed=0, device=device), normal(F, d, seed=1, device=device), torch.zeros(F)
    if ties:
        x, encoder = x.sign(), encoder.sign()
    else:
        b_enc = normal(F, seed=2, device=device).mul(8).round().div(8)
        x, encoder = x.mul(8).round().div(8), encoder.mul(8).round().div(8)
    encoder, b_enc = encoder.to(dtype), b_enc.to(device)
    rule: Select = {"topk": TopK(count), "batch": BatchTopK(count), "above": Above(b_enc.abs() + 4.0)}[select]
    before = product_page.CHUNK_BYTES, encode_select_page.MOST
    try:
        encode_select_page.MOST = most
        if not one_chunk:
            product_page.CHUNK_BYTES = 4 * 256 * encoder.element_size()  # four rows, then two
        tiles = {"BLOCK_B": 16, "BLOCK_F": 128, "BLOCK_D": 16, "BAND": 2}
        with Settings("product", library=library, **tiles), Settings("summary", GROUPS=4):
            if not library:
                product_page.ALWAYS_LIBRARY = ()
            found = encode_select_page.encode_select(x, encoder, b_enc, rule)
    finally:
        product_page.CHUNK_BYTES, encode_select_page.MOST = before
        product_page.ALWAYS_LIBRARY = (torch.float32,)
    on_cpu = Above(rule.floor.cpu()) if isinstance(rule, Above) else rule
    plain = kernels.encode_select(x.cpu(), encoder.cpu(), b_enc.cpu(), on_cpu, implementation="plain")
    assert found.n_features == F
    assert torch.equal(found.offsets.cpu(), plain.offsets), "offsets"
    assert torch.equal(found.indices.cpu(), plain.indices), "indices"
    same(found.values.cpu(), plain.values, "values", 1e-6)


# ---- the others ------------------------------------------------------------------------------------------


def transposition(device: str) -> None:
    codes = codes_of(device, hot=3)
    found, plain = by_feature_page.by_feature(codes), kernels.by_feature(codes_of("cpu", hot=3))
    for name in ("order", "rows", "offsets"):
        assert torch.equal(getattr(found, name).cpu(), getattr(plain, name)), name


def decoding(device: str) -> None:
    codes, W_dec, b_dec = codes_of(device), normal(F, d, seed=1, device=device), normal(d, seed=2, device=device)
    with Settings("decode", BLOCK_K=8, BLOCK_D=16):
        found = decode_page.decode(codes, W_dec, b_dec)
    same(found, kernels.decode(codes, W_dec, b_dec, implementation="plain"), "decoded")
    assert torch.equal(found[0], b_dec), "a row with nothing active is b_dec"


def reconstruction(device: str, *, levels: tuple[int, ...], weights: tuple[float, ...]) -> None:
    codes, W_dec, b_dec = codes_of(device), normal(F, d, seed=1, device=device), normal(d, seed=2, device=device)
    target = normal(B, d, seed=3, device=device)
    with Settings("reconstruct", BLOCK_K=8, BLOCK_D=16):
        found = reconstruct_page.reconstruct(codes, W_dec, b_dec, target, levels, weights)
    plain = kernels.reconstruct(codes, W_dec, b_dec, target, levels=levels, weights=weights, implementation="plain")
    for name in ("error", "value_grads", "squared"):
        same(getattr(found, name), getattr(plain, name), name)


def updating(
    device: str, *, beta1: float = 0.9, low: torch.dtype | None = None, hot: bool = False, extra: bool = False,
    every: bool = False, levels: tuple[int, ...] = (FEW,), unit_norm: bool = True, on_device: bool = False,
) -> None:  # fmt: skip
    """Three steps, so that moments, idle rows and what is late in v all count. `on_device`: rates as tensors there."""
    results = []
    for plain in (False, True):
        encoder, W_dec = normal(FEW, d, seed=1, device=device), normal(FEW, d, seed=2, device=device)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        copy = None if low is None else encoder.to(low)
        fresh = torch.zeros(FEW, dtype=torch.int32, device=device)
        moments = tuple(
            Adam(
                torch.full_like(encoder, 0.1) if beta1 else None,
                torch.full_like(encoder, 0.2),
                fresh=None if beta1 else fresh.clone(),
            )
            for _ in range(2)
        )
        total = 0.0
        for step in range(1, 4):
            codes = codes_of(device, features=FEW, hot=step if hot else None)
            work = work_of(codes, step, device, levels, extra, every)
            lr = 1e-2
            for state in moments:
                state.step = step
            if on_device and not plain:
                lr = torch.tensor(lr, dtype=torch.float64, device=device)
                for state in moments:
                    state.step = torch.tensor(float(step), dtype=torch.float64, device=device)
            rule = Rule(lr, (beta1, 0.999), 1e-8, unit_norm, 0.7)
            args = (encoder, W_dec, copy, moments, work, kernels.by_feature(codes), rule)
            if plain:
                total += float(kernels.update_rows(*args, implementation="plain"))
            else:
                before = update_rows_page.LIMIT
                try:
                    update_rows_page.LIMIT = 4 if hot else before
                    total += float(update_rows_page.update_rows(*args))
                finally:
                    update_rows_page.LIMIT = before
        made = {"encoder": encoder, "W_dec": W_dec, "squared": torch.tensor(total)}
        for state, name in zip(moments, ("encoder", "W_dec"), strict=True):
            late = 0.999 ** (3 - fresh_of(state, device).double()).float()[:, None]
            made |= {f"{name}.v": state.v * late}
            made |= {f"{name}.m": state.m} if state.m is not None else {}
        if copy is not None:
            assert torch.equal(copy, encoder.to(low)), "the low copy is the encoder, rounded"
        results.append(made)
    # gradients from rounded inputs and errors differ by the rounding; Adam turns that into as much of a step
    tolerance = 1e-5 if low is None else 4e-3
    for name, value in results[1].items():
        same(results[0][name], value, name, tolerance if name != "squared" else max(tolerance, 1e-4))


def fresh_of(state: Adam, device: str) -> Tensor:
    return torch.full((FEW,), 3, device=device) if state.fresh is None else state.fresh


def work_of(codes: Codes, step: int, device: str, levels: tuple[int, ...], extra: bool, every: bool) -> Work:
    grads = normal(codes.values.shape[0], seed=10 + step, device=device)
    error = normal(len(levels), B, d, seed=20 + step, device=device)
    rows = more = None
    if extra:
        features = torch.tensor([0, 7, FEW - 1], device=device)
        rows = RowGradients(
            features, *(normal(3, d, seed=30 + i, device=device) for i in range(2)), torch.zeros(3, device=device)
        )
    if every:
        more = EveryRow(*(normal(n, seed=40 + i, device=device) for i, n in enumerate((FEW, FEW, d))))
    return Work(codes, normal(B, d, seed=step, device=device), error, grads, levels, True, rows, more)


# ---- whole training steps -----------------------------------------------------------------------------------


def training(device: str, *, steps: int = 5, room: int = 8, clip: float = 0.0) -> None:
    """`Captured` against `learn` on the CPU: some features dead from the start, then more, one step after the other."""
    made = []
    for there, captured in ((device, True), ("cpu", False)):
        W_dec = normal(TRAINED, d, seed=1, device=there)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        b_enc = normal(TRAINED, seed=2, device=there)
        b_enc[::3] -= 9  # these never fire
        params = Params(W_dec.clone(), W_dec, b_enc, normal(d, seed=3, device=there) / 9)
        loss = partial(topk.loss, k=k, variance=float(d), aux_coefficient=1 / 32)
        trained = Objective(begin=None, loss=loss, encode=None)  # type: ignore[arg-type] - only the loss is asked
        optimizer, dead = RowAdam(params, clip=clip), Dead(TRAINED, 2 * B, there)
        dead.since[::6] = 100
        step: loop.Learn = partial(loop.learn, params, trained, optimizer, dead)
        with rooms(room), kernels_on(there if captured else None):
            if captured:
                step = capture.Captured(params, trained, optimizer, dead)
            for number in range(steps):
                x = normal(B, d, seed=100 + number, device=there)
                _, losses = step([x], 1e-3 * (number + 1), number / steps)
        made.append({**vars(params), "since": dead.since, "mse": losses.mse, "aux": losses.aux, "norm": optimizer.norm})
    found, plain = made
    assert found["aux"] > 0, "dead features were at work"
    for name, value in plain.items():
        if value is not None:
            # Adam makes a whole step of a gradient's sign, however small; another device rounds otherwise
            same(found[name].cpu(), value, name, 2e-5 if device == "cpu" else 2e-3)


@contextmanager
def rooms(room: int):
    """Captured begins with that much room and looks again at every second step."""
    before = capture.EVERY, capture.ROOMS
    capture.EVERY, capture.ROOMS = 2, (room, 2 * room, TRAINED)
    try:
        yield
    finally:
        capture.EVERY, capture.ROOMS = before


@contextmanager
def kernels_on(device: str | None):
    """On the CPU too the pages choose Triton, which interprets; not with None."""
    takes = triton.takes
    if device == "cpu":
        triton.takes = lambda tensor: True
    try:
        yield
    finally:
        triton.takes = takes


CASES: dict[str, Callable[..., None]] = {
    "topk": partial(selection, select="topk"),
    "topk in chunks": partial(selection, select="topk", one_chunk=False),
    "topk of more than there are groups": partial(selection, select="topk", count=70),
    "topk of everything": partial(selection, select="topk", count=F),
    "topk of many by a sort": partial(selection, select="topk", count=90, most=128),
    "topk ties of many by a sort": partial(selection, select="topk", count=90, most=128, ties=True),
    "topk ties": partial(selection, select="topk", ties=True),
    "topk by the fused kernel": partial(selection, select="topk", library=False),
    "above by the fused kernel": partial(selection, select="above", library=False),
    "batch topk": partial(selection, select="batch"),
    "batch topk in chunks": partial(selection, select="batch", one_chunk=False),
    "batch topk ties in chunks": partial(selection, select="batch", one_chunk=False, ties=True),
    "batch topk of more than is positive": partial(selection, select="batch", count=150),
    "above": partial(selection, select="above"),
    "above in chunks": partial(selection, select="above", one_chunk=False),
    "by feature": transposition,
    "decode": decoding,
    "reconstruct": partial(reconstruction, levels=(F,), weights=(1.0,)),
    "reconstruct weighted": partial(reconstruction, levels=(F,), weights=(0.5,)),
    "reconstruct levels": partial(reconstruction, levels=(30, 64, F), weights=(0.5, 1.0, 2.0)),
    "update": updating,
    "update with rates on the device": partial(updating, on_device=True),
    "update without unit norm": partial(updating, unit_norm=False),
    "update hot rows": partial(updating, hot=True, levels=(2, 6, FEW)),
    "update levels, extra, every": partial(updating, levels=(2, 6, FEW), extra=True, every=True),
    "update lazily": partial(updating, beta1=0.0, extra=True),
    "update lazily hot rows": partial(updating, beta1=0.0, hot=True),
    "update lazily every": partial(updating, beta1=0.0, every=True),
    "training steps": training,
    "training steps with clipping": partial(training, steps=3, clip=0.5),
}
"""By name; call with the device."""

ON_DEVICE: dict[str, Callable[..., None]] = {
    f"{name} bfloat16": partial(CASES[name], dtype=torch.bfloat16)
    for name in CASES
    if name.startswith(("topk", "batch topk", "above"))
} | {"update bfloat16": partial(updating, low=torch.bfloat16, hot=True)}
"""Only on a GPU: the interpreter's bfloat16 is wrong."""


def run(name: str, case: Callable[..., None], device: str) -> dict:
    """One case's verdict; what it raises is the error."""
    begin, error = time.perf_counter(), None
    try:
        case(device)
    except Exception:  # a failing case must not lose the others
        error = traceback.format_exc()
    return {"name": name, "seconds": round(time.perf_counter() - begin, 3), "error": error}


if __name__ == "__main__":
    for name, case in CASES.items():
        print(json.dumps(run(name, case, "cpu")), flush=True)
