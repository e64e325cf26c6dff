"""dictionary_learning's layout: vintages, classes, what is refused and how; its numbers are in tests/peers."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.formats import dictionary_learning
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES, differences


def placed(tmp_path, case="AutoEncoderTopK", trainer=None, buffer=None, **tensors):
    """A fixture's trainer folder, with changes to its config.json and ae.pt (None takes a tensor away)."""
    folder = tmp_path / "trainer_0"
    shutil.copytree(FIXTURES / f"dictionary_learning-{case}" / "sae", folder)
    config = json.loads((folder / "config.json").read_text())
    config = {"trainer": config["trainer"] | (trainer or {}), "buffer": config["buffer"] | (buffer or {})}
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        state = torch.load(folder / "ae.pt") | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "ae.pt")
    return folder


def line(path):
    with pytest.raises(UserError) as caught:
        SAE.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_config_a_class_is_told_from_the_names_of_its_tensors(tmp_path, kind):
    folder = placed(tmp_path, kind)
    (folder / "config.json").unlink()
    found = differences(FIXTURES / f"dictionary_learning-{kind}", SAE.load(folder))
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_two_classes_with_the_same_names_are_not_guessed_between(tmp_path, kind):
    folder = placed(tmp_path, kind)
    (folder / "config.json").unlink()
    assert "its tensors fit AutoEncoderTopK and BatchTopKSAE. Put that file there." in line(folder)


def test_a_checkpoint_is_read_by_its_file_with_the_k_that_it_was_saved_with(tmp_path):
    """k is annealed in training: config.json, written before it, has the last one."""
    folder = placed(tmp_path, k=torch.tensor(9))
    assert "k is 9" in line(folder) and "says 5" in line(folder)
    (folder / "checkpoints").mkdir()
    at = (folder / "ae.pt").rename(folder / "checkpoints" / "ae_400.pt")
    sae = SAE.load(at)
    assert (sae.cfg.k, sae.cfg.metadata.hook_name) == (9, "blocks.2.hook_resid_post")


def test_what_metadata_says(tmp_path):
    about = SAE.load(placed(tmp_path, "MatryoshkaBatchTopKSAE")).cfg.metadata
    assert (about.training_architecture, about.matryoshka_widths) == ("matryoshka", [8, 32, 64])
    assert (about.model_name, about.context_size, about.layout) == ("tiny", 128, "dictionary_learning")
    assert (about.units, about.norm_factor) == ("raw", None)


