"""By text, token, words, likeness and effect: each finds the feature that was planted, and says what it cannot."""

import sqlite3

import pytest
import torch

from sae.errors import UserError
from sae.features import by_effect, by_likeness, by_text, by_token, by_words, toward, words
from sae.features.index import IndexedDocument
from sae.features.rows import FeatureList
from sae.features.writing import build
from tests.conftest import make_sae
from tests.features.planted import HOOK, VOCABULARY, columns, identity_sae, texts

F, N, LENGTH = 24, 40, 20
ONLY, TOKEN = 3, 17  # the feature that fires on this token and on no other


@pytest.fixture
def index(tmp_path):
    block = columns(N, LENGTH, F)
    acts = block.acts[HOOK].abs()
    acts[torch.rand(acts.shape, generator=torch.Generator().manual_seed(1)) > 0.1] = 0
    acts[:, ONLY] = 5.0 * (block.tokens == TOKEN)
    block.acts[HOOK] = acts
    return build(identity_sae(F, 6), [block], texts(N), VOCABULARY, tmp_path / "index", hook=HOOK)


def test_a_token_finds_the_feature_that_fires_on_it_alone(index):
    found = by_token(index, "T17")  # in another spelling
    assert found[0].feature == ONLY
    assert found[0].score == pytest.approx(1)
    assert found[0].sensitivity == 1
    assert found[0].fires_on == [" t17"]
    assert all(one.score < 0.5 for one in found[1:])
    with pytest.raises(UserError, match="'bridge' is no token of this vocabulary"):
        by_token(index, "bridge")


def test_a_feature_that_fires_on_half_of_the_tokens_occurrences_comes_after_one_that_fires_on_all(tmp_path):
    block = columns(N, LENGTH, F)
    acts = torch.zeros_like(block.acts[HOOK])
    on = (block.tokens == TOKEN).nonzero().flatten()
    acts[on, 5] = 1.0
    acts[on[::2], 2] = 9.0
    block.acts[HOOK] = acts
    found = by_token(build(identity_sae(F, 6), [block], texts(N), VOCABULARY, tmp_path / "i", hook=HOOK), "t17")
    assert [one.feature for one in found] == [5, 2]
    assert found[0].sensitivity == 1 and 0.3 < found[1].sensitivity < 0.7


def test_the_tokens_it_fires_on_weigh_more_than_its_contexts(tmp_path):
    """Feature 2 fires on the token alone, feature 5 on every other token, so that its contexts are full of it."""
    block = columns(N, LENGTH, F)
    block.tokens = torch.where(torch.arange(len(block.tokens)) % 2 == 0, TOKEN, block.tokens % 10).int()
    acts = torch.zeros_like(block.acts[HOOK])
    on = (block.tokens == TOKEN).nonzero().flatten()
    acts[on[:9], 2] = 1.0
    acts[block.tokens != TOKEN, 5] = 1.0
    block.acts[HOOK] = acts
    index = build(identity_sae(F, 6), [block], texts(N), VOCABULARY, tmp_path / "i", hook=HOOK)
    assert [one.feature for one in by_words(index, "t17")][0] == 2


def test_words_find_what_a_feature_fires_on_and_labels_come_first(index):
    sae = identity_sae(F, 6)
    assert by_words(index, "t17", sae=sae)[0].feature == ONLY
    sae.labels = {7: "the number t17 in words"}
    found = by_words(index, "t17", sae=sae)
    assert [one.feature for one in found[:2]] == [7, ONLY]
    assert found[0].label == "the number t17 in words"
    assert ONLY in [one.feature for one in by_words(index, "T17*", n=F)]
    with pytest.raises(UserError, match="holds no word"):
        by_words(index, '" ( "')


@pytest.mark.parametrize("query", ['golden" gate (', "t17 OR", "NEAR(t17", "t17^2", "-t17", "a:b"])
def test_no_query_is_a_syntax_error(index, query):
    assert isinstance(by_words(index, query), FeatureList)


def test_the_cache_is_made_anew_when_it_is_gone_damaged_or_of_another_index(index):
    path = index.path / words.FILE
    before = words.search(index, "t17")
    for spoil in (path.unlink, lambda: path.write_bytes(b"not a database"), lambda: _of_another(path)):
        spoil()
        assert words.search(index, "t17") == before
        assert path.exists()


def _of_another(path):
    with sqlite3.connect(path) as table:
        table.execute("UPDATE of SET sae = 'another'")
    table.close()


def test_without_fts5_the_same_feature_is_found(index, monkeypatch):
    monkeypatch.setattr(words, "has_fts5", lambda: False)
    assert by_words(index, "t17")[0].feature == ONLY
    assert by_words(index, "zzz").rows == []


def test_a_folder_that_cannot_be_written_is_searched_in_memory(index, monkeypatch):
    (index.path / words.FILE).unlink()

    def refused(index):
        raise UserError("read-only")

    monkeypatch.setattr(words, "rebuild", refused)
    assert words.search(index, "t17")[0][0] == ONLY
    assert not (index.path / words.FILE).exists()


def test_likeness_is_the_cosine_with_any_direction(index):
    sae = identity_sae(F, 6)
    direction = torch.zeros(F)
    direction[5], direction[9] = 3.0, 4.0
    found = by_likeness(index, direction, sae, n=2)
    assert [(one.feature, one.score) for one in found] == [(9, pytest.approx(0.8)), (5, pytest.approx(0.6))]
    assert by_likeness(index, sae.W_dec[4], sae, n=1, leave=4)[0].feature != 4
    with pytest.raises(UserError, match="has width 7, this SAE 24"):
        by_likeness(index, torch.zeros(7), sae)


