"""The atlas on planted embeddings whose neighbours are known, on a tiny host, and on the real one."""

import json

import pytest
import torch

from sae import cli
from sae.errors import UserError
from sae.features import atlas as page
from sae.features.atlas import (
    anisotropy,
    build,
    count_tokens,
    is_tied,
    neighbours,
    of_host,
    query_of,
    score,
    shared_words,
    shipped,
    token_texts,
    word_of,
)
from sae.features.depths import depths, forms_of, joined, pieces_in, place, residuals

CARRIER = "The next word is"
TWENTY = ("Paris", "Rome", "dog", "cat", "red", "blue", "run", "walk", "house", "river", "king", "money", "seven",
          "Monday", "winter", "bread", "wine", "the", "with", "old")  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(shift=0.0, d=24):
    """37 words, each a random row of norm 1 plus `shift` times one common direction; ' london' lies near ' paris', the
    last two are the shortest and the longest row."""
    rows = torch.nn.functional.normalize(noise(37, d), dim=1)
    rows[1] = rows[0] + 0.3 * rows[1]
    E = rows + shift * torch.nn.functional.normalize(noise(d, seed=1), dim=0)
    E[-2:] *= torch.tensor([[0.1], [10.0]])
    texts = [" london", " paris", *(f" w{i}" for i in range(35))]
    return E, texts, torch.full((37,), 5)


def near(atlas, word, view, n=10):
    return [forms[0].text for forms in neighbours(atlas, word, n).words[view]]


# ---- views -----------------------------------------------------------------------------------------------


def test_raw_cosines_and_norms_are_those_of_the_rows():
    E, texts, counts = planted()
    found = neighbours(build(E, texts, counts), "london", 1)
    assert found.words["raw"][0][0].text == " paris"
    assert found.words["raw"][0][0].cosine == pytest.approx(float(torch.cosine_similarity(E[0], E[1], dim=0)), abs=1e-6)
    assert found.words["raw"][0][0].norm == pytest.approx(float(E[1].norm()))
    assert (found.query.text, found.query.count) == (" london", 5)


def test_centring_turns_a_neighbour_away_that_only_shares_the_mean():
    E, texts, counts = planted(shift=1.0)
    E[5] = 1.1 * torch.nn.functional.normalize(noise(24, seed=1), dim=0)  # nothing but the common direction
    atlas = build(E, texts, counts)
    raw, centred = (near(atlas, "london", view, 5) for view in ("raw", "centred"))
    assert raw[:2] == [" paris", texts[5]]
    assert centred[0] == " paris" and texts[5] not in centred
    assert anisotropy(atlas.units["raw"][atlas.kept]) > 0.3
    assert abs(anisotropy(atlas.units["centred"][atlas.kept])) < 0.05


def test_all_but_the_top_loses_the_direction_that_rules_the_rest():
    E, texts, counts = planted()
    loud = torch.nn.functional.normalize(noise(24, seed=2), dim=0)
    sign = torch.where(torch.arange(37) % 2 == 0, 1.0, -1.0)
    atlas = build(E + 4 * sign[:, None] * loud, texts, counts)  # ' paris' has the other sign than ' london'
    assert " paris" not in near(atlas, "london", "centred", 10)
    assert near(atlas, "london", "abtt", 1) == [" paris"]
    assert atlas.removed == 3
    assert float((atlas.units["abtt"][atlas.kept] @ loud).abs().max()) < 0.1


def test_d_grows_with_the_width():
    assert build(noise(40, 640), [f" w{i}" for i in range(40)], torch.ones(40)).removed == 6


def test_mean_and_components_do_not_change_with_rows_that_are_never_seen():
    E, texts, counts = planted()
    more = torch.cat([E, 50 + noise(100, 24)])
    with_junk = build(more, [*texts, *(f" junk{i}" for i in range(100))], torch.cat([counts, torch.zeros(100)]))
    plain = build(E, texts, counts)
    for view, unit in plain.units.items():
        # rows of one matrix in two sizes of product: float32 rounding, and a component's sign
        assert torch.allclose(with_junk.units[view], unit, atol=1e-5), view


