"""A UserError is one printable line of bounded length, whatever values are put into it."""

import pickle

import pytest

from sae.errors import UserError

PATH = "/data/" + "long folder name/" * 40 + "cfg.json"


@pytest.mark.parametrize(
    "value", ["a\nb", "\x1b[2Ja", "\u202ea", "\x00\x9b1m", "a\u2028b", "\ud800", "x" * 3_000_000, "x y " * 999]
)
def test_values_neither_part_the_line_nor_fill_the_screen(value):
    error = UserError(f"{PATH}: architecture is {value}, which is not read. Choose another SAE.")
    said = str(error)
    assert said.isprintable() and said.startswith(f"{PATH}: architecture is ") and len(said) < len(PATH) + 410
    assert said.endswith(", which is not read. Choose another SAE.")
    assert str(UserError(said)) == said == str(pickle.loads(pickle.dumps(error)))


def test_what_stands_first_is_shortened_where_it_can_be_no_path():
    for where in ("x" * 3000, "x/" * 3000):
        said = str(UserError(f"{where}: no folder here. Check the path."))
        assert len(said) <= 400 and said.endswith("Check the path.")


def test_a_message_without_values_is_as_it_was_written():
    said = "select: 'x' is neither topk nor threshold.  Choose one of them – or none."
    assert str(UserError(said)) == said
