"""The index equals brute force over dense activations, keeps to the mask, and opens without a language
model."""

import json
import subprocess
import sys

import pytest
import torch

from sae.errors import UserError
from sae.features import gather, pool, writing
from sae.features.index import Index
from sae.features.writing import build
from sae.text import Document
from tests.conftest import make_sae
from tests.features.planted import HOOK, VOCABULARY, columns, cut, identity_sae, texts

N_DOCUMENTS, LENGTH = 11, 9


@pytest.fixture
def planted():
    return columns(N_DOCUMENTS, LENGTH, 32)


@pytest.fixture
def sae():
    return make_sae()


def made(tmp_path, sae, block, sizes=(), name="index", **options) -> Index:
    return build(sae, cut(block, sizes), texts(N_DOCUMENTS), VOCABULARY, tmp_path / name, hook=HOOK, **options)


def dense(sae, block):
    return sae.encode(block.acts[HOOK]) * block.mask[:, None]


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_the_index_of_a_threshold_sae_equals_brute_force_and_knows_its_thresholds(tmp_path, planted, name):
    sae = make_sae(architecture=name, apply_b_dec_to_input=False)
    index = made(tmp_path, sae, planted)
    acts = dense(sae, planted)
    assert torch.allclose(index.stats["max_act"], acts.amax(0))
    assert torch.allclose(index.stats["density"], (acts > 0).sum(0) / int(planted.mask.sum()))
    index.check(sae)
    if name == "jumprelu":
        sae.threshold = sae.threshold + 0.1
        with pytest.raises(UserError, match="made with another SAE"):
            index.check(sae)


@pytest.mark.parametrize("sizes", [(), (1, 2, 3), (40,), (10, 10, 10, 10, 10, 10)])
@pytest.mark.parametrize("part", [1, 30, 65_536])
def test_the_index_equals_brute_force_whatever_the_blocks_and_parts(tmp_path, monkeypatch, sae, planted, sizes, part):
    monkeypatch.setattr(writing, "PART_ROWS", part)
    monkeypatch.setattr(gather, "_WAITING", part)
    monkeypatch.setattr(pool, "_CHUNK", 7)
    index = made(tmp_path, sae, planted, sizes, top=4)
    acts = dense(sae, planted)
    counted = int(planted.mask.sum())
    assert index.facts.n_tokens == counted
    assert torch.allclose(index.stats["max_act"], acts.amax(0))
    assert torch.allclose(index.stats["density"], (acts > 0).sum(0) / counted)
    pooled = torch.stack([acts[planted.doc == j].amax(0) for j in range(N_DOCUMENTS)])
    assert torch.allclose(index.stats["document_density"], (pooled > 0).float().mean(0))
    rows, features, values = index.maxima.select(torch.arange(N_DOCUMENTS))
    found = torch.zeros(N_DOCUMENTS, 96)
    found[rows, features] = values
    assert torch.allclose(found, pooled)
    for feature in range(96):
        expected = sorted((-pooled[j, feature].item(), j) for j in range(N_DOCUMENTS) if pooled[j, feature] > 0)[:4]
        examples = index.examples(feature)
        assert [example.document for example in examples] == [j for _, j in expected]
        for example in examples:
            assert acts[example.position, feature].item() == pytest.approx(example.act)
            assert planted.doc[example.position] == example.document


def test_a_feature_has_at_most_one_example_a_document_and_none_on_masked_tokens(tmp_path, sae, planted):
    planted.acts[HOOK][~planted.mask] *= 100  # what is masked would win everywhere
    index = made(tmp_path, sae, planted, (13, 29))
    for feature in range(96):
        examples = index.examples(feature, 20)
        assert len({example.document for example in examples}) == len(examples)
        assert all(bool(planted.mask[example.position]) for example in examples)


def test_quantile_and_bands_agree_with_exact_ones_to_a_bin(tmp_path):
    block = columns(N_DOCUMENTS, 200, 24)
    sae = identity_sae()
    block.acts[HOOK] = block.acts[HOOK].abs() ** 2 * 3
    index = made(tmp_path, sae, block)
    acts = dense(sae, block)
    for feature in range(24):
        fired = acts[acts[:, feature] > 0, feature]
        exact = fired.quantile(0.999, interpolation="higher").item()
        assert exact / 1.1 <= index.stats["p999"][feature].item() <= exact * 1.1
        bands = index.stats["bands"][feature]
        assert int(bands.sum()) == len(fired)
        exact_bands = torch.histc(fired, 10, 0, fired.max().item())
        assert (bands - exact_bands).abs().max() <= 0.05 * len(fired) + 2


