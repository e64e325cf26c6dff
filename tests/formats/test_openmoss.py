"""OpenMOSS and Llama Scope: where the files may lie, what they say of the host, the units; what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.formats import layouts, openmoss
from tests.peers.agree import FIXTURES, difference, expected

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def copied(tmp_path):
    """A function: a case's folder copied, its config changed (None takes a key away)."""

    def copy(case, **changes):
        folder = shutil.copytree(FIXTURES / f"openmoss-{case}" / "sae", tmp_path / case, dirs_exist_ok=True)
        path = next(path for path in (folder / "config.json", folder / "hyperparams.json") if path.exists())
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return copy


def change(path, **changes):
    """Tensors of a safetensors file replaced, or with None taken away."""
    tensors = load_file(path) | changes
    path.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refused(path, why):
    with pytest.raises(UserError, match=why) as error:
        SAE.load(path)
    assert "\n" not in str(error.value)


def test_facts_of_a_finished_sae(copied):
    about = SAE.load(copied("jumprelu")).cfg.metadata
    assert (about.hook_name, about.hook_name_out, about.layout) == (HOOK, "", "openmoss")
    assert about.units == "raw" and about.norm_factor == pytest.approx(4 / 13)
    assert SAE.load(copied("jumprelu-token-wise")).cfg.metadata.units == "token"
    assert SAE.load(copied("jumprelu-folded-by-openmoss")).cfg.metadata.norm_factor is None
    transcoder = SAE.load(copied("jumprelu-transcoder")).cfg
    assert transcoder.d_out == 16 and transcoder.metadata.hook_name_out == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize("name", ["checkpoints/final", "checkpoints/pruned", "sae_weights"])
def test_weights_lie_in_either_place_and_may_be_given_themselves(copied, name):
    folder = copied("jumprelu")
    weights = folder / f"{name}.safetensors"
    weights.parent.mkdir(exist_ok=True)
    (folder / "sae_weights.safetensors").rename(weights)
    x = expected(FIXTURES / "openmoss-jumprelu")[0]["x"]
    found = [SAE.load(path).encode(x) for path in (folder, weights)]
    assert torch.equal(found[0], found[1]) and bool(found[0].any())


def test_the_pruned_weights_come_before_the_final_ones(copied):
    folder = copied("jumprelu")
    (folder / "checkpoints").mkdir()
    shutil.copy(folder / "sae_weights.safetensors", folder / "checkpoints" / "final.safetensors")
    (folder / "sae_weights.safetensors").rename(folder / "checkpoints" / "pruned.safetensors")
    change(folder / "checkpoints" / "pruned.safetensors", b_D=torch.full((16,), 13 / 4))
    torch.testing.assert_close(SAE.load(folder).b_dec, torch.full((16,), (13 / 4) ** 2))
    assert not torch.equal(SAE.load(folder / "checkpoints" / "final.safetensors").b_dec, SAE.load(folder).b_dec)


def test_the_host_is_told_by_the_file_beside_or_by_the_published_name(copied):
    folder = copied("llama_scope")
    where = "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L8R-8x"
    assert layouts.read(folder, where=where)[1].metadata["model_name"] == "meta-llama/Llama-3.1-8B"
    assert layouts.read(folder)[1].metadata["model_name"] == ""
    (folder / "lm_config.json").write_text('{"model_name": "gpt2"}')
    assert SAE.load(folder).cfg.metadata.model_name == "gpt2"


def test_a_norm_may_stand_in_the_config_where_the_weights_have_none(copied):
    folder = copied("jumprelu")
    x = expected(FIXTURES / "openmoss-jumprelu")[0]["x"]
    before = SAE.load(folder).encode(x)
    change(folder / "sae_weights.safetensors", **{f"dataset_average_activation_norm.{HOOK}": None})
    refused(folder, f"mean norm at '{HOOK}' is None. Write it in here")
    folder = copied("jumprelu", dataset_average_activation_norm={HOOK: 13})
    change(folder / "sae_weights.safetensors", **{f"dataset_average_activation_norm.{HOOK}": None})
    assert torch.equal(SAE.load(folder).encode(x), before)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), 1e-41])
def test_a_norm_that_nobody_set_is_refused(copied, norm):
    """OpenMOSS saves uninitialised memory where set_dataset_average_activation_norm was never called."""
    folder = copied("topk")
    change(folder / "sae_weights.safetensors", **{f"dataset_average_activation_norm.{HOOK}": torch.tensor(norm)})
    refused(folder, "was trained on scaled activations, and their mean norm")