def test_effect_finds_what_promotes_and_says_the_word(index):
    with pytest.raises(UserError, match="no logit lens"):
        by_effect(index, "t4")
    top = torch.full((F, 20), 2)
    top[11] = 4
    says_p = torch.full((F, 10), 0.05)
    index.lens = {
        "top": top, "top_values": torch.ones(F, 20), "says": top[:, :10], "says_p": says_p,
        "output_score": torch.full((F,), 0.5),
    }  # fmt: skip
    found = by_effect(index, "t4")
    assert [one.feature for one in found] == [11]
    assert found[0].writes == pytest.approx((1 + 0.5) / 2)
    assert found[0].score == pytest.approx(0.5 * 0.75)


def test_every_way_wants_at_least_one_feature(index):
    sae = identity_sae(F, 6)
    for search in (by_token, by_words, by_effect):
        with pytest.raises(UserError, match="n is 0"):
            search(index, "t17", n=0)
    with pytest.raises(UserError, match="n is 0"):
        by_likeness(index, sae.W_dec[0], sae, n=0)


def test_a_text_finds_the_feature_that_looks_for_its_word_and_the_token(tiny_host, tmp_path):
    token = tiny_host.tokenizer(" bridge", add_special_tokens=False)["input_ids"][0]
    hook = "blocks.0.hook_resid_pre"
    sae = make_sae(d_in=32, d_sae=96, k=6, hook_name=hook)
    row = tiny_host.model.get_input_embeddings().weight[token].detach()
    sae.encoder[7] = 10 * row / row.norm()
    sae.b_enc[7] = -9.5 * row.norm()
    sae.b_dec.zero_()
    from sae.activations.harvest import stream
    from sae.text import Document, pack

    documents = [Document(f"We saw {i} near the {'bridge' if i % 2 else 'river'}.", group=f"{i}") for i in range(12)]
    rows = pack(documents, tiny_host.tokenizer, 64, special_ids=tiny_host.special_ids)
    strings = tiny_host.text_of(list(range(len(tiny_host.tokenizer))))
    index = build(sae, stream(tiny_host, rows, [hook]), documents, strings, tmp_path / "i", hook=hook)
    found = by_text(index, "There is a bridge over there", sae, tiny_host, n=96)
    own = next(one for one in found if one.feature == 7)
    assert own.why.endswith("at 'bridge'")
    assert not any(one.feature == 7 for one in by_text(index, "There is a river over there", sae, tiny_host, n=96))
    with pytest.raises(UserError, match="the text is empty"):
        by_text(index, " ", sae, tiny_host)


def test_a_set_leads_there_with_weights_and_leaves_twins_out(tmp_path):
    """Three features detect; 5 and 6 have the same decoder row, so one of them is left out."""
    block = columns(90, LENGTH, F)
    acts = block.acts[HOOK].abs()
    acts[torch.rand(acts.shape, generator=torch.Generator().manual_seed(1)) > 0.03] = 0
    acts[:, [5, 6, 7]] = 0
    for j in range(30):
        rows = (block.doc == j).nonzero().flatten()
        acts[rows[5], 5] = acts[rows[5], 6] = 4.0
        if j % 4:
            acts[rows[6], 7] = 3.0
    block.acts[HOOK] = acts
    sae = identity_sae(F, 6)
    about = ["the Golden Gate in fog" if i < 30 else "the weather and the sea" for i in range(90)]
    documents = [IndexedDocument(f"{i} {text}", form="essay", group=f"{i}") for i, text in enumerate(about)]
    index = build(sae, [block], documents, VOCABULARY, tmp_path / "index", hook=HOOK)
    sae.W_dec[6] = sae.W_dec[5]
    index.check = lambda sae: None
    found = toward(index, "golden gate", sae=sae)
    features = [one.feature for one in found]
    assert len({5, 6} & set(features)) == 1
    assert 7 in features
    assert sum(one.strength for one in found) == pytest.approx(1.5, abs=0.02)
    assert found.together == 1
    assert all("=" in one.dial for one in found)


def test_what_a_set_is_worth_is_measured_on_texts_that_chose_nothing(tmp_path):
    """A feature that fires in the choosing half's texts alone detects there, and is worth 0.5 on the others."""
    from sae.features.contrast import Side, halves

    documents = [IndexedDocument(f"{i} the Golden Gate", form="essay", group=f"{i}") for i in range(30)]
    documents += [IndexedDocument(f"{i} the sea", form="essay", group=f"{i}") for i in range(30, 90)]
    chosen, _ = halves(Side(documents[:30], None, torch.arange(30)), 0)  # pyright: ignore[reportArgumentType]
    block = columns(90, LENGTH, F)
    acts = torch.zeros_like(block.acts[HOOK])
    for j in chosen.rows.tolist():
        acts[(block.doc == j).nonzero().flatten()[5], 7] = 4.0
    block.acts[HOOK] = acts
    sae = identity_sae(F, 6)
    index = build(sae, [block], documents, VOCABULARY, tmp_path / "i", hook=HOOK)
    found = toward(index, "golden gate", sae=sae)
    assert found[0].feature == 7 and found[0].auroc_choosing == 1
    assert found.together == found[0].auroc == 0.5


def test_a_list_is_a_table_in_a_notebook_with_a_line_that_steers(index):
    html = by_token(index, "t17")._repr_html_()
    assert f"steer(host, model, {{{ONLY}: &quot;1.5x&quot;}})" in html
    assert "<script" not in html
    index.vocab[TOKEN] = "<script>alert(1)</script>"
    assert "<script" not in by_token(index, "<script>alert(1)</script>")._repr_html_()
