"""On a CUDA device: every kernel against the plain version, and whole training steps (`make gpu` runs the same)."""

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu import harvest
from tests.gpu.checks import CHECKS
from tests.kernels.triton_cases import CASES, ON_DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", [*CASES, *ON_DEVICE])
def test_kernel_equals_the_plain_version(name):
    (CASES | ON_DEVICE)[name]("cuda")


@pytest.mark.parametrize("name", CHECKS)
def test_training_step(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", harvest.CHECKS)
def test_harvest(name):
    harvest.CHECKS[name]()
