"""From a recipe to a store, on a tiny host with real text: forecast, refusals, second hosts, ranks, repair, masks."""

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sae import cli, config, files
from sae.activations.store import Store
from sae.errors import Stopped, UserError
from sae.harvesting import forecast, harvest, masked
from sae.host import Host
from sae.parallel import Rank
from sae.places import Place
from sae.run import train, verify
from tests.conftest import make_tiny_host
from tests.test_run import complaint, recipe, write_recipe

HOOK = "blocks.2.hook_resid_post"
SMALL = {"text": {"max_tokens": 3000}, "activations": {"shard_rows": 640}}


@pytest.fixture
def tiny(tiny_host, monkeypatch):
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    return tiny_host


def small(folder, **sections):
    merged = {name: values | sections.pop(name, {}) for name, values in SMALL.items()}
    return recipe(folder, str(folder / "acts"), **merged, **sections)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_what_is_stored_is_what_the_host_computes_at_these_tokens(tiny_host, tmp_path):
    store = harvest(small(tmp_path, activations={"dtype": "float32"}), host=tiny_host, progress=False)
    block = store.read(store.sources, 0)
    T = store.text.context
    doc = block.doc.view(-1, T)[0]
    number = int(doc[0])
    here = doc == number
    alone = tiny_host.activations(block.tokens.view(-1, T)[0][here][None], [HOOK])[HOOK][0]
    torch.testing.assert_close(block.acts[HOOK].view(len(block) // T, T, -1)[0][here], alone, atol=1e-4, rtol=1e-4)
    assert store.documents[number].text.startswith(tiny_host.tokenizer.decode(block.tokens.view(-1, T)[0][here][:3]))


def test_it_says_rows_bytes_and_time_before_and_what_was_masked_after(capsys, tmp_path, tiny):
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"), **{k: v for k, v in SMALL.items() if k == "text"})
    assert cli.main(["harvest", str(path), "--dry-run", "--json", str(tmp_path / "f.json")]) == 0
    assert not (tmp_path / "acts").exists()
    told = files.read_json(tmp_path / "f.json")
    assert cli.main(["harvest", str(path)]) == 0
    err = capsys.readouterr().err
    store = Store.open(tmp_path / "acts")
    assert told["rows"] == store.n_rows
    assert f"{store.n_rows:,} rows" in err and " on disk (" in err and "tokens/s" in err and "outlier norms" in err
    size = sum(path.stat().st_size for path in (tmp_path / "acts").glob("*.safetensors"))
    assert told["on disk (MB)"] == pytest.approx(size / 1e6, rel=0.1, abs=0.1)
    counted = sum(entry.valid for entry in store.entries[0])
    assert counted == int(torch.cat([block.mask for block in store.blocks(HOOK)]).sum())
    assert masked(store).startswith(f"{counted:,} of {store.n_rows:,} rows count")


def test_a_disk_that_cannot_hold_it_is_refused_before_the_host_runs(capsys, tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(Place, "free", lambda self: 50_000)
    monkeypatch.setattr(Host, "activations", lambda *_a, **_k: pytest.fail("the host ran"))
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"))
    said = complaint(capsys, "harvest", path)
    assert "needs 1." in said and "MB, 50.0 kB are free there" in said and "int8" in said
    assert not (tmp_path / "acts").exists()


def test_ctrl_c_keeps_whole_shards_and_says_how_to_go_on(tiny_host, tmp_path, monkeypatch):
    harvest(small(tmp_path / "whole"), host=tiny_host, progress=False)
    real, calls = Host.activations, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Host, "activations", interrupted)
    with pytest.raises(Stopped, match="stopped; whole shards are kept. Go on with the same command"):
        harvest(small(tmp_path, activations={"shard_rows": 64}), host=tiny_host, progress=False)
    assert list((tmp_path / "acts").glob("shard-*.json")) and not list((tmp_path / "acts").glob(".lock*"))
    told = verify(tmp_path / "acts", progress=False)
    assert told["faults"] == [] and told["unfinished"]


def test_compiled_layers_give_the_same_activations_and_the_same_bytes_each_time(tiny_host, tmp_path):
    def made(name, compiled):
        given = small(tmp_path / name, activations={"compile": compiled, "dtype": "float32"}, text={"max_tokens": 1500})
        return harvest(given, host=tiny_host, progress=False)

    plain, one, two = made("a", "off"), made("b", "on"), made("c", "on")
    assert one.readings[0].computed == "float32, compiled" and plain.readings[0].computed == "float32"
    for a, b in zip(plain.blocks(HOOK), one.blocks(HOOK), strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)
        torch.testing.assert_close(a.acts[HOOK][a.mask], b.acts[HOOK][b.mask], atol=1e-4, rtol=1e-4)
    assert contents(one.path) == contents(two.path)
    assert not tiny_host.is_compiled
    with pytest.raises(
        UserError, match="activations.compile: on, and blocks.1.hook_mlp_out are read inside the layers"
    ):
        harvest(small(tmp_path / "d", activations={"compile": "on"}), host=tiny_host, hooks=["blocks.1.hook_mlp_out"])


def test_a_compiled_harvest_that_was_stopped_goes_on_compiled(tiny_host, tmp_path, monkeypatch):
    given = {"activations": {"compile": "on", "shard_rows": 320}, "text": {"max_tokens": 1500}}
    whole = harvest(small(tmp_path / "whole", **given), host=tiny_host, progress=False)
    with pytest.raises(Stopped):
        harvest(small(tmp_path, **given), host=tiny_host, rank=Rank(0, 2), progress=False)
    given["activations"]["compile"] = "auto"  # as it began, whatever would be chosen now
    store = harvest(small(tmp_path, **given), host=tiny_host, progress=False)
    assert store.readings[0].computed == "float32, compiled" and contents(store.path) == contents(whole.path)


def test_a_machine_that_cannot_compile_harvests_plainly_or_says_why(tiny_host, tmp_path, monkeypatch, capsys):
    from sae import harvesting

    def broken(self):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(Host, "compiled", broken)
    with pytest.raises(UserError, match="activations.compile: on, and it fails here .no C.. compiler"):
        harvest(small(tmp_path / "a", activations={"compile": "on"}), host=tiny_host, progress=False)
    monkeypatch.setattr(harvesting, "_COMPILED_FROM", 1)
    monkeypatch.setattr(type(tiny_host), "dtype", property(lambda self: torch.bfloat16))
    manifest = {"shards": [100], "text": {"context": 64}}
    wanted = harvesting._wanted(small(tmp_path), tiny_host, [HOOK])
    assert harvesting._computed(small(tmp_path), tiny_host, manifest, wanted, False) == "bfloat16"
    assert "layers are not compiled: no C++ compiler" in capsys.readouterr().err


def test_ranks_share_the_work_and_the_last_one_completes_the_store(tiny_host, tmp_path, monkeypatch):
    whole = harvest(small(tmp_path / "whole"), host=tiny_host, progress=False)
    for rank in (2, 0):
        with pytest.raises(Stopped, match=f"rank {rank} of 3 has done its share .* still to come from other ranks"):
            harvest(small(tmp_path), host=tiny_host, rank=Rank(rank, 3), progress=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    store = harvest(small(tmp_path), host=tiny_host, progress=False)
    assert store.n_rows == whole.n_rows and contents(store.path) == contents(whole.path)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="rank 3 of 3: ranks go from 0 to 2"):
        harvest(small(tmp_path), host=tiny_host, progress=False)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="RANK is 'one', expected a whole number"):
        harvest(small(tmp_path), host=tiny_host, progress=False)


def test_two_hosts_read_one_store_and_training_takes_the_one_it_names(tiny_host, tokenizer, tmp_path):
    other = make_tiny_host(tokenizer)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    given = small(tmp_path, training={"tokens": 4000}, evaluation={"tokens": 300, "ce_tokens": 0, "every": 0})
    harvest(given, host=tiny_host, progress=False)
    with pytest.raises(UserError, match=f"{tiny_host.fingerprint}.*, this host is {other.fingerprint}"):
        train(given, host=other, progress=False)
    store = harvest(given, host=other, progress=False)
    assert [source.host_fingerprint for source in store.sources] == [tiny_host.fingerprint, other.fingerprint]
    one, two = (store.source(HOOK, host.fingerprint) for host in (tiny_host, other))
    assert torch.equal(store.read([one], 0).tokens, store.read([two], 0).tokens)
    assert not torch.equal(store.read([one], 0).acts[HOOK], store.read([two], 0).acts[HOOK])
    with pytest.raises(UserError, match="of several hosts"):
        store.source(HOOK)
    sae = train(given, host=other, progress=False)
    assert sae.cfg.metadata.host_fingerprint == other.fingerprint


def test_more_hooks_of_the_same_host_are_read_without_reading_the_old_ones_again(tiny_host, tmp_path, monkeypatch):
    harvest(small(tmp_path), host=tiny_host, progress=False)
    before = contents(tmp_path / "acts")
    other = "blocks.1.hook_resid_post"
    real, asked = Host.activations, set()

    def noted(self, tokens, hooks, **options):
        asked.update(hooks)
        return real(self, tokens, hooks, **options)

    monkeypatch.setattr(Host, "activations", noted)
    store = harvest(small(tmp_path), host=tiny_host, hooks=[HOOK, other], progress=False)
    assert asked == {other} and set(store.hooks) == {HOOK, other} and len(store.readings) == 2
    after = contents(tmp_path / "acts")
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    assert verify(tmp_path / "acts", progress=False)["faults"] == []
    asked.clear()
    assert harvest(small(tmp_path), host=tiny_host, hooks=[other], progress=False).n_rows == store.n_rows
    assert not asked
    with pytest.raises(UserError, match="kept as bfloat16, this harvest would have it kept as int8"):
        harvest(small(tmp_path, activations={"dtype": "int8"}), host=tiny_host, progress=False)


def test_training_refuses_a_store_of_other_text_hook_or_format(tiny_host, tmp_path):
    harvest(small(tmp_path), host=tiny_host, progress=False)
    for changes, says in [
        ({"text": {"context": 32}}, "with text.context = 64, now it is 32. Write text.context=64 to use this store"),
        ({"host": {"hook": "blocks.1.hook_resid_post"}}, "has no blocks.1.hook_resid_post .it has blocks.2"),
        ({"activations": {"dtype": "int8"}}, "holds .* as bfloat16, the recipe says activations.dtype=int8"),
    ]:
        with pytest.raises(UserError, match=says):
            train(small(tmp_path, **changes), host=tiny_host, progress=False)
    tokens = copy.copy(tiny_host)
    tokens.__dict__["tokenizer_fingerprint"] = "n3w"
    with pytest.raises(UserError, match="read by tokenizer .*, this host's is n3w"):
        train(small(tmp_path), host=tokens, progress=False)


def test_a_damaged_store_is_found_by_verify_and_mended_by_repair(capsys, tmp_path, tiny):
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"), text=SMALL["text"])
    words = [str(path), "activations.shard_rows=640"]
    assert cli.main(["harvest", *words]) == 0
    before = contents(tmp_path / "acts")
    assert cli.main(["verify", str(tmp_path / "acts"), "--host"]) == 0
    assert "all as they were written" in capsys.readouterr().out
    name = sorted((tmp_path / "acts").glob("shard-*.safetensors"))[2]
    data = bytearray(name.read_bytes())
    data[len(data) // 2] ^= 1
    name.write_bytes(data)
    said = complaint(capsys, "verify", tmp_path / "acts")
    assert name.name in said and "1 file is not what was written" in said and "--repair" in said
    assert cli.main(["harvest", *words]) == 0, "its size is right: only reading finds it"
    name.rename(tmp_path / "away")
    assert f"{name.name}: is missing" in complaint(capsys, "harvest", *words)
    (tmp_path / "away").rename(name)
    assert name.name in complaint(capsys, "train", path, "activations.shard_rows=640", f"out={tmp_path / 'run'}")
    assert cli.main(["harvest", *words, "--repair"]) == 0
    assert contents(tmp_path / "acts") == before
    assert verify(tmp_path / "acts", progress=False)["faults"] == []


def test_another_model_under_the_same_name_is_found_by_verify(tiny_host, tokenizer, tmp_path, monkeypatch):
    harvest(small(tmp_path), host=tiny_host, progress=False)
    other = make_tiny_host(tokenizer)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: other))
    with pytest.raises(UserError, match=f"{tiny_host.fingerprint}.* today is {other.fingerprint}"):
        verify(tmp_path / "acts", with_host=True, progress=False)
    assert verify(tmp_path / "acts", progress=False)["faults"] == []