def test_openmoss_folds_without_the_threshold(copied):
    """Its fold gates at θ where training did at θ/f_out; a file that it folded is read as it reads it itself."""
    folder = copied("jumprelu-ranked")
    whole, weights = SAE.load(folder), load_file(folder / "sae_weights.safetensors")
    f = 4 / 13
    folded = copied("jumprelu-ranked", norm_activation="inference")
    change(folded / "sae_weights.safetensors", b_E=weights["b_E"] / f, b_D=weights["b_D"] / f)
    as_they_do = SAE.load(folded)
    torch.testing.assert_close(as_they_do.pre_activations(torch.ones(1, 16)), whole.pre_activations(torch.ones(1, 16)))
    assert whole.threshold is not None and as_they_do.threshold is not None
    torch.testing.assert_close(as_they_do.threshold, whole.threshold * f)


@pytest.mark.parametrize("ranked", [False, True])
def test_a_transcoder_of_llama_scope_gates_on_what_it_adds_to_the_raw_output(copied, ranked):
    """Published ones read ln2.hook_normalized (mean norm √d) and write hook_mlp_out: one factor for both, as SAELens
    has it, would be off by their ratio. Here all of it is written out, without any fold."""
    norms = {"in": 4.0, "out": 0.25}
    folder = copied(
        "llama_scope", hook_point_in="blocks.8.ln2.hook_normalized", hook_point_out="blocks.8.hook_mlp_out",
        dataset_average_activation_norm=norms, jump_relu_threshold=0.1, sparsity_include_decoder_norm=ranked,
    )  # fmt: skip
    given = load_file(folder / "checkpoints" / "final.safetensors")
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    f_in, f_out = (4 / norms[way] for way in ("in", "out"))
    pre = (f_in * x) @ given["encoder.weight"].T + given["encoder.bias"]
    length = given["decoder.weight"].norm(dim=0) if ranked else 1
    acts = pre * (pre * length / f_out > 0.1)
    sae = SAE.load(folder)
    assert sae.cfg.d_out == 16 and sae.cfg.metadata.hook_name_out == "blocks.8.hook_mlp_out"
    assert 0.01 < (acts > 0).float().mean() < 0.5
    assert difference(sae.encode(x), acts / f_in) < 1e-5
    assert difference(sae(x), (acts @ given["decoder.weight"].T + given["decoder.bias"]) / f_out) < 1e-5


def test_a_bias_that_older_ones_take_off_first(copied):
    folder = copied("llama_scope-r1", apply_decoder_bias_to_pre_encoder=True)
    given = load_file(folder / "sae_weights.safetensors")
    x = expected(FIXTURES / "openmoss-llama_scope-r1")[0]["x"]
    pre = (x * 4 / 13 - given["decoder.bias"]) @ given["encoder.weight"].T + given["encoder.bias"]
    acts = pre * (pre > given["log_jumprelu_threshold"].exp())
    assert difference(SAE.load(folder).encode(x), acts * 13 / 4) < 1e-5


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"sae_type": "clt"}, "sae_type is 'clt'"),
        ({"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        ({"act_fn": "batchtopk"}, "act_fn is batchtopk"),
        ({"act_fn": "layertopk"}, "act_fn is 'layertopk'"),
        ({"hook_point_out": "blocks.2.hook_mlp_out", "norm_activation": "token-wise"}, "which nobody has"),
        ({"d_model": 15}, r"W_E is \(16, 64\), config.json and b_E say \(15, 64\)"),
        ({"d_model": 10**400}, "d_model is 1000"),
        ({"hook_point_in": None}, "hook_point_in"),
        ({"act_fn": "topk", "top_k": 65}, "top_k is 65"),
    ],
)
def test_what_is_not_read_is_said_by_name(copied, changes, why):
    refused(copied("jumprelu", **changes), why)


@pytest.mark.parametrize("threshold", [None, "high", True, 10**400])
def test_llama_scopes_threshold_is_a_number(copied, threshold):
    refused(copied("llama_scope", jump_relu_threshold=threshold), "jump_relu_threshold is")


def test_shards_are_refused_and_how_to_join_them_is_said(copied):
    folder = copied("jumprelu")
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.dcp").mkdir()
    refused(folder, r"sae_weights.dcp: is a checkpoint in shards.*save_checkpoint\('sae_weights.safetensors'\)")


def test_a_folder_with_saelens_config_is_saelens(copied):
    folder = copied("jumprelu")
    (folder / "cfg.json").write_text("{}")
    assert not openmoss.recognises(folder) and layouts.recognised(folder) == "saelens"


def test_pickled_weights_that_hold_more_than_tensors_are_not_loaded(copied):
    folder = copied("jumprelu-pickle")
    torch.save({"sae": {"W_E": print}}, folder / "sae_weights.pt")
    refused(folder, "holds more than tensors")
    torch.save([1, 2], folder / "sae_weights.pt")
    refused(folder, "holds list, expected tensors by name")
