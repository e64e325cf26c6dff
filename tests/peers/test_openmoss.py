"""What OpenMOSS's own package saves, and computes on raw activations, is what we make of it; other weights than the
committed cases have. Llama Scope, which it no longer reads, is in test_published.py."""

import pytest

from tests.peers.agree import BAR, FIXTURES, differences, in_peer

CASES = sorted(path.name for path in FIXTURES.glob("openmoss-*") if "llama_scope" not in path.name)
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    in_peer("write_openmoss.py", folder, 7)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_openmoss_saves_loads_here_with_the_same_codes(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found
