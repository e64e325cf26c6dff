"""What OpenMOSS's own package saves, and computes on raw activations, is what we make of it; other weights than the
committed cases have. Llama Scope, which it no longer reads, is in test_published.py."""

import subprocess
from pathlib import Path

import pytest

from tests.peers.agree import BAR, FIXTURES, differences, python

PYTHON = python("openmoss")
WRITER = Path(__file__).with_name("write_openmoss.py")
CASES = sorted(path.name for path in FIXTURES.glob("openmoss-*") if "llama_scope" not in path.name)
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip("OpenMOSS's environment is not built: experiments/bench/peers.sh openmoss")
    folder = tmp_path_factory.mktemp("theirs")
    done = subprocess.run([PYTHON, WRITER, folder, "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_openmoss_saves_loads_here_with_the_same_codes(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found