def test_anisotropy_is_the_mean_cosine_over_all_pairs():
    unit = torch.nn.functional.normalize(noise(11, 4) + 0.5, dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(11) for j in range(11) if i != j]
    assert anisotropy(unit) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


# ---- which tokens ----------------------------------------------------------------------------------------


def test_unseen_and_special_tokens_and_odd_norms_are_no_neighbours():
    E, texts, counts = planted()
    E[2], E[3], E[4] = E[0] * 1.0, E[0] * 1.0, E[0] * 100  # all closer to ' london' than ' paris' is
    counts[2] = 0
    atlas = build(E, texts, counts, special=[3, 1_000])
    for view in page.VIEWS:
        assert not {texts[2], texts[3], texts[4]} & set(near(atlas, "london", view, 30)), view
    assert near(atlas, "london", "raw", 1) == [" paris"]
    assert 4 in atlas.ids.tolist() and not atlas.kept[atlas.row[4]]


def test_forms_of_one_word_stand_together_and_the_querys_own_forms_apart():
    E, texts, counts = planted()
    texts[2:6] = ["Paris", "London", " LONDON", " PARIS"]
    E[2], E[3] = E[1] + 0.05 * noise(24, seed=3), E[0] + 0.05 * noise(24, seed=4)
    found = neighbours(build(E, texts, counts), "London", 10)
    assert found.query.text == "London"
    assert [form.text for form in found.forms["raw"]] == [" london", " LONDON"]
    assert {form.text for form in found.words["raw"][0]} == {" paris", "Paris", " PARIS"}
    cosines = [form.cosine for form in found.words["raw"][0]]
    assert cosines == sorted(cosines, reverse=True)
    words = [word_of(forms[0].text) for forms in found.words["raw"]]
    assert len(set(words)) == len(words) == 10 and "london" not in words


@pytest.mark.parametrize(
    ("texts", "counts", "query"),
    [
        ([" London", "London", " london"], [1, 9, 9], " London"),
        (["LONDON", "London", " london"], [9, 1, 9], "London"),
        ([" LONDON", " london", "london"], [2, 7, 1], " london"),
        ([" London", "London", " london"], [0, 0, 3], " london"),
    ],
)
def test_the_query_is_the_word_as_written_else_its_most_frequent_form(texts, counts, query):
    E, others, many = planted()
    others[:3] = texts
    many[:3] = torch.tensor(counts)
    assert others[query_of(build(E, others, many), "London")] == query


@pytest.mark.parametrize("text", [" London", "london", " LONDON\n", "LONDON"])
def test_a_word_is_the_same_in_all_its_forms(text):
    assert word_of(text) == "london"


def test_white_space_is_not_one_word():
    assert word_of("  ") != word_of("\n")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("", r"the word is empty \(''\)\. Give one"),
        ("  ", r"the word is empty \('  '\)\. Give one"),
        ("qqq", r"qqq: no form of it is one token here\. Take"),
        ("paris", r"paris: never seen in the text as one token \(' paris'\).*--text"),
    ],
)
def test_a_word_that_cannot_be_looked_up_is_told_why(word, line):
    E, texts, counts = planted()
    counts[1] = 0
    with pytest.raises(UserError, match=line):
        neighbours(build(E, texts, counts), word)


def test_too_little_text_is_refused():
    E, texts, _ = planted()
    with pytest.raises(UserError, match="3 tokens are seen in the text, more than 3 are needed"):
        build(E, texts, (torch.arange(37) < 3).long())


# ---- score -----------------------------------------------------------------------------------------------


