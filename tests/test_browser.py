"""The slider and the pages in a real browser: headless Chromium opens them, its DOM is read."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sae.steering.page import html

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
SCRIPT = Path(__file__).parents[1] / "sae" / "widgets.js"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--dump-dom",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000",
)  # fmt: skip
PAGE = """<!doctype html><meta charset=utf-8><title>ours</title><div id=here></div><script type=module>
const state = STATE;
const heard = {};
const model = {
  get: (name) => state[name], set: (name, value) => { state[name] = value; },
  on: (name, f) => { heard[name] = f; }, off: () => {},
  save_changes: () => {
    const request = state.request;
    state.answer = { n: request.n, plain: state.hostile, steered: [[state.hostile, "rgb(1 2 3 / 0.5)", "5"]], error: "", done: true };
    heard["change:answer"]();
  },
};
SCRIPT
render({ model, el: document.getElementById("here") });
const slider = document.querySelector("input[type=range]");
slider.value = 1.5;
slider.dispatchEvent(new Event("input"));
slider.dispatchEvent(new Event("change"));
document.body.append(Object.assign(document.createElement("pre"), { id: "asked", textContent: JSON.stringify(state.request) }));
</script>"""  # noqa: E501


def dom(path: Path, profile: Path) -> str:
    assert CHROMIUM is not None
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_slider_asks_with_its_strength_and_answers_enter_as_text(tmp_path):
    state = {
        "features": [{"feature": 2202, "label": HOSTILE, "top": 2.0}], "hostile": HOSTILE,
        "request": {"n": 0, "prompt": "Who are you?", "strengths": {"2202": None}},
        "answer": {"n": 0, "plain": "", "steered": [], "error": "", "done": True},
    }  # fmt: skip
    script = SCRIPT.read_text(encoding="utf-8").replace("export default { render };", "")
    given = json.dumps(state).replace("</", "<\\/")
    (tmp_path / "page.html").write_text(PAGE.replace("STATE", given).replace("SCRIPT", script), encoding="utf-8")
    found = dom(tmp_path / "page.html", tmp_path / "profile")
    assert '<pre id="asked">{"n":1,"prompt":"Who are you?","strengths":{"2202":1.5}}</pre>' in found
    assert "<output>1.50x</output>" in found and "<title>ours</title>" in found
    assert "<img" not in found.split("<script", 1)[0] and "rgba(1, 2, 3, 0.5)" in found


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_hostile_words_stay_words_on_the_effects_page(tmp_path):
    row = {"arm": "off", "factor": 0.0} | dict.fromkeys(
        ("perplexity", "kl", "capability", "about", "repetition", "harmful: refuse", "harmful: derail",
         "harmless: refuse", "harmless: derail"), 0.5)  # fmt: skip
    rows = [row, row | {"arm": "dial", "factor": 1.0}]
    answers = [{"question": HOSTILE, "plain": HOSTILE, "steered": HOSTILE}]
    (tmp_path / "page.html").write_text(html(HOSTILE, rows, [(HOSTILE, [{HOSTILE: HOSTILE}])], answers, [HOSTILE]))
    found = dom(tmp_path / "page.html", tmp_path / "profile")
    assert "<img" not in found and found.count("<svg") == 9 and found.count("&lt;img") >= 6
