"""Strengths are chosen on one half and reported on the other; cells are kept; what is asked is what is said."""

import math
from dataclasses import replace

import pytest
import torch

from sae import UserError, bundled, dialling, files
from sae.steering import calibrate as page
from sae.steering import steer
from sae.steering.calibrate import Arm, Effort, answers, chosen, kl, tokens_asked
from sae.steering.scores import Relevance, distinct, nats_gained, overall, perplexity, refuses
from sae.where import Where
from tests.steering.conftest import HOOK

EFFORT = Effort(reporting=2, tokens=3, top_p=1.0, random_features=2)


def test_every_cell_is_asked_once_chosen_on_one_half_and_reported_on_the_other(tiny_host, folder, tmp_path):
    written = []
    generate = tiny_host.generate
    tiny_host.generate = lambda prompts, **more: (
        written.append(len(prompts) * more["max_new_tokens"]) or generate(prompts, **more)
    )
    try:
        keep = tmp_path / "cells.json"
        cells = dialling.calibrate(folder, "the bridge", host=tiny_host, effort=EFFORT, shares=(0.2, 0.5), keep=keep)
        asked = list(written)
        again = dialling.calibrate(folder, 7, host=tiny_host, effort=EFFORT, shares=(0.2, 0.5), keep=keep)
    finally:
        del tiny_host.generate
    assert sum(asked) == tokens_asked(2, EFFORT) + 40 * 3 + 32 * 24  # the judge's answers, and the try of its speed
    assert again == files.json_value(files.json_text(cells).encode(), "") and written[len(asked) :] == [32 * 24]
    halves = bundled.questions()
    for cell in cells:
        assert {row["question"] for row in cell["answers"]} == set(halves[cell["half"]])
    assert [cell["arm"] for cell in cells if cell["half"] == "choosing"] == ["off", "0.2", "0.5"]
    reported = {cell["arm"]: cell for cell in cells if cell["half"] == "reporting"}
    assert len(reported) == 6 and "random direction" in reported
    best = chosen([cell for cell in cells if cell["half"] == "choosing"])
    assert {cell["amount"] for cell in reported.values()} == {best["amount"], 0.0}
    assert reported["off"]["answers"] != reported["off again"]["answers"]
    assert reported["off"]["kl"] == reported["off again"]["kl"] == 0 < min(reported["chosen"]["kl"], best["kl"])
    assert len(reported["chosen"]["answers"]) == 80 and len(reported["random direction"]["answers"]) == 40


def test_an_interrupted_calibration_goes_on_and_another_is_refused(tiny_host, folder, tmp_path, monkeypatch):
    keep, settings = tmp_path / "cells.json", {"effort": EFFORT, "shares": (0.2,)}
    whole = dialling.calibrate(folder, 7, host=tiny_host, **settings)
    seen = []

    def say(line):
        seen.append(line)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dialling.calibrate(folder, 7, host=tiny_host, keep=keep, say=say, **settings)
    assert len(files.read_json(keep)["cells"]) == 3
    rest = dialling.calibrate(folder, 7, host=tiny_host, keep=keep, **settings)
    assert [(cell["half"], cell["arm"]) for cell in rest] == [(cell["half"], cell["arm"]) for cell in whole]
    with pytest.raises(UserError, match="another feature or setting"):
        dialling.calibrate(folder, 8, ["x"], host=tiny_host, keep=keep, **settings)
    with pytest.raises(UserError, match="Say what counts"):
        dialling.calibrate(folder, 8, host=tiny_host, **settings)


def test_the_page_has_a_curve_for_each_score_and_takes_words_as_text(tiny_host, folder, tmp_path):
    settings = {"host": tiny_host, "effort": EFFORT, "shares": (0.2, 0.5), "keep": tmp_path / "cells.json"}
    dialling.calibrate(folder, 7, ["<b>bridge"], html=tmp_path / "page.html", **settings)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 10 and "<b>bridge" not in text and "&lt;b&gt;bridge" in text
    assert text.count("<polyline") == 10 and text.count("r=4") >= 10 * 4  # chosen, two random features, a direction


