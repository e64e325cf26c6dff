"""A planted feature is found, noise is not, and what cannot be searched is said."""

from types import SimpleNamespace

import pytest
import torch

from sae.errors import UserError
from sae.features.concept import characteristic_words, matching
from sae.features.contrast import auroc
from sae.features.index import IndexedDocument
from sae.features.rows import Shown
from sae.features.search import find
from sae.features.showing import neighbours, show
from sae.features.writing import build
from tests.features.planted import HOOK, VOCABULARY, columns, identity_sae

F, PLANTED, TOKEN_ONLY, DENSE = 24, 7, 9, 11
FORMS = ("essay", "letter", "joke")


def documents(n: int, n_positive: int) -> list[IndexedDocument]:
    return [
        IndexedDocument(
            f"number {i} speaks of the " + ("Golden Gate Bridge in fog" if i < n_positive else "weather and the sea"),
            topic="the bridge" if i < n_positive else f"topic {i % 5}",
            form=FORMS[i % 3],
            group=f"group {i}",
        )
        for i in range(n)
    ]


@pytest.fixture
def planted(tmp_path):
    """90 documents, the first 30 about the bridge; PLANTED fires once in exactly those, DENSE on half of the
    tokens."""
    n, length = 90, 40
    block = columns(n, length, F)
    acts = block.acts[HOOK].abs()
    acts[torch.rand(acts.shape, generator=torch.Generator().manual_seed(1)) > 0.03] = 0
    acts[:, PLANTED] = 0
    acts[:, DENSE] = 0
    for j in range(30):
        rows = (block.doc == j).nonzero().flatten()
        acts[rows[5], PLANTED] = 4.0 + j / 100
        acts[rows[1::2], DENSE] = 9.0
    block.acts[HOOK] = acts
    return build(identity_sae(F, 6), [block], documents(n, 30), VOCABULARY, tmp_path / "index", hook=HOOK)


def test_a_planted_feature_ranks_first_with_auroc_one(planted):
    best = find(planted, "golden gate bridge")[0]
    assert best.feature == PLANTED
    assert best.auroc == best.auroc_choosing == best.sensitivity == 1
    assert best.mean_difference == pytest.approx(1, abs=0.1)
    assert best.output_score is None
    assert best.writes is None
    assert 0 < best.positives < 30
    assert 0 < best.negatives < 60
    assert best.examples[0].act == pytest.approx(4.29)
    assert [token.firing for token in best.examples[0].tokens].count(True) == 1
    assert "«" in best.to_dict()["examples"][0]["text"]


def test_dense_features_come_after_all_others_however_well_they_separate(planted):
    ranked = [found.feature for found in find(planted, "bridge", n=F)]
    assert planted.stats["density"][DENSE] > 0.05
    sparse = [f for f in range(F) if planted.stats["density"][f] < 0.05]
    assert set(ranked[: len(sparse)]) == set(sparse)


def test_on_a_concept_that_nothing_knows_the_reported_auroc_is_chance(planted, monkeypatch):
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(2)).tolist()
    own = documents(90, 30)
    planted.documents = [own[i] for i in shuffled]
    reported = [found.auroc for seed in range(8) for found in find(planted, "bridge", n=3, seed=seed)]
    assert abs(sum(reported) / len(reported) - 0.5) < 0.08  # 24 values with a standard error of some 0.02


def test_auroc_equals_the_count_over_all_pairs_with_ties_at_zero_as_one_block():
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randint(0, 4, (37, 13), generator=generator).float() * (
        torch.rand(37, 13, generator=generator) > 0.4
    )
    pooled[:, 3] = 0
    pooled[:, 4] = 1
    positive = torch.arange(37) < 11
    p, q = pooled[positive], pooled[~positive]
    exact = ((p[:, None] > q).double() + 0.5 * (p[:, None] == q)).mean((0, 1))
    rows, features = pooled.nonzero(as_tuple=True)
    found = auroc(features, pooled[rows, features], positive[rows], 11, 26, 13)
    assert torch.allclose(found.double(), exact, atol=1e-6)
    assert found[3] == found[4] == 0.5


def test_auroc_without_any_firing_text_is_one_half():
    none = torch.zeros(0, dtype=torch.int64)
    assert auroc(none, torch.zeros(0), none.bool(), 5, 5, 3).tolist() == [0.5, 0.5, 0.5]


