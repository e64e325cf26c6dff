"""What peers' own packages wrote, and made of it, is what we make of it: without the peers, from small files."""

import pytest

from tests.peers.agree import BAR, FIXTURES, differences, expected

CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.safetensors"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_and_reconstruction_are_the_peers(case):
    found = differences(case)
    assert max(found.values()) <= BAR, (found, expected(case)[1])
