"""The store: what is written is read back row for row; what does not belong is refused by name; kills lose nothing."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sae import files, locks
from sae.activations import build, shards
from sae.activations.manifest import read_manifest
from sae.activations.store import Store
from sae.activations.verify import bad_shards, faults
from sae.errors import UserError
from sae.parallel import Rank
from sae.places import Place
from tests.activations.planted import CONTEXT, HOOK, OTHER, acts_of, make, text_facts, token_of

ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def whole(store, hook=HOOK):
    blocks = list(store.blocks(hook))
    return {name: torch.cat([getattr(b, name) for b in blocks]) for name in ("tokens", "doc", "pos", "mask")} | {
        "acts": torch.cat([b.acts[hook] for b in blocks])
    }


# ---- there and back ----------------------------------------------------------------------------------------


def test_every_row_comes_back_once_with_its_token_document_and_position(tmp_path):
    store = make(tmp_path / "acts")
    assert store.n_rows == 43 * CONTEXT and store.shard_rows == [80, 80, 80, 80, 24]
    rows = whole(store)
    assert torch.equal(rows["tokens"].sort().values, torch.arange(43 * CONTEXT, dtype=torch.int32))
    assert torch.equal(rows["acts"], acts_of(rows["tokens"])) and rows["acts"].dtype == torch.bfloat16
    assert torch.equal(rows["doc"], rows["tokens"] // CONTEXT) and torch.equal(rows["pos"], rows["tokens"] % CONTEXT)
    assert torch.equal(rows["mask"], rows["pos"] > 0)
    assert [d.text for d in store.documents] == [f"text {i}\u2028and\x85more" for i in range(43)]


def test_sequences_stay_whole_and_are_shuffled(tmp_path):
    rows = whole(make(tmp_path / "acts", 200))
    first = rows["doc"].view(-1, CONTEXT)
    assert bool((first == first[:, :1]).all())
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())


def test_a_shard_alone_is_a_plain_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    make(tmp_path / "acts")
    tensors = load_file(tmp_path / "acts" / "shard-00001.safetensors")
    assert set(tensors) == {f"acts.{HOOK}", "tokens", "doc", "pos", "mask"}
    assert torch.equal(tensors[f"acts.{HOOK}"], acts_of(tensors["tokens"]))
    assert tensors["mask"].dtype == torch.uint8 and tensors["tokens"].dtype == torch.int32


def test_several_hooks_are_one_reading_and_each_is_a_source(tmp_path):
    store = make(tmp_path / "acts", hooks=(HOOK, OTHER))
    assert [source.hook for source in store.sources] == [HOOK, OTHER]
    one, two = whole(store, HOOK), whole(store, OTHER)
    assert torch.equal(one["acts"][:, :3], two["acts"][:, :3]) and bool((two["acts"][:, 3] == 2).all())


def test_a_second_host_reads_the_same_token_rows_into_the_same_store(tmp_path):
    make(tmp_path / "acts")
    before = contents(tmp_path / "acts")
    store = make(tmp_path / "acts", hooks=(OTHER,), width=24, host="other", host_fingerprint="beef")
    assert [(s.host, s.hook, s.width) for s in store.sources] == [("tiny", HOOK, 16), ("other", OTHER, 24)]
    after = contents(tmp_path / "acts")
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    assert torch.equal(whole(store, HOOK)["tokens"], whole(store, OTHER)["tokens"])
    both = store.read(store.sources, 1)
    assert both.acts[HOOK].shape[1] == 16 and both.acts[OTHER].shape[1] == 24
    assert torch.equal(token_of(both.acts[HOOK]), token_of(both.acts[OTHER]))
    assert list(faults(store.place)) == []


@pytest.mark.parametrize("dtype,worst", [("float32", 0.0), ("int8", 0.02)])
def test_other_number_formats_come_back(tmp_path, dtype, worst):
    store = make(tmp_path / "acts", dtype=dtype)
    rows = whole(store)
    error = (rows["acts"].float() - acts_of(rows["tokens"]).float()).norm() / acts_of(rows["tokens"]).float().norm()
    assert error <= worst
    assert rows["acts"].dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert list(faults(store.place)) == []


def test_int8_takes_half_the_disk_and_little_of_what_varies():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1000, 64, generator=g) + 2) * torch.logspace(0, 2, 64)  # columns of very different size
    x[7] = 0
    mask = torch.arange(1000) != 7
    back = shards.restored(**shards.quantised(x, mask)).float()
    about = (x[mask] - x[mask].mean(0)).square().sum(0)
    assert float(((back - x)[mask].square().sum(0) / about).max()) < 3e-4
    assert bool(back.isfinite().all())


# ---- resume ------------------------------------------------------------------------------------------------


def test_an_interrupted_harvest_goes_on_and_ends_the_same(tmp_path):
    make(tmp_path / "whole")
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "acts", each=failing)
    with pytest.raises(UserError, match="not finished"):
        Store.open(tmp_path / "acts")
    calls.clear()
    make(tmp_path / "acts", each=lambda: calls.append(1))
    assert 0 < len(calls) < 13, "finished shards are kept"
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_a_store_without_text_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"memory: holds no text \(part train\)"):
        make(tmp_path / "acts", 0)
    assert not (tmp_path / "acts").exists()


def test_text_that_the_disk_cannot_hold_is_refused_before_any_forward(tmp_path):
    def fits(rows):
        raise UserError(f"needs {rows}")

    with pytest.raises(UserError, match="needs 344"):
        make(tmp_path / "acts", fits=fits, each=lambda: pytest.fail("a host ran"))
    assert not (tmp_path / "acts").exists()


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path, monkeypatch):
    real, writes = files.write_blocks, []

    def full(path, blocks):
        if "shard" in path.name and path.suffix == ".safetensors":
            writes.append(path)
            if len(writes) == 2:
                with files.atomic_file(path) as temporary:
                    temporary.write_bytes(b"half")
                    raise OSError(errno.ENOSPC, "No space left on device")
        real(path, blocks)

    monkeypatch.setattr(files, "write_blocks", full)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: no space left"):
        make(tmp_path / "acts")
    names = sorted(contents(tmp_path / "acts"))
    assert "shard-00000.json" in names and not any("00001.safetensors" in n or n.startswith(".") for n in names[1:])
    monkeypatch.setattr(files, "write_blocks", real)
    make(tmp_path / "whole")
    make(tmp_path / "acts")
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.activations.planted import make
from sae.parallel import Rank
made = make({path!r}, {sequences}, each=lambda: time.sleep({pause}), rank=Rank({rank}, {world}))
print("done", made is not None)
"""