def test_fewer_than_eight_texts_are_refused_with_their_count(planted):
    with pytest.raises(UserError, match=r"1 of 90 indexed texts hold 'number 17', 8 are needed.*--pos"):
        find(planted, "number 17")
    with pytest.raises(UserError, match="nothing to look for"):
        find(planted)
    with pytest.raises(UserError, match="holds no word"):
        find(planted, " ?!")
    with pytest.raises(UserError, match="'loud' is not one of detect, steer"):
        find(planted, "bridge", goal="loud")
    with pytest.raises(UserError, match="Give the host and the SAE"):
        find(planted, pos=["a"] * 9)
    with pytest.raises(UserError, match="holds no output scores"):
        find(planted, "bridge", goal="steer")


def test_a_concept_is_matched_as_words_with_plurals_and_hyphens_and_not_inside_other_words():
    texts = [
        IndexedDocument(text)
        for text in ("Anger!", "danger", "two e-mails", "an EMAIL", "gate, golden", "golden\ngate")
    ]
    assert matching(texts, "anger") == [0]
    assert matching(texts, "email") == [2, 3]
    assert matching(texts, "e-mail") == [2, 3]
    assert matching(texts, "golden gate", 1) == [5]
    assert matching(texts, "golden gate", 2) == [4, 5]  # too few hold the phrase: all its words, in any order
    assert matching([IndexedDocument("", topic="Golden Gate")], "golden gate", 1) == [0]


def test_an_index_finds_as_the_function_does(planted):
    assert planted.find("bridge", n=3, seed=1) == find(planted, "bridge", n=3, seed=1)


def test_one_seed_gives_one_answer(planted):
    assert find(planted, "bridge", seed=3) == find(planted, "bridge", seed=3)


def test_words_are_characteristic_when_they_separate_the_texts():
    words = characteristic_words(["the golden bridge"] * 20, ["the sea"] * 20)
    assert set(words) == {"golden", "bridge"}
    assert max(words.values()) == 1


def test_steering_order_prefers_the_feature_that_writes_the_concept(planted):
    """Two features detect; the one whose promoted tokens are the concept's and which says them comes
    first."""
    _, features, _ = planted.maxima.select(torch.arange(90))
    assert int((features == PLANTED).sum()) == 30
    vocabulary = [f" t{i}" for i in range(50)]
    vocabulary[3], vocabulary[4] = " Bridge", " the"
    planted.vocab = vocabulary
    other = find(planted, "bridge", n=2)[1].feature
    top = torch.full((F, 20), 4)
    top[other] = 3
    planted.lens = {
        "top": top,
        "top_values": torch.ones(F, 20),
        "output_score": torch.full((F,), 0.5),
        "says": top[:, :10],
        "says_p": torch.full((F, 10), 0.05),
    }
    detect, steer = find(planted, "bridge", n=2), find(planted, "bridge", n=2, goal="steer")
    assert detect[0].feature == PLANTED
    assert steer[0].feature == other
    assert steer[0].writes == pytest.approx((1 + 0.5) / 2)
    assert detect[0].writes == 0
    assert steer[0].top_tokens[0] == " Bridge"


def test_own_texts_are_run_through_host_and_sae(tiny_host, tmp_path):
    """A feature that looks for the token ' bridge' separates texts with it from others, given or indexed."""
    from sae.activations.harvest import stream
    from sae.text import Document, pack
    from tests.conftest import make_sae

    token = tiny_host.tokenizer(" bridge", add_special_tokens=False)["input_ids"][0]
    sae = make_sae(d_in=32, d_sae=96, k=6)
    hook = "blocks.0.hook_resid_pre"
    row = tiny_host.model.get_input_embeddings().weight[token].detach()
    sae.encoder[PLANTED] = 10 * row / row.norm()
    sae.b_enc[PLANTED] = -9.5 * row.norm()
    sae.b_dec.zero_()
    with_it = [f"We saw number {i} near the bridge in the fog." for i in range(12)]
    without = [f"We saw number {i} near the river in the fog." for i in range(12)]
    documents = [Document(text, group=text) for text in [*with_it, *without]]
    rows = pack(documents, tiny_host.tokenizer, 64, special_ids=tiny_host.special_ids)
    strings = tiny_host.text_of(list(range(len(tiny_host.tokenizer))))
    index = build(
        sae,
        stream(tiny_host, rows, [hook]),
        documents,
        strings,
        tmp_path / "i",
        hook=hook,
        host=tiny_host,
        scores=False,
    )
    for query in (
        {"concept": "bridge"},
        {"concept": "bridge", "goal": "steer"},
        {"pos": with_it, "neg": without},
        {"pos": with_it, "concept": "bridge"},
    ):
        found = find(index, sae=sae, host=tiny_host, **query)
        assert found[0].auroc == 1 if query.get("goal") != "steer" else True
        assert PLANTED in [one.feature for one in found]
        best = next(one for one in found if one.feature == PLANTED)
        assert all(example.tokens[-1].text for example in best.examples)
        assert [t.text.strip() for t in best.examples[0].tokens if t.firing] == ["bridge"]
    assert find(index, "bridge", sae=sae, host=tiny_host, goal="steer")[0].output_score is not None
    with pytest.raises(UserError, match="3 positive texts, 8 are needed.*split at empty lines"):
        find(index, pos=with_it[:3], sae=sae, host=tiny_host)
    with pytest.raises(UserError, match="1 positive text, 8"):
        find(index, pos=with_it[:1], sae=sae, host=tiny_host)


