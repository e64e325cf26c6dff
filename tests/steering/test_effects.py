"""What a dial changes besides: each measure against a computation by hand, and the table that compares them."""

import pytest
import torch

from sae import UserError, bundled, dialling, files, steer
from sae.steering import effects
from sae.steering.calibrate import Effort, Judge
from sae.steering.scores import Lexicon

EFFORT = Effort(reporting=1, tokens=3, top_p=1.0, random_features=2)


@pytest.fixture
def little(monkeypatch):
    """Few of everything, so that a random host answers quickly."""
    asked, pairs, items = bundled.questions(), bundled.requests(), bundled.capability()
    monkeypatch.setattr(bundled, "questions", lambda: {half: some[:4] for half, some in asked.items()})
    monkeypatch.setattr(bundled, "requests", lambda half=None: pairs[:5])
    monkeypatch.setattr(bundled, "capability", lambda: items[:40])
    monkeypatch.setattr(effects, "REFUSAL_TOKENS", 2)


def test_perplexity_and_kl_are_those_of_the_steered_logits(tiny_host, folder):
    texts = ["The bridge is red and very long.", "Bread needs flour, water and salt."]
    edits = steer(tiny_host, folder, {7: 9.0}).edits
    found = effects.text_effect(tiny_host, edits, texts)
    for i, text in enumerate(texts):
        tokens = torch.tensor([tiny_host.tokenizer(text, add_special_tokens=False).input_ids])
        p, q = (tiny_host.logits(tokens, edits=e)[0, :-1].double().log_softmax(-1) for e in (edits, ()))
        assert float(found["n"][i]) == tokens.shape[1] - 1
        assert float(found["nll"][i]) == pytest.approx(-float(p.gather(1, tokens[0, 1:, None]).sum()), rel=1e-4)
        assert float(found["plain"][i]) == pytest.approx(-float(q.gather(1, tokens[0, 1:, None]).sum()), rel=1e-4)
        assert float(found["kl"][i]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert effects.text_effect(tiny_host, [], texts)["kl"].tolist() == [0.0, 0.0]


def test_capability_takes_the_choice_with_the_highest_mean_log_probability(tiny_host):
    items = bundled.capability()[:12]
    right = effects.capability(tiny_host, [], items)
    for item, said in zip(items, right, strict=True):
        begun = tiny_host.tokenizer(f"Question: {item['question']}\nAnswer:", add_special_tokens=False).input_ids
        means = []
        for choice in item["choices"]:
            ids = tiny_host.tokenizer(f" {choice}", add_special_tokens=False).input_ids
            logp = tiny_host.logits(torch.tensor([begun + ids]))[0, len(begun) - 1 : -1].log_softmax(-1)
            means.append(float(logp.gather(1, torch.tensor(ids)[:, None]).mean()))
        assert (max(range(4), key=means.__getitem__) == item["answer"]) is said
    assert not effects.above_chance([True] * 3 + [False] * 9) and effects.above_chance([True] * 9 + [False] * 3)


def test_the_shipped_sets_are_whole():
    pairs, items = bundled.requests(), bundled.capability()
    assert len(pairs) == 60 and len({pair["family"] for pair in pairs}) == 6
    assert len(bundled.requests("training")) == len(bundled.requests("held-out")) == 30
    with pytest.raises(UserError, match="expected training or held-out"):
        bundled.requests("heldout")
    assert len({pair[side] for pair in pairs for side in ("harmful", "harmless")}) == 120
    assert len(items) == 300 and all(len(set(item["choices"])) == 4 for item in items)
    shares = [sum(item["answer"] == i for item in items) / 300 for i in range(4)]
    assert all(0.18 < share < 0.32 for share in shares)


def test_controls_are_other_living_features_of_the_same_length(folder):
    sae = dialling.SAE.load(folder)
    dials = dialling.parse_dials("7=5x, 9=2")
    found = effects.settings(sae, dials, (0.5, 1.0), 3)
    assert [one.key for one in found[:3]] == ["off 0", "dial 0.5", "random 1 0.5"] and len(found) == 1 + 2 * 4
    whole = {one.key: one.amounts for one in found}
    assert whole["dial 1"] == pytest.approx({7: 5 * float(sae.stats.max_act[7]), 9: 2.0})
    rows = sae.W_dec.detach()
    length = float(sum(amount * rows[i] for i, amount in whole["dial 1"].items()).norm())
    for number in (1, 2, 3):
        others = whole[f"random {number} 1"]
        (a, b), (c, d) = whole["dial 1"].values(), others.values()
        assert not {7, 9} & set(others) and a / b == pytest.approx(c / d)
        assert float(sum(amount * rows[i] for i, amount in others.items()).norm()) == pytest.approx(length)


def test_the_report_pairs_every_setting_with_nothing_and_goes_on_from_its_file(tiny_host, folder, tmp_path, little):
    keep, said = tmp_path / "effects.json", []
    settings = {"host": tiny_host, "effort": EFFORT, "factors": (0.5, 1.0), "keep": keep}

    def stop(line):
        said.append(line)
        if sum("about it" in one for one in said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dialling.effects(folder, ["7=9x"], say=stop, **settings)
    assert len(files.read_json(keep)["cells"]) == 3
    rows = dialling.effects(folder, ["7=9x"], **settings)
    assert rows == dialling.effects(folder, ["7=9x"], **settings)
    assert [(row["arm"], row["factor"], row["n"]) for row in rows] == [
        ("off", 0.0, 1), ("dial", 0.5, 1), ("random", 0.5, 2), ("dial", 1.0, 1), ("random", 1.0, 2)
    ]  # fmt: skip
    off, dial = rows[0], rows[3]
    assert off["nats a token added"]["value"] == 0 and off["kl"] == 0
    assert dial["kl"] > rows[1]["kl"] > 0
    for row in rows:
        assert sum(row[f"harmful: {kind}"] for kind in ("refuse", "comply", "derail")) == pytest.approx(1)
        assert row["harmful refusals change"] == "not measurable on this host"  # random words refuse nothing
    against = dial["against random"]
    assert against["nats a token"]["value"] == pytest.approx(
        dial["nats a token added"]["value"] - rows[4]["nats a token added"]["value"]
    )
    assert against["harmful: refuse"]["value"] == pytest.approx(dial["harmful: refuse"] - rows[4]["harmful: refuse"])
    assert "against random" not in rows[4] and len(against["of the random features"].split()) == 2
    assert all(one["after"] > one["before"] for one in dial["rose"]) and 7 not in {x["feature"] for x in dial["rose"]}
    assert [name for name, _ in effects.shown(rows)] and effects.moved(rows)
    dialling.effects(folder, ["7=9x"], html=tmp_path / "page.html", **settings)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 9 and "the bridge" not in page.split("<style>")[0] and "http" not in page
    with pytest.raises(UserError, match="another feature or setting"):
        dialling.effects(folder, ["8=9x"], ["x"], **settings)
    with pytest.raises(UserError, match="no strengths between"):
        dialling.effects(folder, ["7=0x"], ["x"], host=tiny_host)
    files.write_json(keep, {"facts": files.read_json(keep)["facts"], "cells": [1]})
    with pytest.raises(UserError, match="damaged"):
        dialling.effects(folder, ["7=9x"], **settings)
    for dials in (["off"], ["7+=5x"]):
        with pytest.raises(UserError, match="features with strengths|none given"):
            dialling.effects(folder, dials, ["x"], host=tiny_host)


def test_what_became_of_a_request_is_refuse_derail_or_comply(tiny_host, monkeypatch, little):
    said = ["I'm sorry, I can't.", "The bridge, the bridge.", "Of course: a recipe.", "I cannot.", "Here you are."] * 2
    texts = iter(said)
    monkeypatch.setattr(tiny_host, "generate", lambda prompts, **_: [next(texts) for _ in prompts], raising=False)
    monkeypatch.setattr(effects.scores, "nats_gained", lambda host, asked, given: torch.zeros(len(asked)))
    judge = Judge(tiny_host, Lexicon(("bridge",)), 100.0, effects.scores.Relevance(0.1, 0.5, 1.0))
    rows = effects.refusals(tiny_host, [], judge, bundled.requests())
    classes = [row[side] for row in rows for side in ("harmful", "harmless")]
    assert classes == ["refuse", "derail", "comply", "refuse", "comply"] * 2


def test_a_paired_difference_has_the_interval_of_its_pairs():
    found = effects.difference([1.0, 2.0, 3.0] * 20, [0.0, 1.0, 2.0] * 20)
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0}
    found = effects.difference([1.0, 0.0] * 50, [0.0] * 100)
    assert found["low"] < 0.45 and found["high"] > 0.55 and found["value"] == 0.5
