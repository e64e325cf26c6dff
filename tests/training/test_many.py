"""Several SAEs on one stream: each ends as if alone, each batch is read once, they stop and go on together."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from sae import files
from sae.activations import batches as feed
from sae.autoencoder import SAE
from sae.errors import Stopped, UserError
from sae.recipe import HostRecipe
from sae.run import train, train_many
from sae.training import checkpoint
from sae.training.dead import Dead
from tests.training.test_training import planted, recipe


def sweep(folder, ks=(3, 4, 5), **training):
    made = [recipe(folder / f"k={k}", **({"tokens": 20_000} | training)) for k in ks]
    return [replace(one, sae=replace(one.sae, k=k)) for one, k in zip(made, ks, strict=True)]


def stop_after(monkeypatch, updates):
    """Ask for a stop, as Ctrl-C does, while the given update is counted."""
    count, calls = Dead.count_, []

    def counting(self, codes, fired=None):
        calls.append(0)
        if len(calls) == updates:
            os.kill(os.getpid(), signal.SIGINT)
        count(self, codes, fired)

    monkeypatch.setattr(Dead, "count_", counting)
    return lambda: monkeypatch.setattr(Dead, "count_", count)


def test_each_ends_as_if_alone_and_each_batch_is_read_once(tmp_path, monkeypatch):
    x, _ = planted(2000)
    alone = [train(one, x, progress=False) for one in sweep(tmp_path / "alone")]
    reads = []
    take = feed.TensorSource.take

    def counted(self, hook, rows):
        reads.append(len(rows))
        return take(self, hook, rows)

    monkeypatch.setattr(feed.TensorSource, "take", counted)
    together = train_many(sweep(tmp_path / "together"), x, progress=False)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.W_dec, other.W_dec) and torch.equal(one.encoder, other.encoder)
    assert 78 <= reads.count(256) <= 78 + 3  # one read a step, and what was fetched ahead
    assert files.read_lines(tmp_path / "together" / "k=5" / "metrics.jsonl")[-1]["metrics/l0"] > 4


def test_other_seeds_begin_otherwise_but_see_the_data_in_the_same_order(tmp_path, monkeypatch):
    x, _ = planted(2000)
    made = [recipe(tmp_path / f"seed={seed}", tokens=10_000, seed=seed) for seed in (3, 4)]
    first, second = train_many(made, x, progress=False)
    assert not torch.equal(first.W_dec, second.W_dec)
    assert [files.read_json(tmp_path / f"seed={seed}" / "resolved.json")["order_seed"] for seed in (3, 4)] == [3, 3]
    assert torch.equal(first.W_dec, train(recipe(tmp_path / "alone", tokens=10_000, seed=3), x, progress=False).W_dec)


def test_a_stopped_sweep_goes_on_from_the_newest_step_that_all_have(tmp_path, monkeypatch):
    x, _ = planted(2000)
    whole = train_many(sweep(tmp_path / "whole"), x, progress=False)
    undo = stop_after(monkeypatch, 3 * 40 - 1)  # in the 40th step, at the second SAE
    with pytest.raises(Stopped, match="Go on with: the same sweep and --resume"):
        train_many(sweep(tmp_path / "run"), x, progress=False)
    undo()
    assert [checkpoint.steps(one) for one in sorted((tmp_path / "run").iterdir())] == [[40]] * 3
    undo = stop_after(monkeypatch, 3 * 20)
    with pytest.raises(Stopped):
        train_many(sweep(tmp_path / "run"), x, progress=False, resume=True)
    undo()
    files.remove_folder(checkpoint.at(tmp_path / "run" / "k=4", 60))  # killed before it was written
    resumed = train_many(sweep(tmp_path / "run"), x, progress=False, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)
    steps = [line["step"] for line in files.read_lines(tmp_path / "run" / "k=3" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 75


def test_one_of_a_sweep_can_go_on_alone_and_ends_the_same(tmp_path, monkeypatch):
    """Its data stays in the order of the sweep's first seed."""
    x, _ = planted(2000)
    made = [[recipe(tmp_path / name / f"{seed}", tokens=10_000, seed=seed) for seed in (3, 4)] for name in "ab"]
    whole = train_many(made[0], x, progress=False)
    undo = stop_after(monkeypatch, 2 * 10)
    with pytest.raises(Stopped):
        train_many(made[1], x, progress=False)
    undo()
    assert torch.equal(train(made[1][1], x, progress=False, resume=True).W_dec, whole[1].W_dec)


