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
