"""Training on known features: it learns them, resumes exactly, stops when asked and says how to go on."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from sae import config, files
from sae.autoencoder import SAE
from sae.errors import Stopped, UserError
from sae.objectives import topk
from sae.objectives.terms import initial
from sae.recipe import HostRecipe, LogRecipe, Recipe, SAERecipe, TrainingRecipe
from sae.run import train
from sae.training import checkpoint
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam


def planted(n=6000, d=24, F=40, active=4, seed=0):
    """Sparse positive mixtures of F random directions, with a mean."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    strengths = torch.rand(n, F, generator=g) + 0.5
    chosen = torch.rand(n, F, generator=g).argsort(1) < active
    return (strengths * chosen) @ directions * 7 + torch.randn(d, generator=g), directions


def recipe(out, **training):
    return Recipe(
        host=HostRecipe(hook="mine"),
        sae=SAERecipe(d_sae=80, k=4),
        training=TrainingRecipe(**({"tokens": 60_000, "batch": 256, "dtype": "float32", "lr": 3e-3} | training)),
        log=LogRecipe(every=5),
        out=str(out),
    )


def fvu(sae, x):
    return ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_training_finds_planted_features_and_reconstructs_held_out_rows(tmp_path):
    x, directions = planted()
    sae = train(recipe(tmp_path / "run", tokens=300_000), x[:5000], progress=False)
    assert fvu(sae, x[5000:]) < 0.12
    best = (torch.nn.functional.normalize(sae.W_dec, dim=1) @ directions.T).amax(0)
    assert (best > 0.9).float().mean() > 0.8
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(80))
    assert sae.stats is not None and sae.stats.n_tokens == 5000
    codes = sae.encode(x[:5000])
    torch.testing.assert_close(sae.stats.max_act, codes.amax(0), rtol=1e-4, atol=1e-4)
    assert sae.threshold is not None
    passing = (sae.pre_activations(x[:5000]) > sae.threshold).float().sum(1).mean()
    assert abs(passing - 4) < 0.05


def test_the_finished_folder_loads_and_is_described(tmp_path):
    x, _ = planted(2000)
    out = tmp_path / "run"
    sae = train(recipe(out, tokens=5_000), x, progress=False)
    loaded = SAE.load(out / "sae")
    assert torch.equal(loaded.encode(x[:9]), sae.encode(x[:9]))
    assert config.load(out / "recipe.yaml") == recipe(out, tokens=5_000)
    lines = files.read_lines(out / "metrics.jsonl")
    assert {"losses/mse_loss", "metrics/explained_variance", "metrics/l0", "sparsity/dead_features"} <= set(lines[0])
    assert files.read_json(out / "resolved.json")["steps"] == 19


def test_one_seed_gives_one_result_and_another_seed_another(tmp_path):
    x, _ = planted(2000)
    weights = [
        train(recipe(tmp_path / name, tokens=10_000, seed=seed), x, progress=False).W_dec
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_stopped_run_resumes_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """The signal comes from within, at step 40 of 117; the loop saves, and the resumed run ends the same to the bit."""
    x, _ = planted(2000)
    whole = train(recipe(tmp_path / "whole", tokens=30_000), x, progress=False)
    count = Dead.count_
    calls = []

    def counting(self, codes, fired=None):
        calls.append(0)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        count(self, codes, fired)

    monkeypatch.setattr(Dead, "count_", counting)
    with pytest.raises(Stopped, match="stopped and saved. Go on with: sae train .*run --resume"):
        train(recipe(tmp_path / "run", tokens=30_000), x, progress=False)
    assert [p.name for p in checkpoint.all_of(tmp_path / "run")] == ["step-00000040"]
    monkeypatch.setattr(Dead, "count_", count)
    resumed = train(recipe(tmp_path / "run", tokens=30_000), x, progress=False, resume=True)
    assert torch.equal(resumed.W_dec, whole.W_dec) and torch.equal(resumed.encoder, whole.encoder)
    steps = [line["step"] for line in files.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] in (115, 116)


def test_a_run_is_not_overwritten(tmp_path):
    x, _ = planted(1000)
    train(recipe(tmp_path / "run", tokens=2_000), x, progress=False)
    with pytest.raises(UserError, match="holds a run already"):
        train(recipe(tmp_path / "run", tokens=2_000), x, progress=False)


def test_resuming_with_another_recipe_is_refused_and_changes_nothing(tmp_path):
    x, _ = planted(1000)
    first = recipe(tmp_path / "run", tokens=2_000)
    train(first, x, progress=False)
    kept = (tmp_path / "run" / "recipe.yaml").read_bytes()
    for other, words in (
        (replace(first, sae=SAERecipe(d_sae=90, k=4)), "sae.d_sae = 80, now it is 90"),
        (replace(first, sae=SAERecipe(d_sae=80, k=5)), "sae.k = 4, now it is 5"),
    ):
        with pytest.raises(UserError, match=words):
            train(other, x, progress=False, resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == kept


def test_a_run_on_given_rows_is_not_resumed_from_anything_else(tmp_path):
    x, _ = planted(1000)
    made = recipe(tmp_path / "run", tokens=2_000)
    train(made, x, progress=False)
    (tmp_path / "run" / "sae" / "feature_stats.safetensors").unlink()
    with pytest.raises(UserError, match="was trained on given rows"):
        train(made, progress=False, resume=True)
    with pytest.raises(UserError, match="given rows of width 24, now it would go on with given rows of width 20"):
        train(made, x[:, :20], progress=False, resume=True)


def test_resuming_a_finished_run_opens_it(tmp_path):
    x, _ = planted(1000)
    made = recipe(tmp_path / "run", tokens=2_000)
    sae = train(made, x, progress=False)
    when = (tmp_path / "run" / "sae" / "cfg.json").stat().st_mtime_ns
    assert torch.equal(train(made, x, progress=False, resume=True).W_dec, sae.W_dec)
    assert (tmp_path / "run" / "sae" / "cfg.json").stat().st_mtime_ns == when


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda x: x.index_fill_(0, torch.arange(300), float("nan")), "300 of .* hold NaN or infinity"),
        (lambda x: x.fill_(2.0), "do not vary"),
        (lambda x: x.to(torch.int64), "expected floating point"),
    ],
)
def test_activations_that_cannot_be_learnt_from_are_refused_before_anything_is_written(tmp_path, damage, words):
    with pytest.raises(UserError, match=words):
        train(recipe(tmp_path / "run", tokens=2_000), damage(planted(500)[0]), progress=False)
    assert not (tmp_path / "run").exists()