def process(path, sequences=43, pause=0.02, rank=0, world=1):
    script = SCRIPT.format(root=str(ROOT), path=str(path), sequences=sequences, pause=pause, rank=rank, world=world)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def killed_until_done(path, kills, longest, draw):
    """Start it again and again, kill it after a random time; how many kills met it at work."""
    met = 0
    while met < kills:
        one = process(path, sequences=400)
        deadline = time.monotonic() + 60
        while not (path / "manifest.json").exists() and draw.random() < 0.9 and time.monotonic() < deadline:
            time.sleep(0.05)  # mostly while it makes shards, sometimes while it reads text or starts
        time.sleep(draw.uniform(0, longest))
        if one.poll() is None:
            one.send_signal(signal.SIGKILL)
            met += 1
        one.communicate()
        manifest = read_manifest(Place(path))
        if manifest and manifest["readings"] and all(reading["shards"] for reading in manifest["readings"]):
            break
    out, err = process(path, sequences=400, pause=0).communicate()
    assert out.strip() == "done True", err
    return met


@pytest.mark.parametrize("kills", [pytest.param(2), pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, kills):
    make(tmp_path / "whole", 400)
    met, draw = 0, random.Random(kills)
    while met < kills:
        folder = tmp_path / f"acts{met}"
        met += killed_until_done(folder, kills - met, 1.0, draw)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_second_writer_is_refused_with_the_process_that_writes(tmp_path):
    one = process(tmp_path / "acts", pause=0.3)
    try:
        while not (tmp_path / "acts" / "manifest.json").exists():
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"process {one.pid} on .* has been writing it since"):
            make(tmp_path / "acts")
    finally:
        one.kill()
        one.communicate()
    make(tmp_path / "acts")  # the lock of a killed process is no lock
    assert not any(name.startswith(".") for name in contents(tmp_path / "acts"))