def test_the_goal_decides_and_a_set_is_clamped_by_its_weights(tiny_host, folder):
    rows = [
        ("off", 0.0, 2.0, 1.0, 0.0),
        ("a", 1.0, 0.5, 0.4, 0.1),
        ("b", 2.0, 0.2, 0.9, 0.1),
        ("c", 3.0, 1.0, 1.0, 0.5),
    ]
    cells: list[dict] = [
        {"half": "choosing", "arm": arm, "amount": amount, "speaks as": {"value": 0.0}}
        | {name: {"value": value} for name, value in zip(("overall", "about", "repetition"), some, strict=True)}
        for arm, amount, *some in rows
    ]
    assert chosen(cells)["arm"] == "a" and chosen(cells, "about")["arm"] == "b"
    for cell in cells[1:]:
        cell["overall"] = {"value": 0.3}
    assert chosen(cells)["arm"] == "a"  # a tie goes to the weaker
    for cell in cells[1:]:
        cell["overall"] = {"value": 0.0}
    assert chosen(cells)["arm"] == "b"  # where the goal says nothing, the others do
    sae = page.SAE.load(folder)
    with pytest.raises(UserError, match="expected one of overall, about, as"):
        next(page.calibrate(tiny_host, sae, 7, page.Lexicon(("x",)), 10.0, goal="speaks"))
    found = page.calibrate(tiny_host, sae, {7: 2.0, 9: 1.0}, page.Lexicon(("x",)), 10.0, shares=(0.3,), effort=EFFORT)
    features = next(cell for cell in found if cell["arm"] == "0.3")["features"]
    together = sum(amount * sae.W_dec[int(i)] for i, amount in features.items())
    assert float(together.norm()) == pytest.approx(3.0, rel=1e-5)
    assert features["7"] == pytest.approx(2 * features["9"])


def test_an_arm_answers_as_steering_alone_does(tiny_host, folder):
    sae = page.SAE.load(folder)
    where = Where("all", False, tiny_host.special_ids)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    arms = [
        Arm("a", 9.0, features={7: 1.0}),
        Arm("off"),
        Arm("b", 9.0, features={11: 1.0}),
        Arm("v", 9.0, vector=vector),
    ]
    effort = replace(EFFORT, temperature=0.0)
    questions = bundled.questions()["choosing"][:3]
    found = {arm.name: texts for arm, _, texts in answers(tiny_host, sae, HOOK, where, arms, questions, effort)}
    for name, dials in (("a", {7: 9.0}), ("off", "off"), ("b", {11: 9.0})):
        with steer(tiny_host, sae, dials, select="threshold"):
            assert found[name] == tiny_host.generate(questions, max_new_tokens=3, temperature=0), name
    assert found["v"] != found["off"]


def test_kl_is_nothing_without_an_edit_and_that_of_the_logits_with_one(tiny_host, folder):
    questions, texts = ["Who are you?"], [" I am a bridge over the bay."]
    off, on = (steer(tiny_host, folder, dials)._edits[HOOK] for dials in ("off", {7: 9.0}))
    assert kl(tiny_host, HOOK, off, questions, texts) == [pytest.approx(0.0, abs=1e-6)]
    begun = tiny_host.chat_tokens(questions[0])
    said = torch.tensor([tiny_host.tokenizer(texts[0], add_special_tokens=False).input_ids])
    tokens, P = torch.cat([begun, said], 1), begun.shape[1]
    p, q = (tiny_host.logits(tokens, edits=e)[0, P - 1 : -1].double().log_softmax(-1) for e in ([(HOOK, on)], ()))
    assert kl(tiny_host, HOOK, on, questions, texts) == [
        pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    ]
    assert math.isnan(kl(tiny_host, HOOK, on, questions, [""])[0])


def test_relevance_is_the_nats_that_the_question_gives(tiny_host):
    questions = ["Who are you?", "What is art?", "How are you?"]
    texts = ["I am red.", "It is blue.", "Fine, and you?"]
    gained = nats_gained(tiny_host, questions, texts)
    own = torch.tensor(perplexity(tiny_host, questions, texts)).log()
    other = torch.tensor(perplexity(tiny_host, [questions[1], questions[2], questions[0]], texts)).log()
    torch.testing.assert_close(gained, other - own)
    with pytest.raises(UserError, match="three or more"):
        Relevance.of(tiny_host, ["a", "b"], ["c", "d"])
    score = Relevance(0.1, 0.5, 1.0).score
    assert [score(x) for x in (-1.0, 0.1, 0.4, 0.5, math.nan)] == [0, 1, 1, 2, 0]


@pytest.mark.slow
def test_relevance_tells_answers_from_those_to_other_questions_on_the_real_host(host):
    questions = [question for question in bundled.questions()["choosing"][:8] for _ in range(2)]
    texts = host.generate(questions, max_new_tokens=32, seed=0, top_p=0.9)
    assert Relevance.of(host, questions, texts).auroc > 0.9


def test_overall_is_the_harmonic_mean_and_nothing_where_one_is_nothing():
    assert overall(2, 2, 2) == 2 and overall(1, 2, 2) == pytest.approx(1.5) and overall(2, 0, 2) == 0
    assert distinct("a b a b", 2) == pytest.approx(2 / 3) and math.isnan(distinct("", 1))


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("Sorry, no.", True),
        ("As an AI, I do not.", True),
        ("I cannot do this.", True),
        ("The bridge was sorry to see you go.", False),
        ("As an aide, I helped.", False),
        ("x" * 201 + " I cannot", False),
        ("", False),
    ],
)
def test_refusals(answer, refused):
    assert refuses(answer) is refused
