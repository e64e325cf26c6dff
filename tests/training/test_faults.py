"""What a run meets: rows that are not finite, a full disk, a store that goes away, no memory. It goes on or stops with
one line that says how, and the last checkpoint is intact."""

import errno
import logging
import os
import threading
from dataclasses import replace

import pytest
import torch

from sae import files, machine
from sae.errors import Stopped, UserError
from sae.recipe import SAERecipe
from sae.run import train
from sae.sources import SAMPLE
from sae.training import checkpoint, loop
from sae.training.dead import Dead
from tests.training.test_training import planted, recipe

FOR_ALL = [SAERecipe(d_sae=80, k=4), SAERecipe("batchtopk", d_sae=80, k=4), SAERecipe("jumprelu", d_sae=80, k=4)]


def unsampled(n, seed=0):
    """Numbers of rows that the sample at the start does not see."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[SAMPLE:]


def state_of(folder):
    return files.read_safetensors(checkpoint.all_of(folder)[-1] / "training.safetensors")[0]


@pytest.mark.parametrize("sae", FOR_ALL, ids=lambda sae: sae.architecture)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_batch_with_a_row_that_is_not_finite_is_skipped_counted_and_told(tmp_path, wrong, sae, caplog):
    x, _ = planted(SAMPLE + 2000)
    row = int(unsampled(len(x))[5])
    x[row, 3] = wrong
    made = replace(recipe(tmp_path / "run", tokens=2 * len(x) - 100), sae=sae)
    with caplog.at_level(logging.WARNING):
        trained = train(made, x, progress=False)
    told = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(told) == 2 and all(f"NaN or infinity at mine in given row {row:,}" in line for line in told)
    lines = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["details/skipped_steps"] for line in lines if "details/skipped_steps" in line] == [1, 2]
    assert lines[-1]["tokens"] <= made.training.tokens and lines[-1]["step"] * 256 + 256 == lines[-1]["tokens"]
    assert all(tensor.isfinite().all() for name, tensor in state_of(tmp_path / "run").items() if name != "control")
    assert trained.W_dec.isfinite().all() and trained.stats.max_act.isfinite().all()


def test_after_three_in_a_row_training_stops_with_the_cause_and_an_intact_checkpoint(tmp_path):
    x, _ = planted(SAMPLE + 4000)
    x[unsampled(len(x))] = float("nan")
    with pytest.raises(
        UserError, match="3 steps in a row .* NaN or infinity at mine in given row .* and .* more"
    ) as told:
        train(recipe(tmp_path / "run", tokens=40_000, save_every=1e-9), x, progress=False)
    assert "--resume" in str(told.value)
    skips = checkpoint.facts_of(checkpoint.all_of(tmp_path / "run")[-1])
    assert skips["in_a_row"] < 3
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path / "run").values())


def test_a_loss_that_is_not_finite_though_the_rows_are_names_the_rate(tmp_path, caplog):
    x, _ = planted(2000)
    made = recipe(tmp_path / "run", tokens=40_000, lr=1e30, lr_warm_up_steps=1)
    with pytest.raises(UserError, match="3 steps in a row .*the learning rate may be too high"):
        train(made, x, progress=False)


def test_what_was_skipped_is_remembered_over_a_resumption(tmp_path, monkeypatch):
    """Two bad batches, a stop, a third: the run stops as if it had not been stopped before."""
    x, _ = planted(SAMPLE + 4000)
    x[unsampled(len(x))] = float("nan")
    made = recipe(tmp_path / "run", tokens=40_000, save_every=1e9)
    attempt, met = loop.faults.attempt, []

    def stopping(one, drawn, lr, step, run):
        learnt = attempt(one, drawn, lr, step, run)
        met.append(learnt is None)
        if len(met) > 1 and met[-2:] == [True, True]:
            os.kill(os.getpid(), 15)
        return learnt

    monkeypatch.setattr(loop.faults, "attempt", stopping)
    with pytest.raises(Stopped) as stopped:
        train(made, x, progress=False)
    assert stopped.value.code == 143
    assert checkpoint.facts_of(checkpoint.all_of(tmp_path / "run")[-1])["in_a_row"] == 2
    monkeypatch.setattr(loop.faults, "attempt", attempt)
    with pytest.raises(UserError, match="3 steps in a row"):
        train(made, x, progress=False, resume=True)


# ---- the disk ------------------------------------------------------------------------------------------------


def failing(monkeypatch, number, on):
    """The `number`-th call of an operation on files fails as on a full disk; returns the count of calls."""
    count, real = [0], getattr(os, on)

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, on, call)
    return count


@pytest.mark.parametrize("on", ["fsync", "replace"])
def test_whichever_write_fails_the_run_can_be_gone_on_with_and_ends_the_same(tmp_path, monkeypatch, on):
    """A full disk at the 1st, 2nd, … operation until a run meets none: one line, no damaged checkpoint, same end."""
    x, _ = planted(1500)

    def made(out):
        return recipe(out, tokens=5_000, save_every=1e-9)

    whole = train(made(tmp_path / "whole"), x, progress=False)
    for number in range(1, 200, 3):
        out = tmp_path / f"{on}-{number}"
        with monkeypatch.context() as patch:
            count = failing(patch, number, on)
            try:
                train(made(out), x, progress=False)
            except UserError as error:
                assert "no space left" in str(error) and "MB free" in str(error)
                assert "Go on with: sae train" in str(error) or not (out / "metrics.jsonl").exists(), error
                assert ".tmp-" not in str(error)
        for folder in checkpoint.all_of(out):
            assert checkpoint.facts_of(folder)["step"] > 0 and files.read_safetensors(folder / "training.safetensors")
        again = train(made(out), x, progress=False, resume=True)
        assert torch.equal(again.W_dec, whole.W_dec) and torch.equal(again.encoder, whole.encoder)
        assert not list(out.rglob(".tmp-*"))
        if count[0] < number:
            return
    raise AssertionError("a run makes fewer operations than that")


def test_a_file_limit_of_the_system_is_a_full_disk(tmp_path):
    """RLIMIT_FSIZE in a process of its own: the checkpoint of 80 features does not fit, the message says so."""
    import subprocess
    import sys

    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from tests.training.test_training import planted, recipe\n"
        "from sae.run import train\n"
        "from sae.errors import UserError\n"
        "try:\n"
        "    train(recipe(sys.argv[1], tokens=5_000), planted(1500)[0], progress=False)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True).stdout
    assert "no space left to write it" in told and "(0.05 MB) was not written" in told, told
    assert "No checkpoint is there yet. Go on with: sae train" in told and told.count("\n") == 1, told
    assert checkpoint.all_of(tmp_path / "run") == []


def test_a_checkpoint_is_written_synced_renamed_and_its_folder_synced_in_this_order(tmp_path, monkeypatch):
    """So that a power loss at any moment leaves the checkpoint before, or this one whole."""
    done, fsync, replace_ = [], os.fsync, os.replace

    def synced(handle):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source, target):
        done.append(("rename", str(source), str(target)))
        replace_(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    tensors = {"x": torch.ones(1000)}
    folder = checkpoint.write(tmp_path / "run", 7, tensors, {"position": {}})
    rename = next(i for i, one in enumerate(done) if one[0] == "rename" and one[2] == str(folder))
    before, after = done[:rename], done[rename + 1 :]
    temporary = done[rename][1]
    for name in ("training.safetensors", "training.json"):
        content = [i for i, one in enumerate(before) if one[0] == "fsync" and f"/{name}" in one[1].replace(".tmp-", "")]
        assert content, f"{name} is synced before the folder has its name"
    assert ("fsync", temporary) in before, "the names in the folder, too"
    assert ("fsync", str(folder.parent)) in after
    made = [("fsync", str(tmp_path / "run")), ("fsync", str(tmp_path))]
    assert all(one in done for one in made), "folders that were made on the way have names to be kept as well"


def test_the_figures_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    order = []
    sync, write = files.Lines.sync, checkpoint.write
    monkeypatch.setattr(files.Lines, "sync", lambda self: (order.append("figures"), sync(self)))
    monkeypatch.setattr(checkpoint, "write", lambda *args: (order.append("checkpoint"), write(*args))[1])
    train(recipe(tmp_path / "run", tokens=5_000), planted(1500)[0], progress=False)
    assert order == ["figures", "checkpoint"]


# ---- saving beside the loop ------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The disk hangs: steps are made meanwhile, and what is written is the state at its step."""
    gate, write, count, steps = threading.Event(), checkpoint.write, Dead.count_, []

    def slow(*args):
        gate.wait(20)
        return write(*args)

    def counting(self, codes, fired=None):
        steps.append(0)
        if len(steps) == 100:
            gate.set()
        count(self, codes, fired)

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(Dead, "count_", counting)
    x, _ = planted(2000)
    trained = train(recipe(tmp_path / "run", tokens=30_000, save_every=1e-9), x, progress=False)
    assert gate.is_set(), "a hundred steps were made while the first checkpoint hung"
    monkeypatch.undo()
    assert torch.equal(train(recipe(tmp_path / "whole", tokens=30_000), x, progress=False).W_dec, trained.W_dec)


