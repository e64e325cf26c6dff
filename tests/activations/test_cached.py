"""What SAELens cached is a store like any other: rows, masks, resumption, refusals, training. The datasets here have
the shape that its CacheActivationsRunner gives them; tests/peers/test_cached.py has one of its own making."""

import copy
import itertools
import shutil

import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Sequence, Value, disable_progress_bars

from sae import cli, files
from sae.activations.store import Store
from sae.autoencoder import SAE
from sae.documents import documents
from sae.errors import Stopped, UserError
from sae.harvesting import harvest
from sae.host import Host
from sae.run import train, verify
from tests.test_run import complaint, recipe, write_recipe

HOOK, CONTEXT, ROWS = "blocks.2.hook_resid_post", 32, 150
END = 2


@pytest.fixture
def tiny(tiny_host, monkeypatch):
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    return tiny_host


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """Bundled text, run on from row to row with a special token between documents."""
    ids = []
    for document in itertools.islice(documents("bundled"), 60):
        ids += [END, *tokenizer(document.text).input_ids]
    assert len(ids) >= ROWS * CONTEXT
    return torch.tensor(ids[: ROWS * CONTEXT], dtype=torch.int32).view(ROWS, CONTEXT)


def write(path, columns, tokens=None):
    disable_progress_bars()
    features = {name: Array2D(shape=tuple(acts.shape[1:]), dtype="float32") for name, acts in columns.items()}
    given = dict(columns)
    if tokens is not None:
        features["token_ids"] = Sequence(Value(dtype="int32"), length=tokens.shape[1])
        given["token_ids"] = tokens
    Dataset.from_dict(given, features=Features(features)).save_to_disk(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tiny_host, tokens, tmp_path_factory):
    acts = tiny_host.activations(tokens.long(), [HOOK])[HOOK]
    return write(tmp_path_factory.mktemp("cached") / "acts", {HOOK: acts}, tokens)


def given(out, path, **sections):
    sections["text"] = {"context": CONTEXT, "max_tokens": None} | sections.get("text", {})
    sections["activations"] = {"cached_activations_path": str(path), "dtype": "float32", "shard_rows": 640} | (
        sections.get("activations", {})
    )
    return recipe(out, str(out / "store"), **sections)


def test_rows_are_what_was_cached_with_the_masks_of_a_harvest(tiny_host, folder, tokens, tmp_path):
    store = harvest(given(tmp_path, folder), host=tiny_host, progress=False)
    assert store.n_rows == ROWS * CONTEXT and len(store.shard_rows) == 8
    acts = tiny_host.activations(tokens.long(), [HOOK])[HOOK]
    seen = []
    for block in store.blocks(HOOK):
        at = block.doc.view(-1, CONTEXT)[:, 0].long()
        seen += at.tolist()
        assert torch.equal(block.tokens.view(-1, CONTEXT), tokens[at])
        assert torch.equal(block.pos.view(-1, CONTEXT), torch.arange(CONTEXT, dtype=torch.int32).expand(len(at), -1))
        torch.testing.assert_close(block.acts[HOOK], acts[at].flatten(0, 1), atol=1e-5, rtol=1e-5)
        norms = block.acts[HOOK].norm(dim=1)
        text = (block.tokens != END) & (block.pos > 0)
        assert torch.equal(block.mask, text & (norms <= store.readings[0].outlier_norm[HOOK]))
    assert sorted(seen) == list(range(ROWS))
    assert store.documents[3].text == tiny_host.tokenizer.decode(tokens[3].tolist())


def test_the_manifest_says_where_it_came_from_and_the_host_was_compared(tiny, folder, tmp_path):
    store = harvest(given(tmp_path, folder), host=tiny, progress=False)
    assert store.text.source == f"cached_activations_path={folder}" and not store.text.isolate_documents
    assert store.readings[0].computed == "float32, cached by SAELens"
    assert store.readings[0].host_fingerprint == tiny.fingerprint
    told = verify(store.path, with_host=True, progress=False)
    assert told["faults"] == [] and told["readings"][0]["their relative difference"] < 1e-5


