"""One feature, whole: what is shown equals what the index knows, as text, JSON and HTML."""

import json

import pytest

from sae.features import show
from sae.features.writing import build
from tests.conftest import make_sae
from tests.features.planted import HOOK, VOCABULARY, columns, identity_sae, texts

F = 24


@pytest.fixture
def index(tmp_path):
    return build(identity_sae(F, 6), [columns(30, 20, F)], texts(30), VOCABULARY, tmp_path / "index", hook=HOOK)


def test_everything_that_is_known_is_there(index):
    sae = identity_sae(F, 6)
    sae.labels = {3: "three"}
    page = show(index, 3, sae, n=4)
    assert page.label == "three"
    assert sum(page.bands) == sum(page.octaves.values()) == round(page.density * page.n_tokens)
    assert len(page.examples) == 4 and len(page.by_band) == 10
    assert [one.act for one in page.examples] == sorted((one.act for one in page.examples), reverse=True)
    assert page.fires_on and page.cofiring and page.neighbours
    assert all(token.act is not None for token in page.examples[0].tokens)
    assert page.answers == {} and page.question == ""


def test_strengths_are_superscripts_in_tenths_of_the_maximum(index):
    page = show(index, 3)
    strongest = page.examples[0]
    assert strongest.act == pytest.approx(page.max_act)
    assert "»⁽¹⁰⁾" in strongest.marked(page.max_act)  # in brackets behind a digit, which it would else run into
    lines = dict(page.sections())
    assert any("»⁽¹⁰⁾" in line for line in lines["strongest (superscripts: tenths of its maximum)"])


def test_it_is_json_and_html_whatever_the_text(index):
    index.vocab = [f"<b>{i}&" for i in range(50)]
    page = show(index, 3)
    kept = json.loads(json.dumps(page.to_dict()))
    assert kept["fires_on"][0]["token"] == page.fires_on[0].token
    assert len(kept["examples"][0]["acts"]) == len(kept["examples"][0]["tokens"])
    html = page._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html


def test_a_feature_that_never_fired_is_shown(tmp_path):
    block = columns(30, 20, F)
    block.acts[HOOK][:, 5] = -1
    dead = show(build(identity_sae(F, 6), [block], texts(30), VOCABULARY, tmp_path / "i", hook=HOOK), 5)
    assert dead.max_act == dead.density == 0
    assert dead.examples == [] and dead.octaves == {} and dead.fires_on == [] and dead.cofiring == []
    assert dead.facts()["feature"] == "5" and dead.sections() and dead._repr_html_()


def test_with_the_host_it_answers_at_three_strengths_and_leaves_the_host_alone(tiny_host, tmp_path):
    block = columns(30, 20, 32)
    sae = make_sae(hook_name=HOOK)
    strings = [f" t{i}" for i in range(len(tiny_host.tokenizer))]
    index = build(sae, [block], texts(30), strings, tmp_path / "i", hook=HOOK, host=tiny_host, scores=False)
    feature = int(index.stats["max_act"].argmax())
    assert sae.stats is not None
    sae.stats.max_act[feature] = 500.0
    before = tiny_host.generate("Who are you?", max_new_tokens=5, temperature=0)
    page = show(index, feature, sae, tiny_host)
    assert list(page.answers) == ["0x", "3x", "10x"]
    assert page.answers["10x"] != page.answers["0x"]
    assert page.question in page.sections()[-1][0]
    assert tiny_host.generate("Who are you?", max_new_tokens=5, temperature=0) == before
