"""Probes: the regression against known solutions, no leaks between folds, noise is chance, what is planted found."""

import json
import math

import pytest
import torch

from sae import cli
from sae.documents import Document
from sae.features import probe as page
from sae.features.labelled import distinct
from sae.features.logistic import PENALTIES, logistic
from sae.features.probe import (
    Pooled,
    bag_of_words,
    classify,
    columns,
    designs,
    folds,
    most_different,
    out_of_fold,
    pooled,
    score,
    weighted_auroc,
)
from tests.conftest import make_sae
from tests.features.planted import HOOK, maxima_of
from tests.features.test_compare import ANGRY, HAPPY, SHIPPED, plain


def noise(n, F=400, seed=0, rate=0.2):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, F, generator=generator) * (torch.rand(n, F, generator=generator) < rate)
    residual = {"mean": torch.randn(n, 5, generator=generator)}
    return dense, lambda: Pooled(maxima_of(dense), residual, torch.randn(n, 90, generator=generator))


def alone(n):
    return torch.arange(n)


# ---- the regression ----------------------------------------------------------------------------


def test_of_one_feature_that_is_on_or_off_the_weights_are_the_log_odds_of_the_table():
    x = torch.tensor([1.0] * 20 + [0.0] * 30)[:, None]
    y = torch.tensor([True] * 15 + [False] * 5 + [True] * 6 + [False] * 24)
    weight, intercept = logistic(x, y, [1e9])[0].tolist()
    assert intercept == pytest.approx(math.log(6 / 24), rel=1e-6)
    assert weight == pytest.approx(math.log(15 / 5) - math.log(6 / 24), rel=1e-6)


def test_the_gradient_of_the_loss_as_autograd_knows_it_vanishes_for_every_penalty():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(37, 24, generator=generator, dtype=torch.float64)  # separable
    y = torch.rand(37, generator=generator) < 0.4
    for C, theta in zip(PENALTIES, logistic(X, y), strict=True):
        theta = theta.clone().requires_grad_()
        z = X @ theta[:-1] + theta[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="sum")
        (loss + theta[:-1].square().sum() / (2 * C)).backward()
        assert theta.grad is not None
        assert theta.grad.abs().max() < 1e-6


def test_the_intercept_is_not_penalised_and_a_fit_has_the_same_bits_twice():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 3, generator=generator)
    y = X[:, 0] + torch.randn(40, generator=generator) > 0
    plain, moved = logistic(X, y), logistic(X.double() + 50, y)
    assert torch.allclose(plain[:, :-1], moved[:, :-1], atol=1e-6)
    assert torch.equal(plain, logistic(X, y))


def test_turning_the_columns_to_the_span_of_the_training_texts_changes_no_prediction():
    generator = torch.Generator().manual_seed(2)
    X, train = torch.randn(30, 50, generator=generator, dtype=torch.float64), torch.arange(30) < 20
    y = torch.rand(30, generator=generator) < 0.5
    turned = page._rotated(X, train)
    assert turned.shape == (30, 20)
    for theta, other in zip(logistic(X[train], y[train]), logistic(turned[train], y[train]), strict=True):
        assert torch.allclose(X @ theta[:-1] + theta[-1], turned @ other[:-1] + other[-1], atol=1e-6)


# ---- folds -------------------------------------------------------------------------------------


