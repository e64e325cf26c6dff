"""A run that is stopped or killed anywhere ends as an unbroken one, to the bit: stored, live, in every architecture.

Many kills with the real host: experiments/kills.py, run here at the end (slow).
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sae import cli, config, files, machine, trainer
from sae.activations import batches as feed
from sae.errors import Stopped, UserError
from sae.host import Host
from sae.run import info, train
from sae.training import checkpoint
from sae.training.dead import Dead
from tests.test_run import complaint, recipe, tiny, write_recipe

__all__ = ["tiny"]  # a fixture
SHORT = {"text": {"max_tokens": 6000}, "training": {"tokens": 24_000, "batch": 256, "save_every": 1e9},
         "evaluation": {"tokens": 200, "ce_tokens": 0, "every": 0.25}, "log": {"every": 1}}  # fmt: skip


def given(folder, stored=True, architecture="topk", **training):
    sections = json.loads(json.dumps(SHORT))
    sections["training"] |= training
    made = recipe(folder, str(folder / "acts") if stored else None, sae={"architecture": architecture}, **sections)
    return made


def sha(run):
    return hashlib.sha256((Path(run) / "sae" / "sae_weights.safetensors").read_bytes()).hexdigest()


def figures(run):
    lines = files.read_lines(Path(run) / "metrics.jsonl")
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines), "the clock goes on"
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def stopping(monkeypatch, after, number=signal.SIGTERM):
    """This process gets the signal in that many steps from now."""
    count, calls = Dead.count_, []

    def counting(self, codes, fired=None):
        calls.append(0)
        if len(calls) == after:
            os.kill(os.getpid(), number)
        count(self, codes, fired)

    monkeypatch.setattr(Dead, "count_", counting)


@pytest.mark.parametrize("stored", [True, False], ids=["store", "live"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu"])
def test_a_run_stopped_three_times_ends_with_the_same_weights_and_figures(
    tiny_host, tmp_path, monkeypatch, architecture, stored
):
    """JumpReLU and ReLU with the controller that holds L0; an average, resampling, several passes over the text."""
    options = {"ema": 0.99, "resample_every": 5000, "dead_after": 1000}
    whole = given(tmp_path / "whole", stored, architecture, **options)
    train(whole, host=tiny_host, progress=False)
    made = given(tmp_path / "stopped", stored, architecture, **options)
    for after, number in ((7, signal.SIGTERM), (41, signal.SIGINT), (30, signal.SIGTERM)):
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            stopping(patch, after, number)
            train(made, host=tiny_host, progress=False, resume=True)
        assert stopped.value.code == 128 + number
    assert checkpoint.steps(Path(made.out))[-1] == 78
    train(made, host=tiny_host, progress=False, resume=True)
    assert sha(made.out) == sha(whole.out)
    assert figures(made.out) == figures(whole.out)


def test_a_live_run_that_is_stopped_harvests_nothing_twice(tiny_host, tmp_path, monkeypatch):
    """Text that is longer than what is read: of all starts together, no sequence goes through the host twice."""
    activations, read = Host.activations, []

    def counted(self, tokens, names, **options):
        read.extend(map(tuple, tokens.tolist()))
        return activations(self, tokens, names, **options)

    monkeypatch.setattr(Host, "activations", counted)
    made = given(tmp_path, stored=False)
    made = replace(made, text=replace(made.text, max_tokens=20_000))
    for after in (5, 9, 20):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stopping(patch, after)
            train(made, host=tiny_host, progress=False, resume=True)
    first = len(read)
    assert first > 20 and (tmp_path / "run" / "rows" / "sample.safetensors").exists()
    repeated = [row for row in set(read) if read.count(row) > 1]
    # The outlier limits are found on the first rows of the text, before anything is kept.
    assert len(repeated) <= 64
    train(made, host=tiny_host, progress=False, resume=True)
    assert not (tmp_path / "run" / "rows").exists(), "what nobody needs any more is gone"


def test_a_signal_while_the_first_rows_are_harvested_ends_at_once_and_loses_none(tiny_host, tmp_path, monkeypatch):
    activations, calls = Host.activations, []

    def slow(self, tokens, names, **options):
        calls.append(0)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return activations(self, tokens, names, **options)

    monkeypatch.setattr(Host, "activations", slow)
    made = given(tmp_path, stored=False)
    with pytest.raises(Stopped) as stopped:
        train(made, host=tiny_host, progress=False)
    assert stopped.value.code == 143 and len(calls) == 12
    assert len(list((tmp_path / "run" / "rows").glob("block-*"))) > 0
    train(made, host=tiny_host, progress=False, resume=True)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_one_seed_gives_the_same_weights_whatever_reads_ahead(tiny_host, tmp_path, monkeypatch, depth):
    """No thread, one that is a batch ahead, one that is five."""
    train(given(tmp_path / "a"), host=tiny_host, progress=False)
    prefetched = feed.prefetched

    def ahead(items, **options):
        return prefetched(items, depth, **options) if depth else (one for one in items)

    monkeypatch.setattr(feed, "prefetched", ahead)
    train(given(tmp_path / "b"), host=tiny_host, progress=False)
    assert sha(tmp_path / "a" / "run") == sha(tmp_path / "b" / "run")


def test_the_run_folder_says_what_was_given_what_it_meant_and_what_it_ran_on(tiny_host, tmp_path):
    made = given(tmp_path, architecture="jumprelu")
    train(made, host=tiny_host, progress=False)
    assert config.load(tmp_path / "run" / "recipe.yaml") == made
    known = files.read_json(tmp_path / "run" / "resolved.json")
    assert known["recipe"] == config.to_dict(made)
    again = config.build(known["resolved"], "resolved")  # a recipe too
    assert again.sae.target_l0 == made.sae.k and again.training.lr and again.training.dead_after == 1200
    left = [name for name, value in config.to_dict(again)["training"].items() if value in (None, "auto")]
    assert sorted(left) == ["init_from", "resample_every"], "auto is left nowhere; these mean never and none"
    assert again.sae.jumprelu_bandwidth == 2.0 and again.sae.l0_coefficient > 0
    assert known["versions"]["torch"] == metadata.version("torch")
    assert {"python", "torch", "numpy", "safetensors", "transformers"} <= set(known["versions"])
    assert len(known["git_revision"]) == 40 and known["machine"] == machine.describe()


def test_a_resolved_recipe_trains_the_same_sae(tiny_host, tmp_path):
    for architecture in ("topk", "jumprelu", "relu"):
        train(given(tmp_path / architecture, architecture=architecture), host=tiny_host, progress=False)
        resolved = files.read_json(tmp_path / architecture / "run" / "resolved.json")["resolved"]
        again = config.build(resolved | {"out": str(tmp_path / f"{architecture}-again")}, "resolved")
        train(again, host=tiny_host, progress=False)
        assert sha(tmp_path / architecture / "run") == sha(tmp_path / f"{architecture}-again")


def test_resuming_with_changed_fields_names_them_all(capsys, tmp_path, tiny):
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"), **SHORT)
    assert cli.main(["train", str(path)]) == 0
    words = ["--resume", "sae.k=9", "training.lr=0.01", "training.save_every=5"]
    said = complaint(capsys, "train", tmp_path / "run", *words)
    assert "sae.k = 8, now it is 9; training.lr = None, now it is 0.01" in said and "save_every" not in said


def test_another_machine_or_version_is_said_and_goes_on(tiny_host, tmp_path, monkeypatch, caplog):
    made = given(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 20)
        train(made, host=tiny_host, progress=False)
    monkeypatch.setattr(trainer, "versions", lambda: {"torch": "9.9"})
    train(made, host=tiny_host, progress=False, resume=True)
    assert "it goes on here, but may not end with the same bits" in caplog.text


# ---- what a run goes on from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5000, 7000, 12_000])
def test_a_live_run_stopped_before_its_first_step_begins_with_the_same_sample(tiny_host, tmp_path, monkeypatch, tokens):
    """Texts shorter and longer than the buffer, all shorter than the sample that is asked for."""

    def of(folder):
        made = given(folder, stored=False)
        return replace(made, text=replace(made.text, max_tokens=tokens))

    train(of(tmp_path / "whole"), host=tiny_host, progress=False)
    from sae import sources

    first_rows = sources.first_rows

    def killed(blocks, n):
        first_rows(blocks, n)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sources, "first_rows", killed)
        train(of(tmp_path / "killed"), host=tiny_host, progress=False)
    train(config.load(tmp_path / "killed" / "run"), host=tiny_host, progress=False, resume=True)
    assert sha(tmp_path / "killed" / "run") == sha(tmp_path / "whole" / "run")


def test_a_hook_whose_neighbour_is_finished_goes_on_with_the_same_rows(tiny_host, tmp_path, monkeypatch):
    """Rows that are outliers at either hook count at neither: also when only one of the two is left to train."""
    from sae import trainer
    from sae.activations import harvest
    from sae.run import train_many

    monkeypatch.setattr(harvest, "OUTLIER_FACTOR", 1.2)

    def of(folder):
        one = given(folder, stored=False)
        return [
            replace(one, host=replace(one.host, hook=f"blocks.{i}.hook_resid_post"), out=f"{folder}/{i}")
            for i in (1, 2)
        ]

    train_many(of(tmp_path / "whole"), host=tiny_host, progress=False)
    finish, made = trainer.finish, []

    def second_is_killed(*args):
        made.append(0)
        if len(made) == 2:
            raise KeyboardInterrupt
        return finish(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "finish", second_is_killed)
        train_many(of(tmp_path / "killed"), host=tiny_host, progress=False)
    assert not (tmp_path / "killed" / "2" / "sae").exists()
    train_many(of(tmp_path / "killed"), host=tiny_host, progress=False, resume=True)
    for hook in "12":
        assert sha(tmp_path / "killed" / hook) == sha(tmp_path / "whole" / hook)
    assert not (tmp_path / "killed" / "1" / "rows").exists()


def test_an_sae_of_another_recipe_is_neither_overwritten_nor_taken_for_the_run_s(tiny_host, tmp_path):
    made = given(tmp_path)
    train(made, host=tiny_host, progress=False)
    files.remove_folder(tmp_path / "run" / "checkpoints")
    other = replace(made, sae=replace(made.sae, k=4))
    with pytest.raises(UserError, match="holds a run already"):
        train(other, host=tiny_host, progress=False)
    (tmp_path / "run" / "resolved.json").unlink()
    assert train(other, host=tiny_host, progress=False, resume=True).cfg.k == 4


def test_checkpoints_that_nobody_says_what_they_are_of_are_not_thrown_away(tiny_host, tmp_path, monkeypatch):
    made = given(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 20)
        train(made, host=tiny_host, progress=False)
    (tmp_path / "run" / "resolved.json").unlink()
    with pytest.raises(UserError, match="has checkpoints and no resolved.json"):
        train(made, host=tiny_host, progress=False, resume=True)
    assert checkpoint.steps(tmp_path / "run") == [20]


def test_other_rows_another_host_and_another_order_of_a_mixture_are_refused(tiny_host, tmp_path, monkeypatch):
    made, x = given(tmp_path), torch.randn(3000, 32)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 20)
        train(made, x, progress=False)
    with pytest.raises(UserError, match="began with rows 3000, now it is 500"):
        train(made, x[:500], progress=False, resume=True)
    with pytest.raises(UserError, match="began on activations of norm factor"):
        train(made, 3 * x, progress=False, resume=True)
    path = tmp_path / "run" / "resolved.json"
    known = files.read_json(path)
    known["recipe"]["text"]["source"] = {"a": 0.5, "b": 0.5}
    files.write_json(path, known)
    other = replace(made, text=replace(made.text, source={"b": 0.5, "a": 0.5}))
    with pytest.raises(UserError, match="text.source"):
        train(other, x, progress=False, resume=True)


def test_a_bit_that_changed_in_a_checkpoint_is_found(tiny_host, tmp_path, monkeypatch):
    made = given(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 20)
        train(made, host=tiny_host, progress=False)
    path = checkpoint.all_of(tmp_path / "run")[-1] / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="its bytes are not what was written.*Delete this folder"):
        train(made, host=tiny_host, progress=False, resume=True)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(tiny_host, tmp_path, monkeypatch):
    train(given(tmp_path / "whole"), host=tiny_host, progress=False)
    made = given(tmp_path / "old")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 20)
        train(made, host=tiny_host, progress=False)
    path = checkpoint.all_of(Path(made.out))[-1] / "training.json"
    facts = files.read_json(path)
    files.write_json(path, {name: facts[name] for name in ("step", "position", "norm_factor")})
    train(made, host=tiny_host, progress=False, resume=True)
    assert sha(made.out) == sha(tmp_path / "whole" / "run")


def test_what_has_diverged_does_not_push_out_what_is_sound(tmp_path):
    from tests.training.test_training import planted
    from tests.training.test_training import recipe as of

    with pytest.raises(UserError, match="learning rate may be too high"):
        train(of(tmp_path / "run", tokens=40_000, lr=1e30, save_every=1e-9), planted(2000)[0], progress=False)
    for folder in checkpoint.all_of(tmp_path / "run"):
        assert checkpoint.facts_of(folder)["in_a_row"] == 0


def test_sigterm_after_the_last_step_says_how_to_go_on(tiny_host, tmp_path, monkeypatch):
    from sae import trainer

    made, finish = given(tmp_path), trainer.finish

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="after the last step, which is saved. Go on with"),
    ):
        patch.setattr(trainer, "finish", terminated)
        train(made, host=tiny_host, progress=False)
    assert train(made, host=tiny_host, progress=False, resume=True).stats is not None


def test_a_target_that_was_missed_is_said(tmp_path, caplog):
    from sae.recipe import SAERecipe
    from tests.training.test_training import planted
    from tests.training.test_training import recipe as of

    made = replace(of(tmp_path / "run", tokens=3_000), sae=SAERecipe("relu", d_sae=80, target_l0=4))
    train(made, planted(2000)[0], progress=False)
    assert "was asked for: train longer" in caplog.text


# ---- before it starts ------------------------------------------------------------------------------------------


def test_dry_run_prints_the_resolved_recipe_and_what_it_will_take_and_writes_nothing(capsys, tmp_path, tiny):
    path = write_recipe(tmp_path, **SHORT)
    assert cli.main(["train", str(path), "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(out)
    printed = config.load(tmp_path / "printed.yaml")
    assert printed.training.lr is not None and printed.training.device == "cpu"
    assert printed.host.hook == "blocks.2.hook_resid_post" and printed.host.dtype == "float32"
    told = files.read_json(tmp_path / "plan.json")
    assert told["steps"] == 93 and told["memory beside the host (MB)"] > 0 and "s" in told["time of the steps"]
    assert told["resolved"][0]["sae"]["d_sae"] == 128
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_what_memory_cannot_hold_is_refused_with_the_largest_that_fits(
    capsys, tmp_path, tiny, monkeypatch, architecture
):
    from sae import plan

    monkeypatch.setattr(machine, "free_memory", lambda: 260_000_000)
    wide = {"sae": {"d_sae": 600_000, "architecture": architecture}, **SHORT}
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"), **wide)
    said = complaint(capsys, "train", path)
    assert "needs" in said and "260 MB are free" in said and "sae.d_sae up to " in said
    assert said == complaint(capsys, "train", path, "--dry-run")
    assert not (tmp_path / "acts").exists(), "before a store is harvested for it"
    fits = int(said.partition("sae.d_sae up to ")[2].split()[0].replace(",", ""))
    made = config.load(path, [f"sae.d_sae={fits}"])
    a_row = plan.row_bytes(made, {"blocks.2.hook_resid_post": 32}, tiny)
    assert plan.memory_of([made], [32], a_row, None).least <= 260e6
    assert plan.memory_of([config.load(path, [f"sae.d_sae={fits + 256}"])], [32], a_row, None).least > 260e6


def test_given_rows_are_refused_too_where_training_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 50_000_000)
    with pytest.raises(UserError, match="training: needs .* and 50 MB are free. Free some memory"):
        train(given(tmp_path), torch.randn(3000, 32), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(capsys, tmp_path, tiny, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    said = complaint(capsys, "train", write_recipe(tmp_path, **SHORT))
    assert "the run writes" in said and "3 checkpoints, the SAE and what a live run keeps" in said


def test_the_line_at_the_start_says_memory_and_time(capsys, tmp_path, tiny):
    assert cli.main(["train", str(write_recipe(tmp_path, **SHORT))]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("memory beside the host: "))
    assert "weights and moments" in line and "shuffle buffer" in line
    assert "· time of the steps and the host's forward: " in line


# ---- real processes --------------------------------------------------------------------------------------------


def command(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, "-m", "sae", *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_step(run, step, one):
    for _ in range(1200):
        if (steps := checkpoint.steps(run)) and steps[-1] > step:
            return steps[-1]
        assert one.poll() is None, one.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("no checkpoint in a minute")


@pytest.mark.timeout(300)
def test_a_run_of_the_real_host_killed_twice_ends_with_the_same_weights(host, tmp_path):
    """kill -9, then SIGTERM, from outside, in the middle of steps and saves; JumpReLU with its controller."""
    text = (
        "host: {name: smollm2, hook: blocks.1.hook_resid_post, dtype: float32}\n"
        "text: {context: 64, max_tokens: 5000}\n"
        f"activations: {{store: {tmp_path / 'acts'}, min_sequences: 60}}\n"
        "sae: {architecture: jumprelu, d_sae: 256, k: 16}\n"
        "training: {tokens: 60k, batch: 256, save_every: 0.2}\n"
        "evaluation: {tokens: 200, ce_tokens: 0, every: 0}\n"
        "log: {every: 1}\n"
    )
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(text + f"out: {tmp_path / name}\n")
    one = command("train", tmp_path / "whole.yaml")
    assert one.communicate() and one.returncode == 0
    run, reached = tmp_path / "killed", 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        words = [run, "--resume"] if reached else [tmp_path / "killed.yaml"]
        one = command("train", *words)
        reached = wait_for_step(run, reached, one)
        one.send_signal(number)
        _, told = one.communicate()
        assert one.returncode == (-9 if number == signal.SIGKILL else 143)
        assert number == signal.SIGKILL or f"stopped and saved. Go on with: sae train {run} --resume" in told
        assert info(run)["last checkpoint"] and not info(run)["finished"]
    assert reached < 234, "it was not at its end yet"
    one = command("train", run, "--resume")
    assert one.communicate() and one.returncode == 0
    assert sha(run) == sha(tmp_path / "whole") and figures(run) == figures(tmp_path / "whole")
    assert not list(run.rglob(".tmp-*"))


KILLED_AT = """
import os, sys
count, number, name = [0], int(sys.argv[2]), sys.argv[3]
real = getattr(os, name)
def call(*args, **kwargs):
    count[0] += 1
    if count[0] == number:
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
setattr(os, name, call)
from tests.training.test_training import planted, recipe
from sae.run import train
train(recipe(sys.argv[1], tokens=3_000, save_every=1e-9), planted(1500)[0], progress=False, resume=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_at_any_step_of_writing_leaves_a_run_that_goes_on(tmp_path, name):
    """At the 1st, 2nd, … call that makes a file durable, until a run meets none; each goes on to the end."""
    from tests.training.test_training import planted
    from tests.training.test_training import recipe as made

    def started(out, number):
        words = [sys.executable, "-c", KILLED_AT, str(out), str(number), name]
        return subprocess.run(words, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    whole = train(made(tmp_path / "whole", tokens=3_000), planted(1500)[0], progress=False)
    for number in range(1, 100, 4):
        out = tmp_path / str(number)
        code = started(out, number)
        for folder in checkpoint.all_of(out):
            assert checkpoint.facts_of(folder) and files.read_safetensors(folder / "training.safetensors")
        again = train(made(out, tokens=3_000), planted(1500)[0], progress=False, resume=True)
        assert torch.equal(again.W_dec, whole.W_dec)
        if code == 0:
            return
    raise AssertionError("a run makes fewer calls than that")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("live", [False, True], ids=["store", "live"])
def test_many_kills_with_the_real_host(tmp_path, live):
    words = ["--live", "--kills", "3", "--tokens", "150k", "--text", "100k"] if live else ["--kills", "30"]
    words += ["--longest", "24"]
    script = Path(__file__).parent.parent / "experiments" / "kills.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), *words, "--json", str(tmp_path / "k.json")], check=True)
    assert all(one["same sha256"] and one["same figures"] for one in files.read_json(tmp_path / "k.json"))


def test_a_checkpoint_that_is_damaged_is_named_and_the_one_before_still_serves(tiny_host, tmp_path, monkeypatch):
    whole = given(tmp_path / "whole")
    train(whole, host=tiny_host, progress=False)
    made = given(tmp_path / "run", save_every=1e-9)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 40)
        train(made, host=tiny_host, progress=False)
    last = checkpoint.all_of(Path(made.out))[-1]
    data = (last / "training.safetensors").read_bytes()
    (last / "training.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{last.name}.*Delete this folder"):
        train(made, host=tiny_host, progress=False, resume=True)
    files.remove_folder(last)
    train(made, host=tiny_host, progress=False, resume=True)
    assert sha(made.out) == sha(whole.out)
