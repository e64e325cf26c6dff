"""Texts from a name: matched in form, length and place of the name, and nothing of the name in the negatives."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from sae import bundled
from sae.errors import UserError
from sae.features.templates import content_words, fill, matched

ROOT = Path(__file__).parents[2]
CONCEPTS = json.loads((ROOT / "experiments" / "concepts.json").read_text(encoding="utf-8"))[0]["topics"]
SHIPPED = json.loads(bundled.templates_path().read_text(encoding="utf-8"))


def test_the_shipped_list_has_many_templates_of_many_forms_and_no_subject_twice():
    texts = [template["text"] for template in SHIPPED["templates"]]
    subjects = [name for names in SHIPPED["subjects"].values() for name in names]
    assert len(set(texts)) == len(texts) >= 24
    assert len({template["form"] for template in SHIPPED["templates"]}) >= 10
    assert len(set(subjects)) == len(subjects) >= 150
    assert all(re.search(r"\{(name|Name)\}", text) for text in texts)
    # The first position of a text is not counted, so a name of one token must not stand there.
    assert not any(text.startswith("{") for text in texts)


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_template_has_one_positive_and_four_different_negatives_without_the_name(name):
    found = matched(name)
    templates = [one.template for one in found.positives]
    assert len(set(templates)) == len(templates) == len(SHIPPED["templates"])
    assert Counter(one.template for one in found.negatives) == dict.fromkeys(templates, 4)
    assert len({(one.template, one.subject) for one in found.negatives}) == len(found.negatives)
    assert {(one.template, one.form) for one in found.negatives} == {(p.template, p.form) for p in found.positives}
    assert all(name.casefold() in one.text.casefold() for one in found.positives)
    assert not any(content_words(name) & content_words(one.subject) for one in found.negatives)


def test_positive_and_negative_differ_in_nothing_but_the_subject():
    found = matched("the Golden Gate Bridge")
    frames = {one.template: re.split(r"the golden gate bridge", one.text, flags=re.I) for one in found.positives}
    for one in found.negatives:
        assert re.split(re.escape(one.subject), one.text, flags=re.I) == frames[one.template]


def test_negatives_are_built_as_the_name_is():
    subjects = {one.subject for one in matched("whales").negatives}
    assert all(len(subject.split()) == 1 and subject.islower() for subject in subjects)
    assert len(subjects) >= 30


def test_a_name_has_a_capital_at_the_start_of_a_sentence_only():
    assert fill("We met. {Name} again, {name}.", "an owl") == "We met. An owl again, an owl."


def test_the_same_name_and_seed_give_the_same_texts_and_another_seed_others():
    assert matched("chess", seed=3) == matched("chess", seed=3)
    assert matched("chess", seed=3).negatives != matched("chess", seed=4).negatives
    assert matched("  the   Eiffel Tower\n") == matched("the Eiffel Tower")


@pytest.mark.parametrize("name", ["{name}", "C++", "日本", "the Who", "1984", "a"])
def test_unusual_names_are_names(name):
    assert all(name.casefold() in one.text.casefold() for one in matched(name).positives)


@pytest.mark.parametrize(("name", "what"), [("", "empty"), (" \n", "empty"), ("?!", "letter"), ("x" * 81, "81")])
def test_what_is_no_name_is_refused_with_what_to_do(name, what):
    with pytest.raises(UserError, match=rf"^name: .*{what}.* Give a [^\n]*$"):
        matched(name)