def test_export_is_in_raw_units(tmp_path):
    """Codes of the finished SAE on raw rows are those of the trained parameters on normed rows, over the scale."""
    from safetensors.torch import load_file

    from sae import kernels

    x, _ = planted(1000)
    sae = train(recipe(tmp_path / "run", tokens=20_000), x, progress=False)
    folder = checkpoint.all_of(tmp_path / "run")[-1]
    p, scale = load_file(folder / "training.safetensors"), files.read_json(folder / "training.json")["norm_factor"]
    normed = kernels.encode_select(x * scale - p["b_dec"], p["encoder"], p["b_enc"], kernels.TopK(4)).dense()
    assert abs(scale - 1) > 0.1
    torch.testing.assert_close(sae.encode(x), normed / scale, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_gives_back_every_tensor(tmp_path):
    x, _ = planted(1000)
    made = replace(recipe(tmp_path / "run", tokens=5_000), sae=SAERecipe(d_sae=900, k=2))
    train(made, x, progress=False)
    params = initial(x, d_sae=900, seed=5, low=False)
    optimizer, dead = RowAdam(params), Dead(900, 10)
    checkpoint.load(checkpoint.all_of(tmp_path / "run")[-1], checkpoint.State(params, optimizer, dead))
    assert dead.since.sum() > 0 and optimizer.moments["W_dec"].step == 19
    assert all(adam.v.any() for adam in optimizer.moments.values())


def test_bfloat16_encoding_ends_within_one_per_cent_of_float32(tmp_path):
    x, _ = planted()
    figures = [
        fvu(train(recipe(tmp_path / dtype, tokens=200_000, dtype=dtype), x[:5000], progress=False), x[5000:])
        for dtype in ("float32", "bfloat16")
    ]
    assert figures[1] < figures[0] * 1.01 + 1e-3


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    x, _ = planted(1000)
    train(recipe(tmp_path / "run", tokens=5_000, save_every=0.0), x, progress=False)
    kept = [p.name for p in checkpoint.all_of(tmp_path / "run")]
    assert len(kept) == 2 and kept[-1] == "step-00000019"


def test_the_auxiliary_loss_revives_dead_features():
    """Half of the features begin far below their threshold: with AuxK nearly all come to fire, without it fewer."""
    x, _ = planted()
    x = x * (24**0.5 / x.norm(dim=1).mean())
    fired = {}
    for coefficient in (1 / 32, 0.0):
        params = initial(x, d_sae=40, seed=0, low=False)
        params.b_enc[:20] = -4.0
        optimizer, dead = RowAdam(params), Dead(40, window=2_000)
        for step in range(600):
            batch = x[step * 250 % 6000 :][:250]
            work, _ = topk.loss(params, batch, dead.mask(), k=4, variance=20.0, aux_coefficient=coefficient)
            optimizer.update_(work, 3e-3)
            dead.count_(work.codes)
        fired[coefficient] = 20 - int(dead.mask()[:20].sum())
    assert fired[1 / 32] >= 18 > fired[0.0]


def test_sigterm_in_another_process_saves_and_exits(tmp_path):
    """A real process, a real signal: it stops with 'Go on with', and the checkpoint resumes."""
    code = (
        "import sys, torch\n"
        "from tests.training.test_training import planted, recipe\n"
        "from sae.run import train\n"
        "from sae.errors import Stopped\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    train(recipe(sys.argv[1], tokens=50_000_000), planted(2000)[0], progress=False)\n"
        "except Stopped as stopped:\n"
        "    print(stopped)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for _ in range(600):
        if (tmp_path / "run" / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    time.sleep(1)
    child.terminate()
    out, _ = child.communicate(timeout=60)
    assert "Go on with: sae train" in out
    assert len(checkpoint.all_of(tmp_path / "run")) == 1
