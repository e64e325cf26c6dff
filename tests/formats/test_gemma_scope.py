"""Gemma Scope: what an SAE belongs to is told by names and config; what is not read is one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.formats import gemma_scope, layouts
from tests.peers.agree import FIXTURES

FIRST = FIXTURES / "gemma_scope-res" / "sae"
SECOND = FIXTURES / "gemma_scope_2-mlp_out" / "sae"
LAYER = "layer_20/width_16k/average_l0_71"


def place(folder, where):
    """(model_name, hook_name, hook_name_out) that a folder is taken for where it lies there."""
    facts, _ = gemma_scope.read(folder, where=where)
    return tuple(facts.metadata.get(name, "") for name in ("model_name", "hook_name", "hook_name_out"))


@pytest.mark.parametrize(
    "where, expected",
    [
        (f"google/gemma-scope-2b-pt-res/{LAYER}", ("gemma-2-2b", "blocks.20.hook_resid_post", "")),
        (f"google/gemma-scope-27b-pt-res/{LAYER}", ("gemma-2-27b", "blocks.20.hook_resid_post", "")),
        (f"google/gemma-scope-9b-it-res/{LAYER}", ("gemma-2-9b-it", "blocks.20.hook_resid_post", "")),
        (f"google/gemma-scope-2b-pt-mlp/{LAYER}", ("gemma-2-2b", "blocks.20.hook_mlp_out", "")),
        (f"google/gemma-scope-9b-pt-att/{LAYER}", ("gemma-2-9b", "blocks.20.attn.hook_z", "")),
        (
            f"google/gemma-scope-2b-pt-transcoders/{LAYER}",
            ("gemma-2-2b", "blocks.20.ln2.hook_normalized", "blocks.20.hook_mlp_out"),
        ),
        ("google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", ("gemma-2-2b", "hook_embed", "")),
        ("google/gemma-scope-2b-pt-res", ("gemma-2-2b", "", "")),
        (f"/data/layer_3/some-sae/{LAYER}", ("", "", "")),
        ("", ("", "", "")),
    ],
)
def test_where_an_sae_of_the_first_belongs(where, expected):
    assert place(FIRST, where) == expected


@pytest.mark.parametrize(
    "where, expected",
    [
        ("1b-pt/resid_post/layer_7_width_16k_l0_small", ("google/gemma-3-1b-pt", "blocks.7.hook_resid_post", "")),
        ("4b-it/resid_post_all/layer_17_width_1m_l0_big", ("google/gemma-3-4b-it", "blocks.17.hook_resid_post", "")),
        ("270m-pt/attn_out/layer_5_width_16k_l0_medium", ("google/gemma-3-270m", "blocks.5.attn.hook_z", "")),
        ("270m-it/mlp_out_all/layer_5_width_16k_l0_big", ("google/gemma-3-270m-it", "blocks.5.hook_mlp_out", "")),
        (
            "12b-pt/transcoder_all/layer_5_width_16k_l0_big_affine",
            ("google/gemma-3-12b-pt", "blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
        ),
        ("1b-pt", ("google/gemma-3-1b-pt", "", "")),
    ],
)
def test_where_an_sae_of_the_second_belongs_without_its_config(where, expected):
    assert place(SECOND, f"google/gemma-scope-2-{where}") == expected


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            {"model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.13.output",
             "hf_hook_point_out": "model.layers.13.output"},
            ("google/gemma-3-1b-pt", "blocks.13.hook_resid_post", ""),
        ),
        (
            {"model_name": "google/gemma-3-4b-it",
             "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
             "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"},
            ("google/gemma-3-4b-it", "blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out"),
        ),
        ({"hf_hook_point_in": "model.layers.9.self_attn.o_proj.input"}, ("", "blocks.9.attn.hook_z", "")),
        ({"hf_hook_point_in": "somewhere.else"}, ("", "", "")),
        ({}, ("", "", "")),
    ],
)  # fmt: skip
def test_the_config_of_the_second_says_it_whatever_the_folder_is_called(tmp_path, config, expected):
    folder = shutil.copytree(SECOND, tmp_path / "mine")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    assert place(folder, "") == expected


def test_in_the_hubs_cache_the_folder_and_the_file_are_found_by_name(tmp_path):
    """Its files are links to others that are called by their checksums."""
    folder = tmp_path / "models--google--gemma-scope-2b-pt-mlp" / "snapshots" / "0123" / LAYER
    folder.mkdir(parents=True)
    blob = shutil.copy(FIRST / "params.npz", tmp_path / "4567")
    (folder / "params.npz").symlink_to(blob)
    for path in (folder, folder / "params.npz"):
        about = SAE.load(path).cfg.metadata
        assert (about.model_name, about.hook_name) == ("gemma-2-2b", "blocks.20.hook_mlp_out")
        assert about.layout == "gemma_scope" and about.context_size == 1024 and about.foreign["prepend_bos"]


def test_an_sae_of_the_embedding_reads_what_is_multiplied_by_the_root_of_the_width():
    _, plain = gemma_scope.read(FIRST)
    for where in ("google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "/data/embedding/width_4k"):
        _, scaled = gemma_scope.read(FIRST, where=where)
        torch.testing.assert_close(scaled["W_enc"] * 4, plain["W_enc"])
        torch.testing.assert_close(scaled["W_dec"] / 4, plain["W_dec"])


def test_attention_and_transcoders_have_the_widths_of_their_arrays():
    facts, tensors = gemma_scope.read(FIXTURES / "gemma_scope_2-transcoder-affine" / "sae")
    assert (facts.d_in, facts.d_out) == (16, 12) and tensors["W_skip"].shape == (12, 16)
    assert gemma_scope.read(FIRST, where=f"google/gemma-scope-2b-pt-transcoders/{LAYER}")[0].d_out == 16
    assert gemma_scope.read(FIRST)[0].d_out is None


def refused(path, why):
    with pytest.raises(UserError, match=why) as error:
        SAE.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["params_layer_0.safetensors", "params.safetensors"])
def test_a_transcoder_over_several_layers_is_refused_by_name(tmp_path, name):
    tensors = load_file(SECOND / "params.safetensors")
    save_file(tensors | {"w_dec": torch.zeros(64, 3, 16)}, tmp_path / name)
    refused(tmp_path, f"{name}: is part of a transcoder over several layers")
    refused(tmp_path / name, f"{name}: is part of a transcoder over several layers")


def test_another_rule_in_the_config_is_refused(tmp_path):
    folder = shutil.copytree(SECOND, tmp_path / "sae")
    (folder / "config.json").write_text('{"architecture": "topk"}')
    refused(folder, "config.json: architecture is 'topk'")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"W_enc": None}, "has no two matrices"),
        ({"W_enc": np.zeros(64, np.float32)}, "has no two matrices"),
        ({"W_dec": np.zeros((63, 16), np.float32)}, r"W_dec is \(63, 16\), its matrices say \(64, 16\)"),
        ({"threshold": None}, "threshold is missing"),
        ({"b_dec": np.full(16, np.nan, np.float32)}, r"b_dec\[0\] is nan"),
        ({"b_dec": np.zeros(16, bool)}, "b_dec is bool"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, why):
    with np.load(FIRST / "params.npz") as arrays:
        given = {**arrays, **change}
    np.savez(tmp_path / "params.npz", **{name: array for name, array in given.items() if array is not None})
    refused(tmp_path, why)


def test_a_folder_of_several_says_which_to_give(tmp_path):
    shutil.copytree(FIRST, tmp_path / "layer_1" / "width_16k")
    refused(tmp_path, "some in it. Give one, for example .*width_16k")


def test_each_case_of_every_layout_is_recognised_by_one_page_alone():
    for case in FIXTURES.iterdir():
        assert len([name for name, page in layouts.PAGES.items() if page.recognises(case / "sae")]) == 1, case.name
