"""`sae convert` of a whole SAE: the same codes in another layout, losses told, or a layout named that can say it."""

import pytest

from sae.errors import UserError
from sae.run import convert_layout
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES

CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.safetensors"))
LAYOUTS = ("saelens", "sparsify", "dictionary_learning")


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_says_the_same_sae_or_names_one_that_does(tmp_path, case, to):
    try:
        made = convert_layout(case / "sae", tmp_path / "out", to)
    except UserError as error:
        assert list(tmp_path.iterdir()) == []
        other = next(name for name in LAYOUTS if str(error).endswith((f"as {name}.", f"--to {name}.")))
        convert_layout(case / "sae", tmp_path / "out", other)
    else:
        assert made["largest difference"] <= BAR


def test_a_calibrated_threshold_that_sparsify_has_no_word_for_is_told(tmp_path):
    make_sae().save(tmp_path / "sae")
    lost = convert_layout(tmp_path / "sae", tmp_path / "theirs", "sparsify")["lost"]
    assert "threshold: sparsify has no word for a calibrated one; 0.5 stays with" in lost[0]
    assert "statistics: sparsify has no place for them" in lost[1]
