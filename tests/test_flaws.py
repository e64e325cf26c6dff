"""What experiments/flaws.py takes for a program and for a flaw, and the pairs of experiments/vulnerabilities."""

import ast
from difflib import SequenceMatcher

import pytest

from experiments.flaws import KINDS, flaws, flaws_by_text, program, valid
from experiments.vulnerabilities.pairs import parse, snippets
from experiments.vulnerabilities.prompts import PROMPTS
from sae.errors import UserError

PYTHON = snippets("python")
BLIND = {"path", "bounds"}  # kinds that no name gives away
UNSEEN = {"temp: lock"}  # a fixed name in /tmp is no pattern of ours


def test_there_are_forty_pairs_of_eight_kinds_at_least_and_thirty_prompts():
    assert len(PYTHON) >= 40 and len({one.kind for one in PYTHON}) >= 8 and len({one.title for one in PYTHON}) == 44
    assert len(PROMPTS) == len(set(PROMPTS)) == 30


@pytest.mark.parametrize("one", PYTHON, ids=lambda one: one.title)
def test_a_pair_parses_and_differs_in_the_flawed_lines_alone(one):
    for code in (one.flawed, one.fixed, one.control):
        ast.parse(code)
        assert 10 <= len(code.splitlines()) <= 30
    flawed, fixed, control = (code.splitlines() for code in (one.flawed, one.fixed, one.control))
    blocks = SequenceMatcher(None, flawed, fixed, autojunk=False).get_opcodes()
    assert tuple(i for what, start, end, _, _ in blocks if what != "equal" for i in range(start, end)) == one.lines
    changed = [(a, b) for a, b in zip(fixed, control, strict=True) if a != b]
    assert len(changed) == 1, "the control changes one line of the fixed version"


@pytest.mark.parametrize("one", PYTHON, ids=lambda one: one.title)
def test_the_finder_sees_the_flaw_in_the_flawed_one_and_none_in_the_others(one):
    own = {one.kind} if one.kind not in BLIND and one.title not in UNSEEN else set()
    assert flaws(one.flawed) == own
    assert flaws(one.fixed) == flaws(one.control) == set()


def test_every_kind_that_the_finder_knows_has_pairs():
    assert set(KINDS) == {one.kind for one in PYTHON} - BLIND


def test_sql_counts_where_a_name_holds_the_built_string_and_not_where_it_is_constant():
    built = "def f(db, x):\n    query = 'SELECT ' + x\n    db.execute(query)\n"
    plain = "def f(db, x):\n    query = 'SELECT ' + 'name'\n    db.execute(query, (x,))\n"
    assert flaws(built) == {"sql"} and flaws(plain) == set()


def test_random_counts_in_functions_about_secrets_alone():
    body = "    return random.choice('abc')\n"
    assert flaws("def reset_token():\n" + body) == {"random"} and flaws("def roll():\n" + body) == set()


def test_a_constant_eval_is_no_flaw_and_a_method_called_eval_neither():
    assert flaws("eval('1 + 1')\nmodel.eval()\nframe.eval(x)\n") == set()


def test_a_broken_program_is_read_as_text():
    broken = "def f(h):\n    subprocess.run(h, shell=True\n    yaml.load(h, Loader=yaml.SafeLoader)\n  eval(h)\n"
    assert not valid(broken) and flaws(broken) == flaws_by_text(broken) == {"shell", "eval"}


def test_a_program_ends_where_its_first_function_ends():
    code = "import os\n\ndef f(x):\n    return [\n        x,\n    ]\n"
    assert program(f"Sure:\n```python\n{code}\nprint(f(1))\n```\nThis is") == code
    assert program("    return 1\n\nf()\n```", begun="def f():\n") == "def f():\n    return 1\n"


def test_a_program_cut_by_the_number_of_tokens_ends_with_its_last_complete_statement():
    whole = "def f(x):\n    y = x\n"
    for rest in (
        "    return (y",
        "    return g(\n        y,",
        "    for i in y:",
        "    return 'y",
        "    if y:\n        # so",
    ):
        assert program(f"```python\n{whole}{rest}") == whole, rest


def test_a_mistake_before_the_cut_stays():
    for mistake in ("    y = = x\n", "    y = x)\n", "  y = x\n"):
        code = program(f"```python\ndef f(x):\n    z = x\n{mistake}    y = 1\n    return (y")
        assert not valid(code), mistake


def test_a_function_that_does_nothing_is_not_valid():
    assert (
        not valid('def f(x):\n    """What it does."""\n    pass\n') and not valid("x = 1\n") and not valid("def f(\n")
    )
    assert valid("def f(x):\n    return x\n")


def test_a_line_that_belongs_to_no_version_is_named():
    with pytest.raises(UserError, match="somewhere, line 2"):
        parse("### sql: one\nimport os\n", "somewhere")