def test_positions_and_the_number_of_tokens_are_the_recipes(tiny_host, folder, tmp_path):
    few = given(tmp_path, folder, text={"max_tokens": 1000, "positions": "4:20"})
    store = harvest(few, host=tiny_host, progress=False)
    assert store.n_rows == 1024
    counted = torch.cat([block.pos[block.mask] for block in store.blocks(HOOK)])
    assert set(counted.tolist()) == set(range(4, 20))


def test_an_import_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tiny_host, folder, tmp_path, monkeypatch):
    from sae.activations.cached import Cached

    whole = harvest(given(tmp_path / "whole", folder), host=tiny_host, progress=False)
    real, calls = Cached.blocks, []

    def interrupted(self, rows, hooks, **options):
        for block in real(self, rows, hooks, **options):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(Cached, "blocks", interrupted)
    with pytest.raises(Stopped, match="whole shards are kept"):
        harvest(given(tmp_path, folder), host=tiny_host, progress=False)
    monkeypatch.setattr(Cached, "blocks", real)
    assert verify(tmp_path / "store", progress=False)["unfinished"]
    again = harvest(given(tmp_path, folder), host=tiny_host, progress=False)
    names = [path.name for path in (tmp_path / "store").iterdir()]
    assert all((tmp_path / "store" / name).read_bytes() == (tmp_path / "whole/store" / name).read_bytes()
               for name in names)  # fmt: skip
    assert again.n_rows == whole.n_rows


def test_a_finished_import_needs_the_folder_no_more_and_a_damaged_shard_is_imported_again(tiny_host, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "acts")
    made = given(tmp_path, tmp_path / "acts")
    store = harvest(made, host=tiny_host, progress=False)
    shard = tmp_path / "store" / "shard-00001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-5] + b"12345")
    harvest(made, host=tiny_host, repair=True, progress=False)
    assert shard.read_bytes() == before
    shutil.rmtree(tmp_path / "acts")
    assert harvest(made, host=tiny_host, progress=False).n_rows == store.n_rows


def test_training_from_it_gives_an_sae_of_this_host(tiny_host, folder, tmp_path):
    train(given(tmp_path, folder, training={"tokens": 20_000}), host=tiny_host, progress=False)
    sae = SAE.load(tmp_path / "run" / "sae")
    assert sae.cfg.metadata.host_fingerprint == tiny_host.fingerprint and sae.cfg.metadata.hook_name == HOOK
    assert files.read_json(tmp_path / "run" / "sae" / "evaluation.json")["eval_config"]["n_tokens"] > 0


def test_the_command_line_imports_and_forecasts(tiny, folder, tmp_path, capsys):
    path = write_recipe(
        tmp_path,
        store=str(tmp_path / "store"),
        text={"context": CONTEXT, "max_tokens": None},
        activations={"cached_activations_path": str(folder)},
    )
    assert cli.main(["harvest", str(path), "--dry-run", "--json", str(tmp_path / "f.json")]) == 0
    assert files.read_json(tmp_path / "f.json")["rows"] == ROWS * CONTEXT and not (tmp_path / "store").exists()
    assert cli.main(["harvest", str(path)]) == 0
    assert Store.open(tmp_path / "store").n_rows == ROWS * CONTEXT


# ---- what is refused: one line, and nothing is left behind


def refused(tmp_path, given_host, path, *words, **sections):
    with pytest.raises(UserError) as error:
        harvest(given(tmp_path, path, **sections), host=given_host, progress=False)
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_folder_that_is_none_is_one_line(tiny_host, folder, tmp_path):
    refused(tmp_path, tiny_host, tmp_path / "nothing", "nothing", "CacheActivationsRunner")
    refused(tmp_path, tiny_host, tmp_path, "CacheActivationsRunner")
    shutil.copytree(folder, tmp_path / "cut")
    arrow = next((tmp_path / "cut").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:2000])
    refused(tmp_path, tiny_host, tmp_path / "cut", "CacheActivationsRunner")
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "state.json").write_text("{")
    refused(tmp_path, tiny_host, tmp_path / "bad", "CacheActivationsRunner")
    DatasetDict({"train": Dataset.load_from_disk(str(folder))}).save_to_disk(str(tmp_path / "splits"))
    refused(tmp_path, tiny_host, tmp_path / "splits", "splits (train)")