def test_the_score_counts_partners_among_the_nearest_and_leaves_out_what_is_not_there():
    E, texts, counts = planted()
    counts[7] = 0
    pairs = {
        "near": [("london", "paris"), ("paris", "london")],
        "far": [("london", "w3"), ("w5", "w9"), ("w4", "nowhere")],
    }
    scores = {one.kind: one for one in score(build(E, texts, counts), pairs, 1)}
    assert scores["near"].precision["raw"].value == 1
    assert (scores["far"].queries, scores["far"].left_out) == (1, 2)  # ' w5' is not seen, 'nowhere' is no token
    assert scores["far"].precision["raw"].value == 0
    assert scores["all"].precision["raw"].value == pytest.approx(2 / 3)
    interval = scores["all"].precision["raw"]
    assert 0 <= interval.low < interval.value < interval.high <= 1


def test_the_score_ranks_a_partner_as_sorting_does():
    E, texts, counts = planted()
    atlas = build(E, texts, counts)
    unit, query = atlas.units["centred"], 8
    order = [i for i in (unit @ unit[query]).argsort(descending=True).tolist() if i != query and atlas.kept[i]]
    partner = texts[order[3]].strip()
    hits = {n: score(atlas, {"a": [("w6", partner)]}, n)[0].precision["centred"].value for n in (3, 4)}
    assert hits == {3: 0, 4: 1}


def test_gain_is_the_paired_difference_to_raw():
    E, texts, counts = planted()
    sign = torch.where(torch.arange(37) % 2 == 0, 1.0, -1.0)
    loud = torch.nn.functional.normalize(noise(24, seed=2), dim=0)
    atlas = build(E + 4 * sign[:, None] * loud, texts, counts)
    one = score(atlas, {"a": [("london", "paris")]}, 3)[0]
    assert (one.precision["raw"].value, one.precision["abtt"].value, one.gain["abtt"].value) == (0, 1, 1)


def test_pairs_without_tokens_are_refused():
    E, texts, counts = planted()
    with pytest.raises(UserError, match="none of 1 pairs"):
        score(build(E, texts, counts), {"a": [("x", "y")]})


def test_the_shipped_lists_are_whole():
    lists = shipped()
    assert sum(map(len, lists.pairs.values())) >= 400
    assert {"capital", "case", "plural"} <= set(lists.pairs)
    for kind, pairs in lists.pairs.items():
        assert len({query for query, _ in pairs}) == len(pairs), kind
        assert all(query != partner for query, partner in pairs), kind
    assert len(set(lists.words)) == len(lists.words) > 300


def test_neighbours_are_compared_as_strings():
    E, texts, counts = planted()
    a = build(E, texts, counts)
    b = build(E.flip(0), [text.upper() for text in texts][::-1], counts)
    assert shared_words(neighbours(a, "london", 4), neighbours(b, "london", 4))["raw"] == tuple(
        text.strip() for text in near(a, "london", "raw", 4)
    )


# ---- hosts -----------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_tokenizer(tiny_host, tmp_path):
    (tmp_path / "a.txt").write_text("London is London.\n\nParis")
    V = len(tiny_host.tokenizer)
    counts = count_tokens(tiny_host, V, str(tmp_path / "a.txt"))
    texts = token_texts(tiny_host, V)
    seen = {texts[i]: int(counts[i]) for i in counts.nonzero().flatten().tolist()}
    assert seen == {"London": 1, " is": 1, " London": 1, ".": 1, "Paris": 1}


def test_counting_ends_after_enough_tokens(tiny_host, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a a a\n\na a a\n\na a a")
    monkeypatch.setattr(page, "MOST_TOKENS", 4)
    assert int(count_tokens(tiny_host, len(tiny_host.tokenizer), str(tmp_path / "a.txt")).sum()) == 6


def test_a_text_of_few_tokens_makes_no_atlas(tiny_host, tmp_path):
    (tmp_path / "a.txt").write_text("London is a city on the river.")
    with pytest.raises(UserError, match=r"a\.txt: holds \d tokens to choose among, expected 100"):
        of_host(tiny_host, str(tmp_path / "a.txt"))


def test_parts_of_characters_have_names_of_their_own(tiny_host):
    texts = token_texts(tiny_host, len(tiny_host.tokenizer))
    assert not any("\ufffd" in text or not text for text in texts)


def test_tied_embeddings_are_told_from_untied_ones(tiny_host):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.host import Host

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=30,
                         tie_word_embeddings=False)  # fmt: skip
    assert is_tied(tiny_host) is True
    assert is_tied(Host.from_model(LlamaForCausalLM(config), tiny_host.tokenizer)) is False


