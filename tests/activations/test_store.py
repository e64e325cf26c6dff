"""The store: what is written is read back row for row; what does not belong is refused by name."""

import json

import pytest
import torch

from sae.activations import store as stores
from sae.activations.harvest import Block
from sae.errors import UserError
from sae.text import Document

HOOK = "blocks.1.hook_resid_post"


def description(**changes):
    facts = {
        "host": "tiny",
        "host_fingerprint": "f00d",
        "hooks": {HOOK: 8},
        "dtype": "bfloat16",
        "context": 4,
        "source": "memory",
        "part": "train",
        "held_out": 0.1,
        "max_tokens": None,
        "isolate_documents": True,
        "outlier_norm": {HOOK: 99.0},
    }
    return stores.Description(**(facts | changes))


def block(number):
    g = torch.Generator().manual_seed(number)
    acts = torch.randn(12, 8, generator=g).to(torch.bfloat16)
    numbers = torch.arange(12) + 12 * number
    return Block({HOOK: acts}, numbers, numbers // 5, numbers % 4, numbers % 4 != 0)


DOCUMENTS = [Document(f"text {i}", group=f"g{i}", topic="t", form="f") for i in range(50)]


def make(path, n=20, forward=block, **changes):
    return stores.write(path, description(**changes), range(n), forward, DOCUMENTS)


def test_rows_come_back_as_they_were(tmp_path):
    store = make(tmp_path / "acts")
    whole = torch.cat([block(i).acts[HOOK] for i in range(20)])
    assert store.n_rows == 240 and len(store.shard_rows) == 3
    assert torch.equal(torch.cat([b.acts[HOOK] for b in store.blocks(HOOK)]), whole)
    rows = torch.tensor([239, 0, 96, 95, 7, 7])
    assert torch.equal(store.take(HOOK, rows), whole[rows])
    assert torch.equal(store.valid_rows(), torch.tensor([i for i in range(240) if i % 4]))
    assert store.documents == DOCUMENTS


def test_an_interrupted_harvest_goes_on_and_ends_the_same(tmp_path):
    make(tmp_path / "whole")
    calls = []

    def failing(number):
        calls.append(number)
        if number == 11:
            raise KeyboardInterrupt
        return block(number)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "acts", forward=failing)
    with pytest.raises(UserError, match="not finished"):
        stores.Store.open(tmp_path / "acts")
    again = []

    def counted(number):
        again.append(number)
        return block(number)

    make(tmp_path / "acts", forward=counted)
    assert again[0] == 8  # the first shard of eight batches was kept
    for name in ("manifest.json", "documents.jsonl", "shard-00001.safetensors"):
        assert (tmp_path / "acts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_store_is_not_harvested_again(tmp_path):
    make(tmp_path / "acts")

    def never(number):
        raise AssertionError("harvested again")

    assert make(tmp_path / "acts", forward=never).n_rows == 240


def test_a_store_of_something_else_is_refused_with_both_values(tmp_path):
    make(tmp_path / "acts")
    with pytest.raises(UserError, match="host_fingerprint = 'f00d', this harvest has 'beef'"):
        make(tmp_path / "acts", host_fingerprint="beef")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not an activation store"):
        make(tmp_path / "other")


def test_another_host_or_hook_is_refused_at_use(tmp_path):
    store = make(tmp_path / "acts")
    store.check("f00d", HOOK)
    with pytest.raises(UserError, match="this host is beef"):
        store.check("beef", HOOK)
    with pytest.raises(UserError, match="has no blocks.9.hook_resid_post"):
        store.check("f00d", "blocks.9.hook_resid_post")


def test_a_short_shard_is_refused_by_name(tmp_path):
    store = make(tmp_path / "acts")
    path = tmp_path / "acts" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="shard-00001.safetensors: missing or damaged"):
        store.valid_rows()
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    manifest["shards"][0]["rows"] = 95
    (tmp_path / "acts" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has 96 rows, the manifest says 95"):
        stores.Store.open(tmp_path / "acts").shard(0)


def test_no_text_is_one_line_and_leaves_no_store(tmp_path):
    with pytest.raises(UserError, match="holds no text to harvest"):
        make(tmp_path / "acts", n=0)
    assert not (tmp_path / "acts" / "manifest.json").exists()


def test_a_full_disk_during_harvest_is_one_line_and_what_was_done_is_kept(tmp_path, monkeypatch):
    import errno

    from sae import files

    writes = []
    real = files.write_safetensors

    def full(path, *args):
        writes.append(path)
        if len(writes) == 2:
            with files.atomic_file(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(files, "write_safetensors", full)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: no space left"):
        make(tmp_path / "acts")
    assert sorted(p.name for p in (tmp_path / "acts").iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
    ]
    monkeypatch.setattr(files, "write_safetensors", real)
    assert make(tmp_path / "acts").n_rows == 240


@pytest.mark.parametrize(
    "content,says",
    [
        ("{}", "has no 'format'"),
        ("[]", "holds list, not a JSON object"),
        ('{"format": 1, "description": [], "shards": [], "complete": true}', "not a manifest of ours"),
        ('{"format": 99}', "format 99 is newer"),
    ],
)
def test_a_manifest_of_another_shape_is_one_line(tmp_path, content, says):
    (tmp_path / "manifest.json").write_text(content)
    for use in (stores.Store.open, make):
        with pytest.raises(UserError, match=says) as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)


def test_documents_keep_separators_that_are_not_newlines(tmp_path):
    documents = [Document("one\u2028two\x85three", group="g")]
    store = stores.write(tmp_path / "acts", description(), range(2), block, documents)
    assert store.documents == documents
    (tmp_path / "acts" / "documents.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="documents.jsonl: missing or damaged"):
        _ = store.documents


def two_hooks(number):
    one = block(number)
    acts = one.acts | {"blocks.2.hook_resid_post": 2 * one.acts[HOOK]}
    return Block(acts, one.tokens, one.doc, one.pos, one.mask)


def test_a_store_of_several_hooks_serves_one_of_them_too(tmp_path):
    other = "blocks.2.hook_resid_post"
    facts = {"hooks": {HOOK: 8, other: 8}, "outlier_norm": {HOOK: 99.0, other: 98.0}}
    store = make(tmp_path / "acts", forward=two_hooks, **facts)
    rows = torch.tensor([100, 3, 95, 96])
    assert torch.equal(store.take(other, rows), 2 * store.take(HOOK, rows))

    def never(number):
        raise AssertionError("harvested again")

    assert list(make(tmp_path / "acts", forward=never).hooks) == [HOOK, other]
    with pytest.raises(UserError, match="holds a store with"):
        make(tmp_path / "acts", forward=never, outlier_norm={HOOK: 5.0})
    make(tmp_path / "one")
    with pytest.raises(UserError, match="holds a store with hooks"):
        make(tmp_path / "one", forward=never, **facts)