def test_where_a_copy_does_not_fit_training_waits_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine, "free_memory", lambda: 300_000_000)
    monkeypatch.setattr(checkpoint, "SPARE", 300_000_000)
    x, _ = planted(2000)
    with caplog.at_level(logging.WARNING):
        train(recipe(tmp_path / "run", tokens=5_000, save_every=1e-9), x, progress=False)
    assert [r.getMessage() for r in caplog.records if "without a copy, training waits" in r.getMessage()] != []
    assert sum("without a copy" in record.getMessage() for record in caplog.records) == 1


# ---- what is read, memory, a second writer ---------------------------------------------------------------------


def test_a_source_that_fails_leaves_a_checkpoint_of_the_last_step(tmp_path, monkeypatch):
    from sae.activations import batches

    shuffled = batches.shuffled

    def breaking(*args, **kwargs):
        for i, one in enumerate(shuffled(*args, **kwargs)):
            if i == 30:
                raise OSError(errno.EIO, "Input/output error")
            yield one

    monkeypatch.setattr(batches, "shuffled", breaking)
    x, _ = planted(2000)
    made = recipe(tmp_path / "run", tokens=30_000)
    with pytest.raises(
        UserError, match="Input/output error.*after step 30. The checkpoint of step 30 is intact. Go on with: sae train"
    ):
        train(made, x, progress=False)
    assert checkpoint.steps(tmp_path / "run") == [30]
    monkeypatch.undo()
    resumed = train(made, x, progress=False, resume=True)
    assert torch.equal(resumed.W_dec, train(recipe(tmp_path / "whole", tokens=30_000), x, progress=False).W_dec)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_in_a_step_is_one_line_and_the_last_checkpoint_counts(tmp_path, monkeypatch, error):
    count, calls = Dead.count_, []

    def failing_count(self, codes, fired=None):
        calls.append(0)
        if len(calls) == 60:
            raise error
        count(self, codes, fired)

    monkeypatch.setattr(Dead, "count_", failing_count)
    x, _ = planted(2000)
    made = recipe(tmp_path / "run", tokens=30_000, save_every=1e-9)
    with pytest.raises(
        UserError, match="out of memory .*checkpoint of step .* is intact. Free some memory.*Go on with"
    ):
        train(made, x, progress=False)
    assert 0 < checkpoint.steps(tmp_path / "run")[-1] < 60
    monkeypatch.undo()
    resumed = train(made, x, progress=False, resume=True)
    assert torch.equal(resumed.W_dec, train(recipe(tmp_path / "whole", tokens=30_000), x, progress=False).W_dec)


def test_another_error_of_a_step_is_not_called_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Dead, "count_", lambda *args: (_ for _ in ()).throw(RuntimeError("a mistake of ours")))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train(recipe(tmp_path / "run", tokens=5_000), planted(1500)[0], progress=False)


def test_a_second_process_on_the_same_run_is_refused_with_the_first_one_named(tmp_path):
    from sae.training import folder

    made = recipe(tmp_path / "run", tokens=5_000)
    says = f"process {os.getpid()} on .* has been writing it since"
    with folder.writing([made]), pytest.raises(UserError, match=says):
        train(made, planted(1500)[0], progress=False)
    train(made, planted(1500)[0], progress=False)