def test_a_mixture_of_sources_is_harvested_with_its_shares(tiny_host, tmp_path, monkeypatch):
    lines = "".join(
        files.json_line({"text": f"Passage {i} is about the sea, whales and ships. " * 3}) for i in range(400)
    )
    (tmp_path / "sea.jsonl").write_text(lines)
    mix = {"bundled": 1.0, str(tmp_path / "sea.jsonl"): 3.0}
    made = config.build(
        config.to_dict(small(tmp_path)) | {"text": {"source": mix, "context": 64, "max_tokens": 8000}}, "t"
    )
    store = harvest(made, host=tiny_host, progress=False)
    tokens = store.manifest["counts"]["tokens_by_source"]
    assert tokens[str(tmp_path / "sea.jsonl")] / sum(tokens.values()) == pytest.approx(0.75, abs=0.03)
    sources = [document.source for document in store.documents]
    assert set(sources) == set(mix)
    again = Store.open(store.path)
    assert again.text.source == mix
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    assert forecast(made)["harvested"] == "already"
    assert harvest(made, host=tiny_host, progress=False).n_rows == store.n_rows


def test_positions_outside_the_slice_do_not_train(tiny_host, tmp_path):
    store = harvest(small(tmp_path, text={"positions": "3:20"}), host=tiny_host, progress=False)
    for block in store.blocks(HOOK):
        assert bool(((block.pos >= 3) & (block.pos < 20))[block.mask].all()) and bool(block.mask.any())
    assert "outside positions" in masked(store)