def test_a_feature_that_never_fired_is_all_zero_and_has_no_examples(tmp_path, planted):
    planted.acts[HOOK] = planted.acts[HOOK].abs()
    planted.acts[HOOK][:, 5] = -1
    index = made(tmp_path, identity_sae(32, 4), planted)
    assert index.examples(5) == []
    assert all(
        float(index.stats[name][5].sum()) == 0 for name in ("max_act", "density", "document_density", "p999", "bands")
    )


def test_a_context_stays_inside_its_document_and_marks_the_firing_token(tmp_path, sae, planted):
    index = made(tmp_path, sae, planted)
    position = LENGTH + 1  # the second token of the second document
    context = index.context(position, before=5, after=3, act=1.5)
    assert [token.text for token in context] == [VOCABULARY[t] for t in planted.tokens[LENGTH : LENGTH + 5].tolist()]
    assert [token.firing for token in context] == [False, True, False, False, False]
    assert context[1].act == 1.5
    assert context[0].act is None


def test_documents_of_which_nothing_was_counted_are_not_seen(tmp_path, sae, planted):
    planted.mask[planted.doc == 3] = False
    seen = made(tmp_path, sae, planted).maxima.seen
    assert seen.tolist() == [j != 3 for j in range(N_DOCUMENTS)]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, sae, planted):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="only 5 documents were given"):
        build(sae, [planted], texts(5), VOCABULARY, tmp_path / "a", hook=HOOK)
    with pytest.raises(UserError, match="not blocks.7.hook_resid_post"):
        build(sae, [planted], texts(N_DOCUMENTS), VOCABULARY, tmp_path / "a", hook="blocks.7.hook_resid_post")
    planted.mask[:] = False
    with pytest.raises(UserError, match="no token that counts"):
        made(tmp_path, sae, planted)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_opening_refuses_what_is_missing_newer_damaged_or_of_another_sae(tmp_path, sae, planted):
    with pytest.raises(UserError, match="no feature index there"):
        Index.open(tmp_path / "nothing")
    index = made(tmp_path, sae, planted)
    index.check(sae)
    with pytest.raises(UserError, match="made with another SAE"):
        index.check(make_sae(seed=1))
    with pytest.raises(UserError, match="feature 96 does not exist"):
        index.examples(96)
    (index.path / "part-00000.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="not readable"):
        _ = Index.open(index.path).maxima
    facts = json.loads((index.path / "index.json").read_text())
    (index.path / "index.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(UserError, match="format 99 is newer"):
        Index.open(index.path)


def test_opening_and_a_query_load_no_language_model_library(tmp_path, sae, planted):
    index = made(tmp_path, sae, planted)
    program = (
        "import sys; from sae.features import Index, show\n"
        f"index = Index.open({str(index.path)!r}); show(index, 3)\n"
        "from sae.features import find; from sae.errors import UserError\n"
        "try:\n    find(index, 'nowhere')\nexcept UserError as error:\n    assert 'hold' in str(error)\n"
        "assert not {'transformers', 'transformer_lens', 'datasets', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_documents_keep_separators_that_are_not_newlines(tmp_path, sae, planted):
    documents = [Document(f"{i}\u2028two\x85three", group=f"{i}") for i in range(N_DOCUMENTS)]
    index = build(sae, [planted], documents, VOCABULARY, tmp_path / "index", hook=HOOK)
    assert [document.text for document in index.documents] == [document.text for document in documents]


def test_an_index_never_replaces_something_else_and_says_so_before_the_work(tmp_path, sae, planted):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not ours to replace"):
        build(sae, iter([]), texts(N_DOCUMENTS), VOCABULARY, tmp_path / "index", hook=HOOK)
    (tmp_path / "index" / "index.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, not a JSON object"):
        Index.open(tmp_path / "index")


CUT = object()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("documents-00000.jsonl", CUT, "has . documents, index.json says 11"),
        ("documents-00000.jsonl", b"{\n", "not valid JSON"),
        ("part-00000.safetensors", "part-00001.safetensors", "rows, index.json says"),
        ("vocab.json", b'{"a": 1}', "not a list of tokens"),
        ("feature_stats.safetensors", "top_tokens.safetensors", "has no max_act"),
    ],
    ids=["cut short", "not JSON", "another part", "vocabulary", "another file"],
)
def test_a_file_that_is_not_what_was_written_is_refused_by_name(
    tmp_path, monkeypatch, sae, planted, name, content, says
):
    from sae.features import find, show

    monkeypatch.setattr(writing, "PART_ROWS", 30)
    index = made(tmp_path, sae, planted, (40, 30))
    feature, path = int(index.stats["max_act"].argmax()), index.path / name
    if content is CUT:
        content = path.read_bytes()[:60]
    path.write_bytes((index.path / content).read_bytes() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says):
        show(Index.open(index.path), feature)
        find(Index.open(index.path), "text")


def test_rows_that_are_not_finite_do_not_count(tmp_path, sae, planted):
    row = int(planted.mask.nonzero()[3])
    planted.acts[HOOK][row, 0] = float("nan")
    index = made(tmp_path, sae, planted)
    assert index.facts.n_tokens == int(planted.mask.sum()) - 1
    assert not index.parts.rows(row, row + 1)["mask"][0]
    assert index.stats["max_act"].isfinite().all()


# ---- what is asked of one feature ---------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, monkeypatch, sae, planted):
    """An index in several parts, with what brute force says."""
    monkeypatch.setattr(writing, "PART_ROWS", 30)
    return made(tmp_path, sae, planted, (10,) * 9), dense(sae, planted)


def test_rows_of_any_span_have_their_activations(parts, planted):
    index, acts = parts
    assert len(index.facts.parts) > 2
    assert torch.equal(index.parts.rows(0, len(planted.doc))["tokens"], planted.tokens)
    for feature in (3, 50):
        for start, end in ((0, 5), (25, 65), (0, len(acts))):
            found = torch.tensor(index.parts.acts(feature, start, end))
            assert torch.allclose(found, acts[start:end, feature].bfloat16().float())


def test_a_context_with_a_feature_has_every_activation(parts):
    index, acts = parts
    feature = int((acts > 0).sum(0).argmax())
    example = index.examples(feature)[0]
    context = index.context(example.position, 3, 3, feature=feature)
    at = [token.firing for token in context].index(True)
    expected = acts[example.position - at : example.position - at + len(context), feature]
    assert torch.allclose(torch.tensor([token.act for token in context]), expected, rtol=0.01)


def test_bands_and_deciles_are_its_own_firings_in_order(parts):
    index, acts = parts
    for feature in range(96):
        fired = acts[:, feature]
        top = float(fired.max())
        for tenth, band in enumerate(index.by_band(feature)):
            for one in band:
                assert float(fired[one.position]) == pytest.approx(one.act)
                assert tenth == min(9, int(one.act / top * 10))
        strengths = [one.act for tenth in index.deciles(feature) for one in tenth]
        assert strengths == sorted(strengths)
        assert strengths == pytest.approx(sorted(fired[fired > 0].tolist()))  # fewer than fifty: all of them
        assert max(len(tenth) for tenth in index.deciles(feature)) - min(map(len, index.deciles(feature))) <= 1


def test_silent_places_lie_in_documents_in_which_it_never_fires(parts, planted):
    index, acts = parts
    found = [index.silent(feature, 3) for feature in range(96)]
    assert any(found)
    for feature, places in enumerate(found):
        for one in places:
            assert planted.doc[one.position] == one.document
            assert bool(planted.mask[one.position])
            assert float(acts[planted.doc == one.document, feature].sum()) == 0
        assert len({one.document for one in places}) == len(places)


def test_top_tokens_and_cofiring_equal_brute_force(parts, planted):
    index, acts = parts
    counted = planted.mask & (planted.doc >= 0)
    occurs = torch.bincount(planted.tokens[counted].long(), minlength=50)
    assert torch.equal(index.token_counts, occurs)
    on = acts > 0
    for feature in (0, 40, 95):
        mass = torch.zeros(50).index_add_(0, planted.tokens.long(), acts[:, feature])
        for one in index.top_tokens(feature):
            assert one.share == pytest.approx(float(mass[one.token] / mass.sum()), rel=1e-4)
            firing = int(on[planted.tokens == one.token, feature].sum())
            assert (one.firing, one.sensitivity) == (firing, pytest.approx(firing / int(occurs[one.token])))
        assert [one.share for one in index.top_tokens(feature)] == sorted(
            (one.share for one in index.top_tokens(feature)), reverse=True
        )
        for other, jaccard, both in index.cofiring(feature, 96):
            assert both == int((on[:, feature] & on[:, other]).sum()) >= 3
            assert jaccard == pytest.approx(both / int((on[:, feature] | on[:, other]).sum()))
            assert other != feature


# ---- interrupted -------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def source(block, sizes, dies_after=None):
    """Steps that can be gone on with; a document's text comes with the first block."""

    def steps(state):
        blocks = list(cut(block, sizes))
        for number in range(state or 0, len(blocks)):
            if number == dies_after:
                raise Stop
            yield writing.Step(blocks[number], texts(N_DOCUMENTS) if number == 0 else [], number + 1)

    return steps


@pytest.mark.parametrize("dies_after", [1, 4, 6, 8])
def test_an_interrupted_index_goes_on_and_is_the_same_to_the_byte(tmp_path, monkeypatch, sae, planted, dies_after):
    monkeypatch.setattr(writing, "PART_ROWS", 20)
    monkeypatch.setattr(writing, "_SHARE", 0)
    sizes, options = (10,) * 9, {"hook": HOOK, "about": {"text": "planted"}}
    whole = writing.write(sae, source(planted, sizes), VOCABULARY, tmp_path / "whole", **options)
    with pytest.raises(Stop):
        writing.write(sae, source(planted, sizes, dies_after), VOCABULARY, tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()
    read = []
    again = writing.write(sae, source(planted, sizes), VOCABULARY, tmp_path / "index", **options, progress=read.append)
    kept = (dies_after * 10) // 20 * 20
    assert read[0] == (kept or 10) and sum(read) == len(planted.mask)
    names = sorted(path.name for path in whole.path.iterdir())
    assert sorted(path.name for path in again.path.iterdir()) == names
    assert not (tmp_path / "index.unfinished").exists()
    for name in names:
        if name != "search.sqlite":
            assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_what_was_begun_with_another_sae_or_text_is_not_gone_on_with(tmp_path, monkeypatch, sae, planted):
    monkeypatch.setattr(writing, "PART_ROWS", 20)
    monkeypatch.setattr(writing, "_SHARE", 0)
    for other, about in ((make_sae(seed=1), {"text": "planted"}), (sae, {"text": "other"}), (sae, None)):
        with pytest.raises(Stop):
            writing.write(other, source(planted, (10,) * 9, 6), VOCABULARY, tmp_path / "index", hook=HOOK, about=about)
        read = []
        options = {"hook": HOOK, "about": {"text": "planted"}, "progress": read.append}
        index = writing.write(sae, source(planted, (10,) * 9), VOCABULARY, tmp_path / "index", **options)
        assert read[0] == 10
        index.check(sae)


def test_a_folder_of_the_unfinished_index_s_name_that_is_not_ours_is_left_alone(tmp_path, sae, planted):
    (tmp_path / "index.unfinished").mkdir()
    (tmp_path / "index.unfinished" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="index.unfinished: is not empty and not ours to replace"):
        made(tmp_path, sae, planted)
    assert (tmp_path / "index.unfinished" / "thesis.txt").read_text() == "mine"


def test_a_second_writer_of_the_same_index_is_refused(tmp_path, sae, planted):
    from sae import locks
    from sae.places import Place

    with (
        locks.lock(Place(tmp_path), "index-index"),
        pytest.raises(UserError, match="index-index|another process|is being"),
    ):
        made(tmp_path, sae, planted)
    assert made(tmp_path, sae, planted).facts.n_documents == N_DOCUMENTS


def test_a_foreign_sae_without_statistics_takes_those_of_its_index(tmp_path, sae, planted):
    sae.stats = None
    sae.save(tmp_path / "sae")
    assert type(sae).load(tmp_path / "sae").stats is None
    index = made(tmp_path / "sae", sae, planted)
    found = type(sae).load(tmp_path / "sae").stats
    assert torch.equal(found.max_act, index.stats["max_act"])
    assert found.n_tokens == index.facts.n_tokens