def test_the_trial_multiplies_the_maximum_that_steering_multiplies(tiny_host, tmp_path, monkeypatch):
    """The SAE's own statistics where it has them, else the index's."""
    from sae.autoencoder import FeatureStats
    from sae.features import search
    from sae.features.trial import Tried
    from tests.conftest import make_sae

    sae, block = make_sae(d_in=32, d_sae=96, k=6), columns(90, 40, 32)
    vocabulary = [f" t{i}" for i in range(len(tiny_host.tokenizer))]
    index = build(sae, [block], documents(90, 30), vocabulary, tmp_path / "i", hook=HOOK, host=tiny_host, scores=False)
    used, sae.stats = [], None

    def try_out(host, sae, features, hook, max_act, words, weights):
        used.append(max_act)
        return [Tried(0.0, 1.0, []) for _ in features]

    monkeypatch.setattr(search, "try_out", try_out)
    find(index, "bridge", sae=sae, host=tiny_host, goal="steer", n=2)
    sae.stats = FeatureStats(torch.full((96,), 7.0), torch.zeros(96), torch.zeros(96), 10)
    find(index, "bridge", sae=sae, host=tiny_host, goal="steer", n=2)
    assert torch.equal(used[0], index.stats["max_act"])
    assert torch.equal(used[1], torch.full((96,), 7.0))


def test_a_tokens_space_stands_before_its_mark():
    tokens = [("The", False), (" bridge", True), ("'s", False), ("\n", True)]
    shown = Shown(1.0, 0, "", [SimpleNamespace(text=text, firing=firing, act=None) for text, firing in tokens])  # pyright: ignore[reportArgumentType]
    assert shown.marked() == "The «bridge»'s« »"


def test_show_tells_what_is_known_of_one_feature(planted):
    feature = show(planted, PLANTED, identity_sae(F, 6), n=3)
    assert feature.max_act == pytest.approx(4.29)
    assert sum(feature.bands) == 30
    assert len(feature.examples) == 3
    assert len(feature.neighbours) == 3
    assert feature.top_tokens == []
    assert feature.to_dict()["examples"][0]["topic"] == "the bridge"
    with pytest.raises(UserError, match="feature 24 does not exist"):
        show(planted, F)


def test_neighbours_are_the_closest_decoder_rows():
    sae = identity_sae(4, 2)
    sae.W_dec[2] = torch.tensor([0.6, 0.0, 0.8, 0.0])
    assert neighbours(sae, 0, 1) == [(2, pytest.approx(0.6))]


def test_a_trial_prefers_the_feature_that_makes_the_host_write_the_concept(tiny_host):
    """Feature 1's row is the unembedding of ' bridge', feature 0's is noise; loops and silence score low."""
    from sae.features.concept import words_of as _words
    from sae.features.trial import concept_score, try_out
    from tests.conftest import make_sae

    token = tiny_host.tokenizer(" bridge", add_special_tokens=False)["input_ids"][0]
    row = tiny_host.model.get_output_embeddings().weight[token].detach()
    sae = make_sae()
    sae.W_dec[1] = row / row.norm()
    before = tiny_host.generate("Who are you?", max_new_tokens=4, temperature=0)
    tried = try_out(
        tiny_host, sae, [0, 1], "blocks.3.hook_resid_post", torch.full((96,), 1e4), _words, {"bridge": 1.0},
        strengths=(1.0, 2.0), max_new_tokens=5,
    )  # fmt: skip
    assert "bridge" in tried[1].answers[0]
    assert tried[1].score > tried[0].score
    assert len(tried[0].answers) == 2
    assert tiny_host.generate("Who are you?", max_new_tokens=4, temperature=0) == before
    fluent, loop = ["the", "golden", "gate", "is", "red"], ["gate", "golden"] * 20
    weights = {"golden": 1.0, "gate": 1.0}
    assert concept_score(fluent, weights) == 1
    assert concept_score(loop, weights) < 0.1
    assert concept_score([], weights) == concept_score(["red", "sea"], weights) == 0
