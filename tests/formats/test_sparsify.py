"""sparsify's layout: where its SAEs belong, what is refused and how; its numbers are in tests/peers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.formats import sparsify
from tests.conftest import make_sae
from tests.peers.agree import FIXTURES


def placed(tmp_path, name="layers.2", case="topk", run=None, **changes):
    """A fixture's SAE in the folder of a hook point, with changes to its cfg.json."""
    folder = tmp_path / "run" / name
    shutil.copytree(FIXTURES / f"sparsify-{case}" / "sae", folder)
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps(config))
    if run is not None:
        (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    return folder


def reweighed(folder, change):
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")
    return folder


def line(folder):
    with pytest.raises(UserError) as caught:
        SAE.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.0.mlp", "blocks.0.hook_mlp_out"),
        ("model.layers.3.self_attn", "blocks.3.hook_attn_out"),
        ("layers.3.attention/seed7", "blocks.3.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.3.mlp.down_proj", "layers.3.mlp.down_proj"),
        ("mine", ""),
    ],
)
def test_a_folders_name_says_where_an_sae_belongs(tmp_path, name, hook):
    about = SAE.load(placed(tmp_path, name)).cfg.metadata
    assert (about.hook_name, about.hook_name_out, about.layout, about.units) == (hook, "", "sparsify", "raw")


@pytest.mark.parametrize(
    ("case", "name", "hooks"),
    [
        ("topk-transcode", "layers.2.mlp", ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")),
        ("topk-transcode-skip", "h.2", ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")),
        ("topk-skip", "layers.2.mlp", ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out")),
    ],
)
def test_a_transcoder_reads_what_the_module_reads(tmp_path, case, name, hooks):
    cfg = SAE.load(placed(tmp_path, name, case)).cfg
    assert (cfg.metadata.hook_name, cfg.metadata.hook_name_out, cfg.d_out) == (*hooks, 16)


@pytest.mark.parametrize("name", ["layers.2", "layers.2/seed1"])
def test_model_and_data_stand_in_the_runs_config(tmp_path, name):
    run = {"model": "EleutherAI/pythia-160m", "dataset": "texts", "ctx_len": 2048, "sae": {}}
    about = SAE.load(placed(tmp_path, name, run=run)).cfg.metadata
    assert (about.model_name, about.dataset, about.context_size) == ("EleutherAI/pythia-160m", "texts", 2048)


def test_the_name_in_its_repository_counts_where_it_lies_elsewhere(tmp_path):
    facts, _ = sparsify.read(placed(tmp_path, "download"), where="EleutherAI/sae-pythia-160m-32k/layers.5")
    assert facts.metadata["hook_name"] == "blocks.5.hook_resid_post"


def test_a_run_of_several_hook_points_names_one(tmp_path):
    placed(tmp_path, "layers.2/seed0")
    placed(tmp_path, "layers.10", run={"model": "tiny"})
    assert "Give one, for example" in line(tmp_path / "run") and "layers.10." in line(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "batchtopk"}, "activation 'batchtopk' is not read"),
        ({"k": 0}, "k is 0, expected a whole number, 1 to 64"),
        ({"k": 65}, "k is 65"),
        ({"k": 6, "activation": "groupmax"}, "k is 6, of which its 64 features are no multiple"),
        ({"num_latents": 32}, r"encoder.weight is (64, 16), cfg.json says (32, 16)"),
        ({"num_latents": 0, "expansion_factor": "4"}, "expansion_factor is '4'"),
        ({"d_in": None}, "d_in is None"),
        ({"transcode": "yes"}, "transcode is 'yes', expected true or false"),
        ({"skip_connection": True}, "W_skip is missing"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(tmp_path, changes, said):
    assert said in line(placed(tmp_path, **changes))


def test_weights_that_cannot_be_are_one_line(tmp_path):
    def spoilt(tensors):
        tensors["W_dec"][3, 5] = torch.nan

    assert "W_dec[3, 5] is nan" in line(reweighed(placed(tmp_path, "a"), spoilt))
    assert "b_dec is missing" in line(reweighed(placed(tmp_path, "b"), lambda tensors: tensors.pop("b_dec")))
    more = line(reweighed(placed(tmp_path, "c"), lambda tensors: tensors.update(post_enc=torch.ones(64))))
    assert "has post_enc besides, which is not read" in more
    (placed(tmp_path, "d") / "sae.safetensors").write_bytes(b"not one")
    assert "is damaged" in line(tmp_path / "run" / "d")


def test_written_and_read_again_it_belongs_where_it_did(tmp_path):
    about = {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny", "context_size": 64, "dataset": "texts"}
    sae = make_sae(**about)
    sparsify.write(tmp_path, *sae.facts())
    again = SAE.load(tmp_path)
    assert {name: getattr(again.cfg.metadata, name) for name in about} == about
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] is True
    x = torch.randn(20, 32)
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"architecture": "jumprelu"}, "this SAE is jumprelu, which its layout has no words for. Write it as saelens"),
        ({"architecture": "abstopk"}, "this SAE is abstopk"),
        ({"d_out": 8}, "this SAE is topk in a transcoder from width 32 to 8.* No other library has one"),
        ({"normalize_activations": "layer_norm"}, "this SAE is topk with layer_norm of each token"),
    ],
)
def test_what_sparsify_cannot_say_is_refused_by_name(tmp_path, facts, said):
    from dataclasses import replace

    known, tensors = make_sae().facts()
    with pytest.raises(UserError, match=said):
        sparsify.write(tmp_path, replace(known, **facts), tensors)
    assert list(tmp_path.iterdir()) == []