# ---- layers ----------------------------------------------------------------------------------------------


def test_residuals_in_batches_are_those_of_one_sentence_each(tiny_host, monkeypatch):
    monkeypatch.setattr("sae.features.depths._BATCH", 2)
    words = ["London", "LONDON", "dog", "Reykjavik", "cat"]
    read = []
    sites, x = residuals(tiny_host, words, CARRIER, progress=read.append)
    assert sum(read) == 5
    assert sites[0] == "blocks.0.hook_resid_pre" and sites[-1] == "blocks.3.hook_resid_post"
    for i, word in enumerate(words):
        tokens = tiny_host.tokenizer(f"{CARRIER} {word}", return_tensors="pt").input_ids
        acts = tiny_host.activations(tokens, sites)
        for s, site in enumerate(sites):
            assert torch.allclose(x[s, i], acts[site][0, -1], atol=1e-4), (word, site)


def test_the_pieces_of_a_word_are_those_after_the_carrier(tiny_host):
    row, n = pieces_in(tiny_host, CARRIER, "LONDON")
    assert tiny_host.text_of(row[-n:]) == [" L", "OND", "ON"]
    assert tiny_host.text_of(row[:-n]) == ["The", " next", " word", " is"]


def test_a_word_of_no_token_is_refused(tiny_host):
    class Deaf:
        bos_token_id = None

        def __call__(self, text, **_):
            return type("Read", (), {"input_ids": [1, 2]})

    host = type("", (), {"tokenizer": Deaf(), "name": "deaf"})()
    with pytest.raises(UserError, match="'x': deaf's tokenizer makes no token of it"):
        pieces_in(host, CARRIER, "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="the word is empty"):
        depths(tiny_host, " ", TWENTY, CARRIER)


def test_forms_are_each_named_once():
    assert forms_of(" London ") == ["London", "london", "LONDON"]
    assert forms_of("42") == ["42"]


@pytest.mark.parametrize(
    ("rank", "depth"),
    [([1, 1], 0), ([5, 1, 1], 1), ([1, 2, 1], 2), ([1, 1, 2], None), ([3, 2], None)],
)
def test_a_form_has_joined_where_the_rank_is_1_to_the_end(rank, depth):
    assert joined(torch.tensor(rank)) == depth


def test_the_place_of_the_whole_form_is_counted_about_the_mean():
    mean = torch.full((2, 4), 100.0)
    split = mean + torch.tensor([1.0, 0, 0, 0])
    whole = mean + torch.tensor([[1.0, 1, 0, 0], [1, 0.1, 0, 0]])
    listed = mean[:, None] + torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [1, 0, 0.2, 0]])
    rank, cosine = place(split, whole, listed, mean)
    assert rank.tolist() == [3, 1]
    assert cosine[0] == pytest.approx(0.5**0.5, abs=1e-5)


def test_forms_that_split_are_held_against_the_whole_one(tiny_host):
    found = depths(tiny_host, "London", [*TWENTY, "london", "Reykjavik"], CARRIER, 3)
    assert (found.pieces, found.whole, found.listed) == ((" London",), "London", 20)  # itself and what splits left out
    assert [join.form for join in found.joins] == ["london", "LONDON"]
    assert len(found.near) == len(found.sites) == 5 and all(len(words) == 3 for words in found.near)
    assert found.joins[1].pieces == (" L", "OND", "ON")


def test_a_word_without_a_whole_form_joins_nothing(tiny_host):
    found = depths(tiny_host, "Reykjavik", TWENTY, CARRIER, 3)
    assert (found.whole, found.joins) == (None, ())
    assert len(found.pieces) == 4


