"""Both answers as one object: what `side_by_side` gives, shaded by what the unsteered host reads, whatever the text."""

from html.parser import HTMLParser

import pytest
import torch

from sae import SAE, UserError, compare, steer
from sae.steering import Answers, side_by_side
from sae.steering.answers import Reading, read
from sae.steering.directions import Direction
from tests.conftest import make_sae
from tests.steering.conftest import HOOK
from tests.test_shipped import FOLDER

SAMPLING = {"max_new_tokens": 8, "temperature": 0}
HOSTILE = "</script></td><img src=x onerror=alert(1)> & 'so' \"on\""


@pytest.fixture
def sae(tiny_host):
    model = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint)
    model.labels = {7: "the bridge"}
    return model


class Page(HTMLParser):
    """The tags and the text of a page as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.styles = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles += [value for name, value in attrs if name == "style"]

    def handle_data(self, data):
        self.text += data


def test_it_holds_both_answers_the_prompt_and_the_dials(tiny_host, sae):
    handle = steer(tiny_host, sae, {7: "9x", 3: 2.0})
    found = compare(tiny_host, handle, "Who are you?", **SAMPLING)
    assert (found.plain, found.steered) == side_by_side(tiny_host, handle, "Who are you?", **SAMPLING)
    assert found.prompt == "Who are you?" and found.dials == ["7=9x (the bridge)", "3=2"]
    assert str(found) == f"── plain ──\n{found.plain}\n\n── 7=9x (the bridge), 3=2 ──\n{found.steered}"
    handle.set("7=off")
    assert compare(tiny_host, handle, "Who are you?", **SAMPLING).dials == ["7=off (the bridge)"]


def test_messages_and_a_sum_of_handles_are_compared_too(tiny_host, sae):
    handle = steer(tiny_host, sae, {7: "9x"}) + steer(tiny_host, sae, {9: "1x"})
    messages = [{"role": "user", "content": "Who are you?"}]
    found = compare(tiny_host, handle, messages, system="Be short.", **SAMPLING)
    assert found.prompt == "Who are you?" and found.dials == ["7=9x (the bridge)", "9=1x"]
    assert [one.feature for one in found.readings] == [7, 9]


def test_shares_are_the_features_activations_over_prompt_and_answer_without_steering(tiny_host, sae):
    answer = "The bridge is red and very long."
    ids = tiny_host.tokenizer(answer, add_special_tokens=False).input_ids
    tokens = torch.cat([tiny_host.chat_tokens("Who?")[0], torch.tensor(ids)])[None]
    x = tiny_host.activations(tokens, [HOOK])[HOOK][0, -len(ids) :]
    pieces, readings = read(tiny_host, steer(tiny_host, sae, {7: "9x", 3: "off", 20: "0x"}), "Who?", answer)
    assert pieces == tiny_host.text_of(ids) and [one.feature for one in readings] == [7, 20]
    for one in readings:
        wanted = sae.encode(x)[:, one.feature] / sae.stats.max_act[one.feature]
        torch.testing.assert_close(torch.tensor(one.shares), wanted)


def test_characters_of_several_tokens_stay_whole(tiny_host, sae):
    answer = "A 🌉 over 海 and the ﷽."
    pieces, readings = read(tiny_host, steer(tiny_host, sae, {7: "9x"}), "Who?", answer)
    assert "".join(pieces) == answer and len(readings[0].shares) == len(pieces)
    assert len(pieces) < len(tiny_host.tokenizer(answer, add_special_tokens=False).input_ids)


def test_without_a_dialled_feature_nothing_is_shaded(tiny_host, sae):
    direction = Direction(HOOK, torch.nn.functional.normalize(torch.ones(32), dim=0), 3.0, 9.0)
    for handle in (steer(tiny_host, sae, "off"), steer(tiny_host, direction, "2x")):
        found = compare(tiny_host, handle, "Who are you?", **SAMPLING)
        assert found.readings == [] and found.pieces == [found.steered] and "rgba" not in found._repr_html_()
    assert found.dials == ["direction=2x"]
    assert read(tiny_host, steer(tiny_host, sae, {7: "9x"}), "Who?", "") == ([""], [])


def test_the_shade_follows_the_strongest_feature_and_dark_text_stays_readable():
    readings = [Reading(7, "bridge", [0.0, 0.5, 0.1]), Reading(9, "", [0.0, 0.2, 3.0])]
    page = Page(Answers("p", ["7=1x", "9=1x"], "a", "b c d", ["b", " c", " d"], readings)._repr_html_())
    grounds = [style for style in page.styles if "background" in style]
    assert grounds[:2] == ["background:rgba(255,140,0,0.30)", "background:rgba(0,140,255,0.60)"]
    assert not any("color:" in style for style in page.styles)  # the notebook's own, light or dark


def test_whatever_is_in_a_text_stays_text(tiny_host, sae):
    sae.labels = {7: HOSTILE.replace("=", "")}
    handle = steer(tiny_host, sae, {7: "9x"})
    own = read(tiny_host, handle, HOSTILE, HOSTILE)
    assert own[1] and "".join(own[0]) == HOSTILE
    for pieces, readings in (own, ([HOSTILE], [Reading(7, HOSTILE, [0.5])]), ([HOSTILE], [])):
        page = Page(Answers(HOSTILE, [HOSTILE], HOSTILE, HOSTILE, pieces, readings)._repr_html_())
        assert set(page.tags) <= {"p", "b", "table", "thead", "tbody", "tr", "th", "td", "span"}
        assert page.text.count(HOSTILE) >= 4


def test_a_batch_and_an_attached_handle_are_refused(tiny_host, sae):
    handle = steer(tiny_host, sae, {7: "9x"})
    for prompt in (["a", "b"], [], torch.tensor([[1, 2]])):
        with pytest.raises(UserError, match="takes one prompt"):
            compare(tiny_host, handle, prompt)
    with handle, pytest.raises(UserError, match="is attached"):
        compare(tiny_host, handle, "Hi")


def test_on_the_real_host_the_bridge_is_shaded(host):
    model = SAE.load(FOLDER)
    handle = steer(host, model, {2202: "0.87x"})
    pieces, readings = read(host, handle, "Where are you?", "I stand near the old bridge and eat an apple.")
    shares = dict(zip(pieces, readings[0].shares, strict=True))
    assert max(shares, key=shares.__getitem__) == " bridge" and shares[" bridge"] > 0.2 and shares[" apple"] == 0
    assert readings[0].label == "the Golden Gate Bridge"