def test_a_finished_sweep_is_opened_and_a_larger_one_trains_what_is_missing(tmp_path, monkeypatch):
    x, _ = planted(2000)
    first = train_many(sweep(tmp_path, (3, 4)), x, progress=False)
    when = (tmp_path / "k=4" / "sae" / "cfg.json").stat().st_mtime_ns
    larger = train_many(sweep(tmp_path, (3, 4, 5)), x, progress=False, resume=True)
    assert (tmp_path / "k=4" / "sae" / "cfg.json").stat().st_mtime_ns == when
    assert torch.equal(larger[1].W_dec, first[1].W_dec) and SAE.load(tmp_path / "k=5" / "sae").cfg.k == 5


def test_runs_without_a_step_in_common_are_refused(tmp_path, monkeypatch):
    x, _ = planted(2000)
    undo = stop_after(monkeypatch, 2 * 30)
    with pytest.raises(Stopped):
        train_many(sweep(tmp_path, (3, 4)), x, progress=False)
    undo()
    with pytest.raises(UserError, match=r"no step in common \(.*k=3: 30; .*k=5: none\)"):
        train_many(sweep(tmp_path, (3, 5)), x, progress=False, resume=True)
    assert checkpoint.steps(tmp_path / "k=3") == [30]


def test_layers_learn_from_the_same_rows_each_with_its_own_scale(tmp_path):
    """One permutation for both hooks; each SAE is the one that its hook alone gives."""
    x, _ = planted(2000)
    acts = {"mine": x, "yours": 9 * x[:, :20].contiguous()}
    made = [replace(recipe(tmp_path / hook, tokens=20_000), host=HostRecipe(hook=hook)) for hook in acts]
    both = train_many(made, acts, progress=False)
    assert [sae.cfg.d_in for sae in both] == [24, 20]
    for sae, hook in zip(both, acts, strict=True):
        alone = replace(recipe(tmp_path / f"{hook}-alone", tokens=20_000), host=HostRecipe(hook=hook))
        assert torch.equal(train(alone, acts[hook], progress=False).W_dec, sae.W_dec)
        assert sae.cfg.metadata.hook_name == hook
    with pytest.raises(UserError, match=r"one matrix for mine, yours. Give \{hook: \[N, d\]\}"):
        train_many([replace(one, out=f"{one.out}-again") for one in made], x, progress=False)


def test_every_architecture_learns_on_one_stream_with_everything_switched_on(tmp_path):
    x, _ = planted(2000)
    given = {"tokens": 30_000, "batch": 128, "grad_acc_steps": 2, "ema": 0.9, "clip": 10.0, "resample_every": 10_000}
    mild = {"jumprelu": {"l0_coefficient": 0.3}, "relu": {"l1_coefficient": 0.3}}  # 24 numbers bear no more
    made = []
    for name in ("topk", "batchtopk", "matryoshka", "jumprelu", "relu"):
        lazy = {"adam_beta1": 0.0} if name == "jumprelu" else {}
        one = recipe(tmp_path / name, **given, **lazy, lr_scheduler_name="cosine")
        made.append(replace(one, sae=replace(one.sae, architecture=name, **mild.get(name, {}))))
    for recipe_of, sae in zip(made, train_many(made, x, progress=False), strict=True):
        lines = files.read_lines(f"{recipe_of.out}/metrics.jsonl")
        assert all(line["metrics/l0"] > 0 for line in lines), recipe_of.sae.architecture
        assert lines[-1]["metrics/explained_variance"] > lines[0]["metrics/explained_variance"]
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(80))