def test_a_list_of_the_word_alone_is_refused(tiny_host):
    with pytest.raises(UserError, match="the list has 1 other words, expected 2 or more"):
        depths(tiny_host, "London", ["london", "Paris"], CARRIER)


# ---- the real host ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(host):
    return of_host(host)


def test_cities_and_england_are_near_london(host, real):
    found = neighbours(real, "London")
    for view in page.VIEWS:
        words = {word_of(forms[0].text) for forms in found.words[view]}
        assert {"paris", "england"} <= words, view
        assert [form.text for form in found.forms[view]] == ["London"]
    assert is_tied(host) is True


def test_centring_takes_the_common_direction_out_of_the_real_embeddings(real):
    assert anisotropy(real.units["raw"][real.kept]) > 0.2
    assert abs(anisotropy(real.units["centred"][real.kept])) < 0.01


def test_a_split_london_joins_the_whole_one_inside_the_layers_and_not_before(host):
    found = depths(host, "London", TWENTY, CARRIER, 3)
    rank = {join.form: join.rank for join in found.joins}["london"]
    assert int(rank[1:-1].max()) == 1  # after the first layer, up to the one whose output is the next token's
    assert float(found.joins[0].cosine[0]) < float(found.joins[0].cosine[15])
    assert found.near[15][0][0] in ("Paris", "Rome")


# ---- the verb --------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch, tiny_host):
    """Hosts that are asked for by name are the tiny one."""
    monkeypatch.setattr("sae.host.Host.load", lambda name: tiny_host)


def test_the_verb_prints_and_writes_all_of_it(capsys, tmp_path, loaded):
    assert cli.main(["atlas", "London", "--score", "-n", "4", "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    for part in ("tied to the unembedding", "mean cosine of random pairs: raw", "·London (‖e‖", "abtt (D=3)",
                 '"The next word is London"', "LONDON = ·L + OND + ON: ", "precision@4", "opposite"):  # fmt: skip
        assert part in out, part
    (host,) = json.loads((tmp_path / "a.json").read_text())["hosts"]
    assert host["tied"] is True and len(host["neighbours"]["words"]["centred"]) == 4
    assert len(host["depths"]["joins"][0]["rank"]) == len(host["depths"]["sites"]) == 5
    assert {kind["kind"] for kind in host["score"]} >= {"capital", "case", "plural", "all"}


def test_the_verb_compares_two_hosts(capsys, tmp_path, loaded):
    assert cli.main(["atlas", "London", "--host", "a", "b", "-n", "3", "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "a, centred" in out and "b, centred" in out and "near in both, raw: 3 of 3" in out
    comparison = json.loads((tmp_path / "a.json").read_text())["comparison"]
    assert comparison["first"] == comparison["second"] == []
    assert len(comparison["near_in_both"]["abtt"]) == 3


def test_the_verb_follows_a_word_that_no_row_stands_for(capsys, loaded):
    assert cli.main(["atlas", "Reykjavik", "-n", "3"]) == 0
    out = capsys.readouterr().out
    assert "Reykjavik: no form of it is one token" in out and "Reykjavik = ·Rey + k + jav + ik: no form" in out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "nothing to look up. Give a word such as London before --host, or --score."),
        ([""], "the word is empty (''). Give one such as London."),
        (["London", "-n", "0"], "-n is 0, expected 1 or more."),
        (["London", "--host", "a", "b", "c"],
         "--host takes one or two, here are 3 (a, b, c). Put the word before --host."),
        (["London", "Paris"], "'Paris' is one word too many. Write: sae atlas London [--host HOST [OTHER]] | --score"),
    ],
)  # fmt: skip
def test_bad_words_of_the_verb_are_one_line(capsys, argv, line):
    assert cli.main(["atlas", *argv]) == 2
    assert capsys.readouterr().err == f"sae atlas: {line}\n"
