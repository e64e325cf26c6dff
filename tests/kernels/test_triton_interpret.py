"""Every Triton kernel, interpreted in float32, equals the plain version. What is compared: triton_cases.py.

Triton reads TRITON_INTERPRET when it is imported, so the cases run in a process of their own, all in one.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_cases import CASES


@pytest.fixture(scope="module")
def verdicts():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {verdict["name"]: verdict for verdict in map(json.loads, done.stdout.splitlines())}


@pytest.mark.xdist_group("triton_interpret")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_equals_the_plain_version(verdicts, name):
    assert verdicts[name]["error"] is None, verdicts[name]["error"]