def test_what_cannot_be_trained_or_where_is_said_before_the_data_is_opened(tmp_path):
    one = recipe(tmp_path / "a", tokens=2_000)
    with pytest.raises(UserError, match="'topkk' is not known"):
        train(replace(one, sae=replace(one.sae, architecture="topkk")), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="this machine has no cuda"):
            train(replace(one, training=replace(one.training, device="cuda")), progress=False)


def test_recipes_that_do_not_share_a_stream_or_a_folder_are_refused(tmp_path):
    x, _ = planted(500)
    one = recipe(tmp_path / "a", tokens=2_000)
    with pytest.raises(UserError, match="training.batch: is 256 and 128 for SAEs on one stream"):
        train_many([one, recipe(tmp_path / "b", tokens=2_000, batch=128)], x, progress=False)
    with pytest.raises(UserError, match="2 SAEs would be written to .*a. Give each a folder of its own"):
        train_many([one, one], x, progress=False)
    with pytest.raises(UserError, match="no recipe given"):
        train_many([], x, progress=False)
    assert not (tmp_path / "a").exists()


def test_accumulated_batches_are_steps_tokens_and_positions(tmp_path, monkeypatch):
    """Two batches of 128 an update are half as many steps; a stop and a resume change nothing."""
    x, _ = planted(2000)
    given = {"tokens": 20_000, "batch": 128, "grad_acc_steps": 2}
    whole = train(recipe(tmp_path / "whole", **given), x, progress=False)
    resolved = files.read_json(tmp_path / "whole" / "resolved.json")
    assert resolved["steps"] == 20_000 // 256
    lines = files.read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [(line["step"], line["tokens"]) for line in lines][:2] == [(0, 256), (5, 6 * 256)]
    undo = stop_after(monkeypatch, 30)
    with pytest.raises(Stopped):
        train(recipe(tmp_path / "run", **given), x, progress=False)
    undo()
    position = files.read_json(checkpoint.at(tmp_path / "run", 30) / "training.json")["position"]
    assert position == {"epoch": 3, "offset": 30 * 256 - 3 * 2000}
    assert torch.equal(train(recipe(tmp_path / "run", **given), x, progress=False, resume=True).W_dec, whole.W_dec)


@pytest.mark.parametrize("training", [{"ema": 0.99}, {"adam_beta1": 0.0, "clip": 0.5}, {"resample_every": 4_000}])
def test_a_resumed_run_of_every_kind_ends_the_same_to_the_bit(tmp_path, monkeypatch, training):
    x, _ = planted(2000)
    given = {"tokens": 20_000, "dead_after": 2_000} | training
    whole = train(recipe(tmp_path / "whole", **given), x, progress=False)
    undo = stop_after(monkeypatch, 33)
    with pytest.raises(Stopped):
        train(recipe(tmp_path / "run", **given), x, progress=False)
    undo()
    resumed = train(recipe(tmp_path / "run", **given), x, progress=False, resume=True)
    assert torch.equal(resumed.W_dec, whole.W_dec) and torch.equal(resumed.b_enc, whole.b_enc)


def test_the_mean_of_the_weights_is_what_ships(tmp_path):
    from safetensors.torch import load_file

    x, _ = planted(2000)
    sae = train(recipe(tmp_path, tokens=10_000, ema=0.9), x, progress=False)
    saved = load_file(checkpoint.all_of(tmp_path)[-1] / "training.safetensors")
    mean = torch.nn.functional.normalize(saved["ema.W_dec"], dim=1)
    torch.testing.assert_close(sae.W_dec, mean)
    assert not torch.allclose(sae.W_dec, saved["W_dec"], atol=1e-3)


def test_a_recipe_made_in_python_is_checked_as_a_file_is(tmp_path):
    x, _ = planted(500)
    made = recipe(tmp_path / "run")
    for widths in ((10, 30), (30, 10, 80), (10, 200)):
        wrong = replace(made, sae=replace(made.sae, architecture="matryoshka", matryoshka_widths=widths))
        with pytest.raises(UserError, match="matryoshka_widths"):
            train_many([wrong], x, progress=False)