def test_folds_never_part_a_unit_and_spread_every_class():
    labels = torch.tensor([0] * 31 + [1] * 12)
    units = torch.tensor([i // 3 for i in range(31)] + [100 + i // 2 for i in range(12)])
    fold = folds(labels, units, 5)
    for unit in units.unique():
        assert len(fold[units == unit].unique()) == 1
    for label, most in ((0, 9), (1, 4)):
        count = torch.bincount(fold[labels == label], minlength=5)
        assert count.min() >= 2
        assert count.max() <= most
    assert torch.equal(fold, folds(labels, units, 5))
    assert not torch.equal(fold, folds(labels, units, 5, seed=1))


def test_features_are_chosen_by_training_texts_alone():
    dense, _ = noise(40)
    y, train = torch.arange(40) % 2 == 0, torch.arange(40) < 30
    dense[:, 7], dense[:, 9] = 0, 0
    dense[:30, 7] = y[:30].float()
    dense[30:, 9] = 5 * y[30:].float()  # tells the classes of the test texts, and of no other
    chosen = most_different(maxima_of(dense), train, y, 400).tolist()
    assert chosen[0] == 7
    assert 9 not in chosen
    changed = dense.clone()
    changed[30:] = torch.rand(10, 400)
    assert most_different(maxima_of(changed), train, y, 400).tolist() == chosen
    assert most_different(maxima_of(dense), train, y, 3).tolist() == chosen[:3]
    X = columns(maxima_of(dense), torch.tensor(chosen[:3]))
    assert torch.equal(X, dense[:, chosen[:3]].double())


def test_a_feature_of_small_values_counts_as_much_as_one_of_large_ones():
    y = torch.arange(20) < 10
    dense = torch.zeros(20, 3)
    dense[:10, 0] = 0.01
    dense[:6, 1] = 100.0
    dense[:, 2] = 50.0
    assert most_different(maxima_of(dense), torch.ones(20).bool(), y, 3).tolist() == [0, 1, 2]


def aurocs_of_noise(made_of):
    found = {}
    for seed in range(8):
        _, data = noise(48, seed=seed)
        labels = (torch.randperm(48, generator=torch.Generator().manual_seed(seed)) < 24).long()
        for name, scores in out_of_fold(made_of(data(), labels), labels, alone(48)).items():
            found.setdefault(name, []).append(score(name, scores, labels, alone(48)).auroc.value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_of_noise_every_probe_makes_chance_and_one_whose_features_saw_the_test_fold_would_not():
    honest = aurocs_of_noise(lambda data, labels: designs(data, [2, 5]))

    def leaking(data, labels):
        best = most_different(data.maxima, torch.ones(48).bool(), labels == 0, 5)
        X = columns(data.maxima, best)
        return lambda train, y: {"leaking": page._standard(X, train)}

    assert set(honest) == {"2 features", "5 features", "residual, mean", "bag of words"}
    for name, mean in honest.items():
        assert 0.3 < mean < 0.6, name  # folds pull a little below a half; 8 values, standard error some 0.03
    assert aurocs_of_noise(leaking)["leaking"] > 0.8


def test_the_penalty_is_chosen_without_a_look_at_the_test_fold():
    dense, data = noise(40)
    y, train = torch.arange(40) % 2 == 0, torch.arange(40) < 30
    seen = []

    def made(mask, of):
        seen.append(mask.clone())
        return designs(data(), [1])(mask, of)

    page.choose_penalty(made, train, y, alone(40), 0)
    assert len(seen) == page.INNER
    assert not any(mask[30:].any() for mask in seen)
    assert torch.stack(seen).sum(0)[:30].tolist() == [page.INNER - 1] * 30


# ---- figures -----------------------------------------------------------------------------------


def test_weighted_auroc_is_that_of_repeated_texts():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 6, (23,), generator=generator).double()
    positive = torch.rand(23, generator=generator) < 0.4
    weights = torch.randint(0, 4, (9, 23), generator=generator)
    for i, found in enumerate(weighted_auroc(scores, positive, weights.double())):
        s, y = scores.repeat_interleave(weights[i]), positive.repeat_interleave(weights[i])
        p, q = s[y], s[~y]
        assert found == pytest.approx(float(((p[:, None] > q).double() + 0.5 * (p[:, None] == q)).mean()))


def test_figures_are_shares_of_texts_with_intervals_over_units():
    labels = torch.tensor([0] * 30 + [1] * 10)
    p = torch.tensor([0.9] * 24 + [0.2] * 6 + [0.8] * 2 + [0.1] * 8).double()
    scores = torch.stack([p, 1 - p], 1)
    found = score("x", scores, labels, alone(40))
    assert found.accuracy.value == pytest.approx(32 / 40)
    assert found.balanced.value == pytest.approx(0.8)
    for figure in (found.accuracy, found.balanced, found.auroc):
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < figure.value < figure.high
    few = score("x", scores, labels, alone(40) // 4)  # 10 units of 4 texts that go together
    assert few.accuracy.low is not None
    assert found.accuracy.low is not None
    assert few.accuracy.low < found.accuracy.low


def test_words_are_counted_where_two_texts_hold_them():
    X = bag_of_words(["The sea, the SEA", "the lake", "a hill"])
    assert X.shape == (3, 1)
    assert X[:, 0].tolist() == [1, 1, 0]


# ---- the whole ---------------------------------------------------------------------------------


def test_a_planted_feature_is_found_with_k_of_one_and_noise_beside_it_is_chance():
    dense, data = noise(45)
    texts = distinct({name: plain(*(f"{name} {i}" for i in range(15))) for name in "ABC"})
    for c in range(3):
        dense[:, 50 + c] = 0
        dense[15 * c : 15 * c + 15, 50 + c] = 3.0
        dense[15 * c, 50 + c] = 0  # one text of each class without it
    told = []
    found = classify(texts, data(), widths=[2, 1, 1], progress=told.append)
    assert len(told) == 3 * page.FOLDS
    assert sum(told) == 3 * 45
    by_name = {one.probe: one for one in found.scores}
    assert list(by_name) == ["majority class", "1 feature", "2 features", "residual, mean", "bag of words"]
    assert by_name["1 feature"].auroc.value > 0.93
    assert by_name["1 feature"].accuracy.value > 0.9
    assert by_name["majority class"].accuracy.value == pytest.approx(1 / 3)
    assert by_name["majority class"].auroc.value == 0.5
    assert by_name["residual, mean"].auroc.value < 0.7
    for c, name in enumerate("ABC"):
        (best,) = found.chosen[name][1]
        assert (best.feature, best.folds) == (50 + c, 5)
        assert best.weight > 0
    assert json.loads(json.dumps(found.to_dict()))["chosen"]["B"]["1"][0]["feature"] == 51


def test_texts_of_one_prompt_help_no_probe_to_know_each_other(monkeypatch):
    dense, data = noise(40)
    dense[:] = 0
    for unit in range(20):  # a feature for each prompt, and nothing for its class
        dense[2 * unit : 2 * unit + 2, unit] = 5.0
    texts = distinct({name: [Document(f"{name} {i}", f"{name} {i // 2}") for i in range(20)] for name in "AB"})
    together = classify(texts, data(), widths=[20])
    monkeypatch.setattr("sae.features.labelled.Labelled.units", lambda self, fewest: list(range(40)))
    apart = classify(texts, data(), widths=[20])
    assert (together.units, apart.units) == (20, 40)
    assert apart.scores[1].auroc.value > 0.7
    assert together.scores[1].auroc.value < 0.65


def test_pooling_over_the_small_host_is_that_of_each_text_alone(tiny_host):
    sae = make_sae(hook_name=HOOK, model_name="tiny-llama")
    texts = distinct({"A": plain("x", *ANGRY), "B": plain(*HAPPY)})
    kept, data = pooled(sae, tiny_host, texts)
    assert kept.texts == ANGRY + HAPPY
    for i in (0, 12):
        tokens = tiny_host.tokenizer(kept.texts[i], return_tensors="pt").input_ids
        acts = tiny_host.activations(tokens, [HOOK])[HOOK][0, 1:].float()
        assert torch.allclose(data.residual["mean"][i], acts.mean(0), rtol=2e-2, atol=2e-2)
        assert torch.allclose(data.residual["max"][i], acts.max(0).values, rtol=2e-2, atol=5e-2)
    assert len(data) == 18


def test_the_verb_tells_classes_apart_with_the_real_model(host, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae.run.host_of", lambda sae: host)
    rows = [{"text": text, "mood": mood} for mood, texts in (("anger", ANGRY), ("joy", HAPPY)) for text in texts]
    (tmp_path / "moods.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    words = ["classify", SHIPPED, str(tmp_path / "moods.jsonl"), "--label", "mood", "--k", "1,5"]
    assert cli.main([*words, "--json", str(tmp_path / "o.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("texts: 9 anger, 9 joy; 1 repeats left out")
    assert "for anger, the probe on 5 features, fitted on all texts" in said
    made = json.loads((tmp_path / "o.json").read_text())
    auroc = {one["probe"]: one["auroc"]["value"] for one in made["scores"]}
    assert auroc["majority class"] == 0.5
    assert min(auroc[name] for name in auroc if name != "majority class") > 0.95  # templates: easy for everyone
    assert [len(made["chosen"]["anger"][k]) for k in ("1", "5")] == [1, 5]

    for name, texts in (("a", ANGRY), ("b", HAPPY)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    assert cli.main(["classify", SHIPPED, str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--k", "2"]) == 0
    assert "the probe on 2 features" in capsys.readouterr().out