@pytest.mark.parametrize(
    ("trainer", "buffer", "hooks"),
    [
        ({}, {}, ("blocks.2.hook_resid_post", "")),
        ({"submodule_name": "resid_post"}, {"io": "in"}, ("blocks.2.hook_resid_pre", "")),
        ({"submodule_name": "mlp_out"}, {}, ("blocks.2.hook_mlp_out", "")),
        ({"submodule_name": "attention_out_layer_2"}, {}, ("blocks.2.hook_attn_out", "")),
        ({"submodule_name": "model.layers.7.mlp"}, {}, ("blocks.7.hook_mlp_out", "")),
        ({"submodule_name": "mlp"}, {"io": "in_and_out"}, ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")),
        ({"submodule_name": "blocks.2.attn.hook_z"}, {}, ("blocks.2.attn.hook_z", "")),
        ({"submodule_name": None}, {}, ("", "")),
        ({"layer": None}, {}, ("", "")),
    ],
)
def test_layer_and_submodule_say_where_an_sae_belongs(tmp_path, trainer, buffer, hooks):
    about = SAE.load(placed(tmp_path, "AutoEncoderNew", trainer, buffer)).cfg.metadata
    assert (about.hook_name, about.hook_name_out) == hooks


def test_a_topk_threshold_of_minus_one_is_none(tmp_path):
    assert torch.equal(SAE.load(placed(tmp_path / "a")).threshold, torch.full((64,), 0.6))
    assert SAE.load(placed(tmp_path / "b", threshold=torch.tensor(-1.0))).threshold is None


@pytest.mark.parametrize(
    ("case", "trainer", "tensors", "said"),
    [
        ("AutoEncoder", {"dict_class": ["AutoEncoder"]}, {}, "dict_class ['AutoEncoder'] is not read"),
        ("AutoEncoderTopK", {}, {"k": torch.tensor(5.7)}, "k is 5.69"),
        ("MatryoshkaBatchTopKSAE", {}, {"group_sizes": torch.ones(3_000_000)}, "group_sizes are [1, 1, 1"),
        ("AutoEncoder", {"dict_class": "IdentityDict"}, {}, "dict_class IdentityDict is not read"),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew"}, {}, "has bias besides, which is not read"),
        ("AutoEncoder", {"dict_size": 32}, {}, "encoder.weight is (64, 16), config.json says (32, 16)"),
        ("AutoEncoder", {"activation_dim": "16"}, {}, "activation_dim is '16', expected a whole number"),
        ("AutoEncoder", {}, {"bias": None}, "bias is missing"),
        ("AutoEncoder", {}, {"encoder__weight": None}, "has no matrix encoder.weight or W_enc"),
        ("AutoEncoder", {}, {"encoder__weight": torch.zeros(3)}, "has no matrix encoder.weight or W_enc"),
        ("AutoEncoder", {}, {"encoder__bias": torch.full((64,), torch.nan)}, "encoder.bias[0] is nan (64 such)"),
        ("AutoEncoder", {}, {"encoder__bias": torch.ones(64, dtype=torch.bool)}, "encoder.bias is bool"),
        ("AutoEncoderTopK", {"k": 6}, {}, "ae.pt: k is 5, "),
        ("AutoEncoderTopK", {}, {"k": torch.tensor(65)}, "k is 65, expected a whole number, 1 to 64"),
        ("AutoEncoderTopK", {"k": None}, {"k": None}, "k is None, expected a whole number"),
        ("BatchTopKSAE", {}, {"threshold": torch.tensor(torch.nan)}, "threshold[] is nan"),
        ("BatchTopKSAE", {}, {"threshold": None}, "threshold is missing"),
        ("MatryoshkaBatchTopKSAE", {}, {"group_sizes": torch.tensor([8, 24])}, "group_sizes are [8, 24]"),
        ("MatryoshkaBatchTopKSAE", {}, {"group_sizes": torch.tensor([128, -64])}, "group_sizes are [128, -64]"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, case, trainer, tensors, said):
    assert said in line(placed(tmp_path, case, trainer, **tensors))


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "not valid JSON"), ("{}", "has no 'trainer'"), ('{"trainer": 5}', "trainer and buffer must be objects")],
)
def test_a_config_that_is_none_is_one_line(tmp_path, config, said):
    folder = placed(tmp_path)
    (folder / "config.json").write_text(config)
    assert said in line(folder)


def test_a_run_of_several_trainers_names_one(tmp_path):
    placed(tmp_path)
    assert "Give one, for example" in line(tmp_path) and "trainer_0." in line(tmp_path)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_written_and_read_again_it_belongs_where_it_did(tmp_path, architecture):
    about = {"hook_name": "blocks.2.hook_mlp_out", "model_name": "tiny", "context_size": 64}
    sae = make_sae(architecture=architecture, apply_b_dec_to_input=architecture == "topk", **about)
    dictionary_learning.write(tmp_path, *sae.facts())
    again = SAE.load(tmp_path)
    assert {name: getattr(again.cfg.metadata, name) for name in about} == about
    x = torch.randn(20, 32)
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    if architecture == "topk":
        assert torch.equal(again.threshold, sae.threshold)


@pytest.mark.parametrize("hook", ["blocks.2.attn.hook_z", "hook_embed", ""])
def test_a_hook_that_it_has_no_word_for_is_kept_as_it_is(tmp_path, hook):
    dictionary_learning.write(tmp_path, *make_sae(hook_name=hook).facts())
    assert SAE.load(tmp_path).cfg.metadata.hook_name == hook


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"architecture": "groupmax"}, "this SAE is groupmax, .*Write it as sparsify"),
        ({"architecture": "matching_pursuit"}, "this SAE is matching_pursuit, .*Write it as saelens"),
        ({"d_out": 32}, "this SAE is topk in a transcoder from width 32 to 32, .*Write it as sparsify"),
        (
            {"normalize_activations": "layer_norm"},
            "this SAE is topk with layer_norm of each token, .*Write it as saelens",
        ),
    ],
)
def test_what_it_cannot_say_is_refused_by_name(tmp_path, facts, said):
    known, tensors = make_sae().facts()
    with pytest.raises(UserError, match=said):
        dictionary_learning.write(tmp_path, replace(known, **facts), tensors)
    assert list(tmp_path.iterdir()) == []