def test_another_hook_context_width_or_no_token_ids_are_one_line(tiny_host, folder, tokens, tmp_path):
    refused(tmp_path, tiny_host, folder, HOOK, "blocks.1.hook_resid_post", host={"hook": "blocks.1.hook_resid_post"})
    refused(tmp_path, tiny_host, folder, "have 32 tokens", "text.context=32", text={"context": 64})
    narrow = write(tmp_path / "narrow", {HOOK: torch.zeros(ROWS, CONTEXT, 16)}, tokens)
    refused(tmp_path, tiny_host, narrow, "16 wide", "32 in tiny-llama")
    without = write(tmp_path / "without", {HOOK: torch.zeros(ROWS, CONTEXT, 32)})
    refused(tmp_path, tiny_host, without, "token_ids")
    flat = Dataset.from_dict({HOOK: [1.0] * 4, "token_ids": [[1] * CONTEXT] * 4})
    flat.save_to_disk(str(tmp_path / "flat"))
    refused(tmp_path, tiny_host, tmp_path / "flat", "[context, width]")


def test_tokens_beyond_the_vocabulary_are_one_line(tiny_host, tokens, tmp_path):
    large = tokens.clone()
    large[7, 3] = 70_000
    path = write(tmp_path / "large", {HOOK: torch.randn(ROWS, CONTEXT, 32)}, large)
    refused(tmp_path, tiny_host, path, "70,000", "tokenizer")


def test_activations_that_this_host_did_not_make_are_refused(tiny_host, tokens, tmp_path):
    acts = tiny_host.activations(tokens.long(), [HOOK])[HOOK]
    path = write(tmp_path / "other", {HOOK: acts + 0.1 * acts.std() * torch.randn(acts.shape)}, tokens)
    said = r"64 rows of 32 tokens run through tiny-llama in float32 differ by .*%.*Give the host that made it"
    with pytest.raises(UserError, match=said):
        harvest(given(tmp_path, path), host=tiny_host, progress=False)
    assert not (tmp_path / "store").exists()


def test_a_host_in_bfloat16_is_compared_in_float32(tiny_host, tokens, folder, tmp_path):
    """The last layer's attention, where bfloat16 differs most, of the same weights and of others."""
    hook = "blocks.3.hook_attn_out"
    same, other = (copy.deepcopy(tiny_host.model) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    path = write(tmp_path / "acts", {hook: tiny_host.activations(tokens.long(), [hook])[hook]}, tokens)
    narrow, another = (Host.from_model(one.bfloat16(), tiny_host.tokenizer, "tiny-llama") for one in (same, other))
    made = given(tmp_path, path, host={"hook": hook})
    with pytest.raises(UserError, match="in float32 differ by"):
        harvest(made, host=another, progress=False)
    store = harvest(made, host=narrow, progress=False)
    assert store.n_rows == ROWS * CONTEXT and store.readings[0].computed == "float32, cached by SAELens"


def test_rows_that_changed_while_an_import_was_stopped_are_refused(tiny_host, folder, tokens, tmp_path, monkeypatch):
    from sae.activations import build

    shutil.copytree(folder, tmp_path / "acts")
    made = given(tmp_path, tmp_path / "acts")
    with monkeypatch.context() as patch:
        patch.setattr(build, "run", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped):
            harvest(made, host=tiny_host, progress=False)
    shutil.rmtree(tmp_path / "acts")
    other = tokens.flip(0)
    write(tmp_path / "acts", {HOOK: tiny_host.activations(other.long(), [HOOK])[HOOK]}, other)
    with pytest.raises(UserError, match="other rows than when its import began"):
        harvest(made, host=tiny_host, progress=False)


def test_a_store_of_text_is_not_one_of_cached_rows_and_a_store_is_needed(tiny, folder, tmp_path, capsys):
    text = recipe(tmp_path, str(tmp_path / "store"), text={"context": CONTEXT, "max_tokens": 2000})
    harvest(text, host=tiny, progress=False)
    with pytest.raises(UserError, match=r"source = bundled, now it is cached_activations_path=.*another folder"):
        harvest(given(tmp_path, folder), host=tiny, progress=False)
    path = write_recipe(tmp_path, text={"context": CONTEXT}, activations={"cached_activations_path": str(folder)})
    assert "activations.store: not set" in complaint(capsys, "train", path)
    assert "activations.store: not set" in complaint(capsys, "harvest", path)