# ---- the real host, in processes of its own -----------------------------------------------------------------

KILLED = """host: {{name: smollm2, hook: blocks.3.hook_resid_post}}
text: {{context: 128, max_tokens: {tokens}}}
activations: {{store: {store}, shard_rows: 1024}}
"""


def command(*words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "sae", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_real_host_killed_thirty_times_ends_with_the_same_bytes(host, tmp_path):
    for name in ("whole", "acts"):
        (tmp_path / f"{name}.yaml").write_text(KILLED.format(tokens=40_000, store=tmp_path / name))
    first = command("harvest", tmp_path / "whole.yaml")
    assert first.communicate() and first.returncode == 0
    draw, met = random.Random(0), 0
    while met < 30:
        one = command("harvest", tmp_path / "acts.yaml")
        time.sleep(draw.uniform(3, 9))
        if one.poll() is None:
            one.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            met += 1
        one.communicate()
        if (tmp_path / "acts" / "manifest.json").exists():
            done = files.read_json(tmp_path / "acts" / "manifest.json")["readings"]
            if done and done[0]["shards"] is not None:
                assert contents(tmp_path / "acts") == contents(tmp_path / "whole")
                shutil.rmtree(tmp_path / "acts")
    one = command("harvest", tmp_path / "acts.yaml")
    assert one.communicate()[1] and one.returncode == 0
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_harvests_one_store_with_two_processes(host, tmp_path):
    (tmp_path / "a.yaml").write_text(KILLED.format(tokens=12_000, store=tmp_path / "acts"))
    (tmp_path / "b.yaml").write_text(KILLED.format(tokens=12_000, store=tmp_path / "whole"))
    words = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "sae", "harvest", str(tmp_path / "a.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)
    one = command("harvest", tmp_path / "b.yaml", OMP_NUM_THREADS="1")
    one.communicate()
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")
