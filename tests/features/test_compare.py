"""Two corpora: p-values against brute force, false discoveries counted, what is planted found, bad input said."""

import itertools
import json
import math

import pytest
import torch

from sae import cli
from sae.documents import Document
from sae.errors import UserError
from sae.features import compare as page
from sae.features.compare import benjamini_hochberg, compare, diff, p_values
from sae.features.labelled import distinct, of_field, of_files
from sae.features.pool import text_blocks
from sae.features.writing import build
from tests.conftest import make_sae
from tests.features.planted import HOOK, maxima_of

SHIPPED = "checkpoints/smollm2-golden-gate"
ANGRY = [
    f"I am furious about the {thing}, how dare you, this makes me angry and full of rage!"
    for thing in ("noise", "bill", "delay", "lies", "mess", "rent", "dog", "paint", "car")
]
HAPPY = [
    f"The {thing} filled us with joy, we smiled and laughed and danced in delight."
    for thing in ("party", "song", "news", "gift", "walk", "cake", "trip", "baby", "sun")
]


def sparse_texts(n, F, rate, seed, levels=None):
    """Maxima of n texts in which every feature fires at a rate, or with a few values only."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, F, generator=generator) + 0.1
    if levels:
        values = (values * levels).ceil()
    return values * (torch.rand(n, F, generator=generator) < rate)


def on_sides(n_a, n_b):
    return torch.arange(n_a + n_b) < n_a


def brute_force(dense, n_a):
    """The p-value of each feature over all ways of choosing n_a texts, from AUROCs over pairs."""
    n = len(dense)

    def distances(chosen):
        a = torch.zeros(n, dtype=torch.bool)
        a[list(chosen)] = True
        p, q = dense[a], dense[~a]
        return ((p[:, None] > q).double() + 0.5 * (p[:, None] == q) - 0.5).sum((0, 1)).abs()

    every = torch.stack([distances(chosen) for chosen in itertools.combinations(range(n), n_a)])
    return (every >= distances(range(n_a)) - 1e-9).double().mean(0)


# ---- p-values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("levels", [None, 2])
def test_p_values_are_those_of_all_permutations(n_a, n_b, levels):
    dense = sparse_texts(n_a + n_b, 23, 0.5, seed=n_a, levels=levels)
    dense[:, 4], dense[:, 5] = 0, torch.rand(n_a + n_b)  # never, and in every text
    dense[:, 6] = on_sides(n_a, n_b).float()
    found = compare(maxima_of(dense), on_sides(n_a, n_b), torch.ones(23))
    assert torch.allclose(found.p, brute_force(dense, n_a), atol=1e-9)
    assert found.p[4] == 1
    assert not found.fired[4]


@pytest.mark.parametrize(("n_a", "N", "within"), [(20, 40, (0.75, 1.6)), (8, 60, (0.95, 1.1)), (10, 200, (0.94, 1.1))])
def test_with_more_firing_texts_p_is_near_the_exact_one_where_the_normal_is_far_off(n_a, N, within, monkeypatch):
    m = page.EXACT + 1
    place = torch.arange(1.0, m + 1).double()
    subsets = (torch.arange(2**m)[:, None] >> torch.arange(m) & 1).double()
    U = (subsets @ place + page._rest(subsets.sum(1), N - m, n_a)).unique()[::3]
    features = torch.arange(len(U)).repeat_interleave(m)
    given = (features, place.repeat(len(U)), torch.zeros(len(U), dtype=torch.float64), U, n_a, N - n_a)
    blocks = p_values(*given)
    monkeypatch.setattr(page, "EXACT", m)
    exact = p_values(*given)
    told = (exact > 1e-6) & (exact < 0.05)
    ratio = blocks[told] / exact[told]
    assert told.sum() > 20
    assert within[0] < ratio.min()
    assert ratio.max() < within[1]


def test_without_silent_texts_it_is_the_textbook_s_test_with_ties_and_continuity():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(1, 9, (44,), generator=generator).double()
    n_a, n_b, N = 17, 27, 44
    p, q = values[:n_a], values[n_a:]
    U = float(((p[:, None] > q).double() + 0.5 * (p[:, None] == q)).sum())
    size = torch.bincount(values.long()).double()
    deviation = math.sqrt(n_a * n_b / 12 * (N + 1 - float((size**3 - size).sum()) / (N * (N - 1))))
    textbook = math.erfc((abs(U - n_a * n_b / 2) - 0.5) / deviation / math.sqrt(2))
    found = compare(maxima_of(values[:, None].float()), on_sides(n_a, n_b), torch.ones(1))
    assert float(found.p[0]) == pytest.approx(textbook, rel=1e-9)


def test_with_all_firing_texts_tied_it_is_fisher_s_exact_test():
    n_a, n_b, m, in_a = 20, 180, 30, 9
    dense = torch.zeros(200, 1)
    dense[:in_a] = 1
    dense[n_a : n_a + m - in_a] = 1
    ways = [math.comb(m, j) * math.comb(200 - m, n_a - j) / math.comb(200, n_a) for j in range(n_a + 1)]
    fisher = sum(way for j, way in enumerate(ways) if abs(j - 3) >= in_a - 3)  # 3 are expected
    found = compare(maxima_of(dense), on_sides(n_a, n_b), torch.ones(1))
    assert float(found.p[0]) == pytest.approx(fisher, rel=1e-6)


def test_auroc_shares_and_difference_are_those_counted_text_by_text():
    dense, a = sparse_texts(37, 13, 0.4, seed=1, levels=3), on_sides(11, 26)
    unit = torch.rand(13) + 1
    found = compare(maxima_of(dense), a, unit)
    p, q = dense[a], dense[~a]
    assert torch.allclose(found.auroc, ((p[:, None] > q).double() + 0.5 * (p[:, None] == q)).mean((0, 1)))
    assert torch.allclose(found.share_a, (p > 0).float().mean(0))
    assert torch.allclose(found.share_b, (q > 0).float().mean(0))
    assert torch.allclose(found.mean_difference, (p.mean(0) - q.mean(0)) / unit, atol=1e-6)
    swapped = compare(maxima_of(dense), ~a, unit)
    assert torch.allclose(swapped.p, found.p, rtol=1e-6)
    assert torch.allclose(swapped.auroc, 1 - found.auroc)


def test_a_feature_that_training_never_saw_firing_is_measured_by_its_largest_maximum_here():
    dense = torch.tensor([[4.0], [0.0], [2.0], [0.0]])
    assert float(compare(maxima_of(dense), on_sides(2, 2), torch.zeros(1)).mean_difference) == pytest.approx(0.25)


# ---- false discoveries -------------------------------------------------------------------------


def test_the_procedure_finds_four_in_the_example_of_benjamini_and_hochberg():
    p = torch.tensor([0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
                      0.6528, 0.7590, 1.0], dtype=torch.float64)  # fmt: skip
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    q = torch.empty_like(p)
    q[shuffled] = benjamini_hochberg(p[shuffled])
    assert (q <= 0.05).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert q[:4].tolist() == pytest.approx([0.0015, 0.003, 0.0095, 0.035625])
    assert q[5] == pytest.approx(0.0298 * 15 / 7)  # a later one scales to less
    assert len(benjamini_hochberg(p[:0])) == 0


def test_without_a_difference_p_is_uniform_and_almost_nothing_is_discovered():
    discoveries, ps = [], []
    for seed in range(40):
        dense = sparse_texts(70, 300, 0.02 + 0.9 * torch.rand(300, generator=torch.Generator().manual_seed(seed)), seed)
        found = compare(maxima_of(dense), on_sides(25, 45), torch.ones(300))
        discoveries.append(found.discoveries(0.05))
        ps.append(found.p[found.fired & ((dense > 0).sum(0) > 8)])
    p = torch.cat(ps)
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):  # discrete p-values lie a little above uniform ones, never below
        assert 0.85 * level - 0.002 < (p <= level).double().mean() < 1.05 * level + 0.002
    assert sum(count > 0 for count in discoveries) <= 6  # 2 of 40 are expected, 7 have a chance of 0.3 %


def test_a_planted_feature_passes_and_a_thousand_silent_ones_are_not_counted_as_tests():
    dense = torch.zeros(40, 1100)
    dense[:, :100] = sparse_texts(40, 100, 0.3, seed=3)
    dense[:18, 7] = 2.0
    dense[18:, 7] = 0
    found = compare(maxima_of(dense), on_sides(18, 22), torch.ones(1100))
    assert (found.q <= 0.05).nonzero().flatten().tolist() == [7]
    assert int(found.fired.sum()) == 100
    assert found.auroc[7] == 1


# ---- texts -------------------------------------------------------------------------------------


def plain(*texts, group=None):
    return [Document(text, group or text) for text in texts]


def test_repeats_are_dropped_and_texts_of_both_sides_from_both():
    a, b = [f"a {i}" for i in range(9)], [f"b {i}" for i in range(8)]
    made = distinct({"A": plain(*a, "a  3", " a 4\n", "both"), "B": plain(*b, "both", "both")})
    assert made.texts == a + b
    assert made.labels == [0] * 9 + [1] * 8
    assert (made.repeats, made.contested) == (3, 1)


def test_texts_of_one_group_are_one_unit_where_there_are_groups_enough():
    a = [Document(f"a {i}", f"prompt {i // 2}") for i in range(10)]
    made = distinct({"A": a, "B": plain(*(f"b {i}" for i in range(8)))})
    assert made.sharing == 10
    assert made.units(5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, *range(5, 13)]
    assert made.units(6) == list(range(18))


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, capsys):
    for name, texts in (
        ("a", ANGRY),
        ("few", HAPPY[:7]),
        ("joy", HAPPY),
        ("same", ANGRY),
        ("empty", []),
        ("twice", HAPPY[:7] * 2),
    ):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    (tmp_path / "twice.txt").write_text("\n\n".join(HAPPY[:7] * 2))
    rows = [{"text": text, "mood": i % 2, "one": "x"} for i, text in enumerate(ANGRY + HAPPY)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "holes.jsonl").write_text(json.dumps({"text": "a", "mood": None}))
    at = {path.stem: str(path) for path in tmp_path.iterdir()}
    cases = {
        ("diff", SHIPPED, at["a"], at["few"]): "few.txt: 7 different texts, 8 are needed",
        ("diff", SHIPPED, at["a"], at["twice"]): "7 more were repeats",
        ("diff", SHIPPED, at["a"], at["a"]): "given twice",
        ("diff", SHIPPED, at["a"], at["same"]): "9 stand in several classes",
        ("diff", SHIPPED, at["a"], at["empty"]): "holds no text",
        ("diff", SHIPPED, at["a"], "nowhere.txt"): "no such file",
        ("diff", SHIPPED, at["a"]): "B is missing",
        ("diff", SHIPPED, at["a"], at["joy"], "--index", "none"): "no index",
        ("classify", SHIPPED, at["a"]): "one class alone",
        ("classify", SHIPPED, at["rows"], "--label", "moood"): "did you mean 'mood'?",
        ("classify", SHIPPED, at["rows"], "--label", "one"): "every 'one' is 'x'",
        ("classify", SHIPPED, at["holes"], "--label", "mood"): "row 1 holds None",
        ("classify", SHIPPED, at["a"], "--label", "mood"): "plain text",
        ("classify", SHIPPED, at["a"], at["rows"], "--label", "mood"): "one file",
        ("classify", SHIPPED, at["a"], at["rows"], "--k", "1,0"): "--k is '1,0'",
    }
    for words, part in cases.items():
        assert cli.main(list(words)) == 2, words
        said = capsys.readouterr().err
        assert part in said, words
        assert said.count("\n") == 1
    assert of_field(at["rows"], "mood").classes == ["0", "1"]
    assert of_files([at["a"], at["joy"]]).contested == 0
    with pytest.raises(UserError, match="chats or token ids"):
        distinct({"A": plain(*ANGRY), "B": [Document("", "g", tokens=(1, 2))]})
    with pytest.raises(UserError, match="one side is empty"):
        compare(maxima_of(torch.ones(3, 2)), on_sides(3, 0), torch.ones(2))


# ---- with a model ------------------------------------------------------------------------------


def test_on_a_small_host_every_figure_belongs_to_its_feature_and_example(tiny_host, tmp_path):
    sae = make_sae(hook_name=HOOK, model_name="tiny-llama")
    texts = distinct({"A": plain(*ANGRY, "x"), "B": plain(*HAPPY)})
    read = []
    found = diff(sae, tiny_host, texts, n=3, progress=read.append)
    assert sum(read) > 200
    assert found.texts.unread == 1  # a single token is the first of its text, and never counted
    assert found.shuffled < 5 < found.discoveries  # two templates of words, so that many features go together
    for side, label in ((found.more_in_a, 0), (found.more_in_b, 1)):
        assert len(side) == 3
        for one in side:
            assert (one.auroc > 0.5) == (label == 0)
            firing = [token for token in one.strongest.tokens if token.firing]
            assert len(firing) == 1
            context = "".join(token.text for token in one.strongest.tokens).strip()
            assert any(context in text for text in (ANGRY, HAPPY)[label])
            assert one.strongest.act > 0
            assert one.example is None
            assert len(one.promotes) == 5
    ps = [one.p for one in found.more_in_a]
    assert ps == sorted(ps)

    vocabulary = tiny_host.text_of(list(range(len(tiny_host.tokenizer))))
    blocks = text_blocks(HAPPY, sae, tiny_host)
    index = build(sae, blocks, plain(*HAPPY), vocabulary, tmp_path / "index", hook=HOOK)
    shown = diff(sae, tiny_host, texts, n=2, index=index).more_in_b[0]
    assert shown.example is not None
    assert shown.example.act == pytest.approx(shown.strongest.act, rel=1e-3)  # the same texts
    with pytest.raises(UserError, match="another SAE"):
        diff(make_sae(hook_name=HOOK, seed=1), tiny_host, texts, index=index)


def test_the_verb_tells_anger_from_joy_with_the_real_model(host, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae.run.host_of", lambda sae: host)
    (tmp_path / "anger.txt").write_text("\n\n".join([*ANGRY, ANGRY[0]]))
    (tmp_path / "joy.txt").write_text("\n\n".join(HAPPY))
    words = ["diff", SHIPPED, str(tmp_path / "anger.txt"), str(tmp_path / "joy.txt"), "-n", "3"]
    assert cli.main([*words, "--json", str(tmp_path / "o.json")]) == 0
    said = capsys.readouterr().out
    assert "1 repeats left out" in said
    assert "pass a false-discovery rate of 0.05; with the sides shuffled 0 do" in said
    assert "more in" in said
    made = json.loads((tmp_path / "o.json").read_text())
    assert made["discoveries"] > 20
    assert [one["auroc"] for one in made["more_in_a"]] == [1, 1, 1]
    assert [one["auroc"] for one in made["more_in_b"]] == [0, 0, 0]
    assert made["more_in_a"][0]["q"] < 0.01
    assert "«" in made["more_in_a"][0]["strongest"]