@pytest.mark.parametrize("change", [{"rows": 81}, {"valid": "7x"}, {"valid": -3}, {"file": "../x"}, {"bytes": 3}, None])
def test_a_damaged_note_costs_one_shard_and_no_more(tmp_path, change):
    make(tmp_path / "whole")
    make(tmp_path / "acts", rank=Rank(0, 2))
    note = tmp_path / "acts" / "shard-00000.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | change) if change else "{")
    make(tmp_path / "acts")
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


# ---- many processes ----------------------------------------------------------------------------------------


def test_ranks_write_disjoint_shards_of_one_store_that_is_the_same_as_one_process_makes(tmp_path):
    make(tmp_path / "whole")
    assert make(tmp_path / "acts", rank=Rank(1, 3)) is None
    assert make(tmp_path / "acts", rank=Rank(0, 3)) is None
    assert make(tmp_path / "acts", rank=Rank(2, 3)) is not None
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_a_killed_rank_is_started_again_alone_while_the_others_go_on(tmp_path):
    make(tmp_path / "whole", 160)
    ranks = [process(tmp_path / "acts", 160, pause=0.02, rank=rank, world=2) for rank in range(2)]
    while not any((tmp_path / "acts").glob("shard-*.json")):
        time.sleep(0.02)
    ranks[1].kill()
    ranks[1].communicate()
    ranks.append(process(tmp_path / "acts", 160, pause=0.02, rank=1, world=2))
    said = [ranks[i].communicate() for i in (0, 2)]
    assert "done True" in said[0][0] + said[1][0], said
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_ranks_that_start_at_the_same_moment_get_along(tmp_path):
    make(tmp_path / "whole", 160)
    ranks = [process(tmp_path / "acts", 160, pause=0, rank=rank, world=4) for rank in range(4)]
    said = [one.communicate() for one in ranks]
    assert all(out.startswith("done") for out, _ in said), said
    assert sum(out.strip() == "done True" for out, _ in said) >= 1
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_one_process_and_ranks_keep_each_other_out(tmp_path):
    place = Place(tmp_path / "acts")
    with build.writing(place, Rank(0, 2)):
        with pytest.raises(UserError, match="being written by rank-0-of-2"), build.writing(place, Rank()):
            pass
        with pytest.raises(UserError, match="has been writing it since"), build.writing(place, Rank(0, 2)):
            pass
        with build.writing(place, Rank(1, 2)):
            pass
        with pytest.raises(UserError, match="by rank-0-of-2, this is rank 1 of 3"), build.writing(place, Rank(1, 3)):
            pass
    alone = pytest.raises(UserError, match="by one process alone")
    with build.writing(place, Rank()), alone, build.writing(place, Rank(0, 2)):
        pass


# ---- what does not belong ----------------------------------------------------------------------------------


def test_a_store_of_other_text_is_refused_with_both_values(tmp_path):
    make(tmp_path / "acts")
    with pytest.raises(UserError, match="with text.held_out = 0.1, now it is 0.2. Write text.held_out=0.1 to"):
        make(tmp_path / "acts", text=text_facts(held_out=0.2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not an activation store"):
        make(tmp_path / "other")
    assert contents(tmp_path / "other") == {"thesis.txt": b"mine"}


def test_another_host_hook_tokenizer_or_width_is_refused_with_both_values(tmp_path):
    store = make(tmp_path / "acts")
    store.check("f00d", HOOK, tokenizer="t0k", width=16)
    for arguments, said in [
        (("beef", HOOK, "t0k", 16), "from tiny .f00d., this host is beef"),
        (("f00d", OTHER, "t0k", 16), f"has no {OTHER} .it has {HOOK}"),
        (("f00d", HOOK, "n3w", 16), "tokenizer t0k, this host's is n3w"),
        (("f00d", HOOK, "t0k", 24), "is 16 wide there, 24 in this host"),
    ]:
        with pytest.raises(UserError, match=said):
            store.check(*arguments[:2], tokenizer=arguments[2], width=arguments[3])


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[:-40])
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif how == "flipped at the end":  # the mask, which no activation depends on
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "header":
        data[20] ^= 32
        path.write_bytes(data)
    elif how == "swapped":
        path.write_bytes((path.parent / "shard-00002.safetensors").read_bytes())
    elif how == "missing":
        path.unlink()
    elif how == "length":
        data[:8] = (1 << 60).to_bytes(8, "little")
        path.write_bytes(data)


@pytest.mark.parametrize(
    "how,says",
    [
        ("cut", "has .* bytes, the manifest says"),
        ("flipped", "is not what was written"),
        ("flipped at the end", "mask is not what was written"),
        ("header", "header is damaged|is of store|not what was written|is shard"),
        ("length", "it would be .* bytes long, the file has"),
        ("swapped", "is shard 2, expected shard 1"),
        ("missing", "is missing"),
        ("foreign", "is of store .*, this one is"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_when_read_and_when_verified_and_repair_mends_it_alone(tmp_path, how, says):
    make(tmp_path / "acts", 40)
    before = contents(tmp_path / "acts")
    path = tmp_path / "acts" / "shard-00001.safetensors"
    if how == "foreign":
        make(tmp_path / "b", 40, host_fingerprint="beef")
        path.write_bytes((tmp_path / "b" / path.name).read_bytes())
    damage(path, how)
    with pytest.raises(UserError, match=f"shard-00001.safetensors: .*({says})"):
        whole(Store.open(tmp_path / "acts"))
    found = list(faults(Place(tmp_path / "acts")))
    assert [fault.file for fault in found] == ["shard-00001.safetensors"], found

    place = Place(tmp_path / "acts")
    manifest = read_manifest(place)
    bad = bad_shards(place, manifest, 0)
    assert list(bad) == [1]
    build.without(place, manifest, 0, set(bad))
    calls = []
    make(tmp_path / "acts", 40, each=lambda: calls.append(1))
    assert len(calls) == 3, "one shard of ten sequences, four at a time"
    assert contents(tmp_path / "acts") == before


def test_a_shard_of_other_text_read_in_the_same_way_is_refused_when_read(tmp_path, monkeypatch):
    from tests.activations import planted

    make(tmp_path / "a", 40)
    real = planted.Packer.__iter__

    def other(self):
        for rows in real(self):
            rows.tokens.add_(1)
            yield rows

    monkeypatch.setattr(planted.Packer, "__iter__", other)
    make(tmp_path / "b", 40)
    name = "shard-00001.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(UserError, match=f"{name}: is of store"):
        whole(Store.open(tmp_path / "a"))


@pytest.mark.parametrize("sums", ['"5"', '{"mask": 5}', '{"mask": {}}', "[]", "[" * 100_000])
def test_a_hostile_header_is_one_line(tmp_path, sums):
    make(tmp_path / "acts", 40)
    path = tmp_path / "acts" / "shard-00001.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["crc32"] = sums
    text = json.dumps(header).encode()
    text = text[: len(text)] + b" " * max(0, length - len(text))
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: (its header is damaged|has .* bytes)"):
        whole(Store.open(tmp_path / "acts"))
    assert [fault.file for fault in faults(Place(tmp_path / "acts"))] == [path.name]


def test_counts_of_the_manifest_are_checked_against_the_token_rows(tmp_path):
    make(tmp_path / "acts")
    path = tmp_path / "acts" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("documents", "positions", "padding", "sequences", "first"):
        path.write_text(json.dumps(manifest | {"counts": manifest["counts"] | {name: 7}}))
        assert [fault.file for fault in faults(Place(tmp_path / "acts"))] == ["manifest.json"], name


def test_a_lost_line_of_documents_is_refused(tmp_path):
    store = make(tmp_path / "acts")
    path = tmp_path / "acts" / "documents-00000.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[1:]))
    with pytest.raises(UserError, match="documents-00000.jsonl: missing or damaged .not what was written"):
        _ = store.documents


def test_changed_counts_and_rows_and_documents_are_faults(tmp_path):
    make(tmp_path / "acts", 40)
    path = tmp_path / "acts" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["readings"][0]["shards"][0]["valid"] -= 1
    path.write_text(json.dumps(manifest))
    (tmp_path / "acts" / "documents-00000.jsonl").write_text("{\n")
    rows = tmp_path / "acts" / "rows-00000.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"\x07")
    found = {fault.file: fault.why for fault in faults(Place(tmp_path / "acts"))}
    assert set(found) == {"documents-00000.jsonl", "rows-00000.safetensors", "shard-00000.safetensors"}
    assert "70 rows count, the manifest says 69" in found["shard-00000.safetensors"]
    with pytest.raises(UserError, match="documents-00000.jsonl: missing or damaged"):
        _ = Store.open(tmp_path / "acts").documents


def test_activations_that_are_not_finite_are_a_fault(tmp_path, monkeypatch):
    from tests.activations import planted

    real = planted.acts_of

    def broken(tokens, *rest):
        acts = real(tokens, *rest)
        acts[tokens == 13] = float("nan")
        return acts

    monkeypatch.setattr(planted, "acts_of", broken)
    make(tmp_path / "acts")
    (found,) = faults(Place(tmp_path / "acts"))
    assert "holds NaN or infinity and counts" in found.why


@pytest.mark.parametrize(
    "content,says",
    [
        ("{}", "has no 'format'"),
        ("[]", "holds list, not a JSON object"),
        ("{", "not valid JSON"),
        (
            '{"format": 2, "text": [], "counts": {}, "blocks": [], "shards": [], "readings": []}',
            "not a manifest of ours",
        ),
        ('{"format": 1, "description": {}}', "format 1, this version reads 2. Delete it"),
        ('{"format": 99}', "format 99, this version reads 2. Upgrade"),
    ],
)
def test_a_manifest_of_another_shape_is_one_line(tmp_path, content, says):
    (tmp_path / "manifest.json").write_text(content)
    for use in (Store.open, make, lambda path: list(faults(Place(path)))):
        with pytest.raises(UserError, match=says) as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "manifest.json").read_text() == content


def leaves(value, path=()):
    """Every place in nested JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from leaves(one, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("new", [None, "x", -1, 10**30, [], {}, True, 2.5, [None]], ids=repr)
def test_a_manifest_with_anything_in_any_place_is_read_or_refused_in_one_line(tmp_path, new):
    make(tmp_path / "acts", 12)
    path = tmp_path / "acts" / "manifest.json"
    manifest = json.loads(path.read_text())
    for place in leaves(manifest):
        path.write_text(json.dumps(changed(manifest, place, new)))
        for use in (
            lambda: whole(Store.open(tmp_path / "acts")),
            lambda: Store.open(tmp_path / "acts").documents,
            lambda: list(faults(Place(tmp_path / "acts"))),
        ):
            try:
                use()
            except UserError as error:
                assert "\n" not in str(error), place
            except Exception as error:
                raise AssertionError(f"{place} = {new!r}: {type(error).__name__}: {error}") from error


# ---- elsewhere ---------------------------------------------------------------------------------------------


def test_a_store_in_memory_is_the_same_as_one_on_disk(tmp_path):
    make(tmp_path / "acts")
    store = make("memory://bucket/acts")
    there = {name: store.place.read(name) for name in store.place.names()}
    assert there == contents(tmp_path / "acts")
    assert list(faults(store.place)) == []
    with pytest.raises(UserError, match="memory://bucket/none: not an activation store"):
        Store.open("memory://bucket/none")


def test_a_lease_is_refused_while_it_is_renewed_and_taken_over_when_it_is_not(monkeypatch):
    place = Place("memory://bucket/leased")
    with locks.lock(place, "x"):
        assert locks.is_held(place, "x")
        with pytest.raises(locks.Held, match=f"process {os.getpid()} on .* has been writing"), locks.lock(place, "x"):
            pass
    assert not locks.is_held(place, "x") and place.names() == []
    place.write_json(".lock-x.json", {"pid": 1, "machine": "elsewhere", "since": 0, "renewed": time.time() - 61})
    with locks.lock(place, "x"):
        assert place.read_json(".lock-x.json")["pid"] == os.getpid()
    monkeypatch.setattr(locks, "RENEWED_EVERY", 0.05)
    with locks.lock(place, "x"):
        before = place.read_json(".lock-x.json")["renewed"]
        time.sleep(0.3)
        assert place.read_json(".lock-x.json")["renewed"] > before
    assert all(thread.name != "lease" for thread in threading.enumerate())


def test_an_address_that_nobody_knows_is_one_line():
    with pytest.raises(UserError, match="ftpx://a: not a folder that fsspec knows"):
        Place("ftpx://a")
