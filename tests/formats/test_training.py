"""A training checkpoint of ours read as an SAE: what it needs beside it, and what is said where it is not there."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.architectures import ARCHITECTURES
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.run import convert_layout, train
from sae.training.checkpoint import all_of
from tests.test_architectures import recipe
from tests.training.test_training import planted


@pytest.fixture
def checkpoint(tmp_path):
    short = recipe(tmp_path / "run", "topk")
    train(replace(short, training=replace(short.training, tokens=2_000, ema=0.9)), planted()[0][:1000], progress=False)
    return all_of(tmp_path / "run")[-1]


@pytest.mark.parametrize("name,mode", [*((name, "tanh") for name in ARCHITECTURES), ("jumprelu", "step")])
def test_the_running_average_is_taken_where_there_is_one(tmp_path, name, mode):
    """As at the end of a run: rows are renormed where the objective keeps them at length 1, and nowhere else."""
    short = recipe(tmp_path / "run", name)
    of = replace(short.sae, jumprelu_sparsity_loss_mode=mode)
    short = replace(short, sae=of, training=replace(short.training, tokens=2_000, ema=0.9))
    train(short, planted()[0][:1000], progress=False)
    last = all_of(tmp_path / "run")[-1]
    raw = load_file(last / "training.safetensors")
    assert not torch.equal(raw["encoder"], raw["ema.encoder"])
    read, finished = SAE.load(last), SAE.load(tmp_path / "run" / "sae")
    assert torch.equal(read.encoder, finished.encoder) and torch.equal(read.W_dec, finished.W_dec)


def test_it_is_converted_to_a_folder_that_saelens_reads(checkpoint, tmp_path):
    made = convert_layout(checkpoint, tmp_path / "theirs")
    assert made["from"] == "training" and made["largest difference"] == 0
    assert json.loads((tmp_path / "theirs" / "cfg.json").read_text())["architecture"] == "topk"
    with pytest.raises(UserError, match="is or holds what is to be converted"):
        convert_layout(tmp_path / "theirs", tmp_path / "theirs")


def resolved(checkpoint, **values):
    path = checkpoint.parent.parent / "resolved.json"
    whole = json.loads(path.read_text())
    whole["recipe"]["sae"] |= values
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda c: (c.parent.parent / "resolved.json").unlink(), "a training checkpoint without its run"),
        (lambda c: (c.parent.parent / "resolved.json").write_text('{"recipe": {}}'), "its recipe has no 'sae'"),
        (lambda c: resolved(c, architecture=["x"]), r"architecture: \['x'\] is not known"),
        (lambda c: resolved(c, k="six"), "k is 'six', expected a whole number"),
        (lambda c: (c / "training.json").write_text(f'{{"norm_factor": {10**4000}}}'), "norm_factor is 1000.* … "),
        (lambda c: (c / "training.json").write_text('{"norm_factor": 0}'), "norm_factor is 0, expected a number above"),
        (
            lambda c: save_file({"encoder": torch.ones(3)}, c / "training.safetensors"),
            "encoder is missing or no matrix",
        ),
        (lambda c: (c / "training.safetensors").write_bytes(b"x"), "is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message):
        SAE.load(checkpoint)
