"""Every Triton kernel compiles for cards that are not here, with nothing spilled and within their shared memory."""

import functools

import pytest

pytest.importorskip("triton")

from tests.kernels.aot import CALLS, SHAPES, SHARED, compile_all, has_bfloat16

FAST = ("topk", "topk fused", "above", "decode", "reconstruct", "update")


@functools.cache
def compiled(arch: int, shape: str, call: str):
    return compile_all(arch, SHAPES[shape], [call])


def check(arch: int, shape: str, call: str) -> None:
    made = compiled(arch, shape, call)
    assert made or not has_bfloat16(arch), "something was compiled"
    for kernel in made:
        assert kernel.spills == 0, f"{kernel} spills"
        assert kernel.shared <= SHARED[arch] * 1024, f"{kernel} needs more shared memory than there is"


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("call", FAST)
def test_kernels_compile_without_spills(arch, call):
    check(arch, "A", call)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile_without_spills_everywhere(arch, shape):
    for call in CALLS:
        check(arch, shape, call)


def test_the_fused_product_runs_on_hoppers_tensor_cores():
    assert [kernel.wgmma for kernel in compiled(90, "A", "topk fused") if kernel.kernel == "product"] == [True]
