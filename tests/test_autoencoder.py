"""The SAE: encode, decode, gradients, and what is on disk."""

import json
import math
import os

import pytest
import torch

from sae.autoencoder import SAE, FeatureStats, SAEConfig
from sae.errors import UserError
from sae.run import info
from tests.conftest import make_sae


def test_sparse_and_dense_encodings_are_the_same(tiny_sae):
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    dense = tiny_sae.encode(x)
    codes = tiny_sae.encode_sparse(x)
    torch.testing.assert_close(codes.dense(), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tiny_sae.decode(codes), tiny_sae(x), rtol=1e-5, atol=1e-5)
    assert ((dense > 0).sum(1) <= 6).all()


def test_encode_and_decode_are_differentiable(tiny_sae):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tiny_sae(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert tiny_sae(x).shape == (3, 5, 32)


def test_single_features_equal_the_full_encoding(tiny_sae):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tiny_sae.feature_acts(x, [3, 90, 7]), tiny_sae.encode(x)[:, [3, 90, 7]])


def test_threshold_selection_is_strict_and_reads_single_features(tiny_sae):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    pre = (x - tiny_sae.b_dec) @ tiny_sae.encoder[[4]].T + tiny_sae.b_enc[[4]]
    assert tiny_sae.threshold is not None
    tiny_sae.threshold[4] = pre[7, 0]
    got = tiny_sae.feature_acts(x, [4], select="threshold")
    assert got[7, 0] == 0
    torch.testing.assert_close(got, pre * (pre > pre[7, 0]) * (pre > 0))


THRESHOLD_SAES = [(name, subtracts) for name in ("jumprelu", "relu") for subtracts in (True, False)]


@pytest.mark.parametrize("name,subtracts", THRESHOLD_SAES)
def test_a_threshold_sae_keeps_what_is_above_its_threshold_and_zero(name, subtracts):
    sae = make_sae(architecture=name, apply_b_dec_to_input=subtracts)
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    pre = (x - sae.b_dec * subtracts) @ sae.W_enc + sae.b_enc
    expected = pre.relu() if name == "relu" else pre.relu() * (pre > sae.threshold)
    torch.testing.assert_close(sae.encode(x), expected)
    codes = sae.encode_sparse(x)
    assert (codes.values > 0).all()
    torch.testing.assert_close(codes.dense(), expected)
    torch.testing.assert_close(sae.feature_acts(x, [3, 90, 7]), expected[:, [3, 90, 7]])
    torch.testing.assert_close(sae.decode(codes), expected @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=f"a {name} SAE has no k"):
        sae.feature_acts(x, [3], select="topk")


def test_a_threshold_is_passed_by_what_is_strictly_above_it():
    sae = make_sae(architecture="jumprelu")
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    pre = sae.pre_activations(x)
    strongest = int(pre[0].argmax())
    sae.threshold = pre[0].clone()
    assert (sae.encode(x)[0] == 0).all()
    sae.threshold[strongest] = torch.nextafter(pre[0, strongest], torch.tensor(0.0))
    assert sae.encode(x)[0].nonzero().flatten().tolist() == [strongest]


def test_gradients_go_through_the_selected_features_only():
    """Also across the threshold: what is selected is a constant, and thresholds get no gradient."""
    sae = make_sae(architecture="jumprelu")
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    acts = sae.encode(x)
    acts.sum().backward()
    assert x.grad is not None and sae.threshold is not None and not sae.threshold.requires_grad
    torch.testing.assert_close(x.grad, (acts > 0).float() @ sae.encoder)


def test_in_bfloat16_thresholds_stay_float32_and_both_encodings_select_the_same(tmp_path):
    sae = make_sae(architecture="jumprelu")
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    sae.save(tmp_path / "sae", dtype=torch.bfloat16)
    low = SAE.load(tmp_path / "sae", dtype=torch.bfloat16)
    assert low.W_dec.dtype == torch.bfloat16 and low.encode(x).dtype == torch.bfloat16
    assert low.threshold is not None and torch.equal(low.threshold, sae.threshold)
    assert torch.equal(low.double().threshold, sae.threshold)
    low.bfloat16()
    dense, sparse = low.encode(x), low.encode_sparse(x).dense()
    assert torch.equal(dense > 0, sparse > 0)
    torch.testing.assert_close(dense.float(), sparse, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name,subtracts", [*THRESHOLD_SAES, ("topk", False)])
def test_every_architecture_is_loaded_as_it_was_saved(tmp_path, name, subtracts):
    sae = make_sae(architecture=name, apply_b_dec_to_input=subtracts, training_architecture="batchtopk")
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.cfg == sae.cfg and loaded.cfg.apply_b_dec_to_input == subtracts
    x = torch.randn(20, 32)
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x), sae(x))
    (tmp_path / "sae" / "goldengate.json").unlink()  # what SAELens has too is enough
    bare = SAE.load(tmp_path / "sae")
    assert torch.equal(bare.encode(x), sae.encode(x))
    assert (bare.cfg.architecture, bare.cfg.metadata.training_architecture) == (name, "batchtopk")


@pytest.mark.parametrize(
    "activation,k,normalise,said",
    [
        ("topk", 6, False, None),
        ("relu", None, None, None),
        ("relu", None, True, "was trained on scaled activations and activation_scaler.json is not beside it"),
        ("relu", None, "by_ten", "normalize_activations is 'by_ten', which is not read"),
        ("tanh-relu", None, False, "'standard with tanh-relu' is not read"),
    ],
)
def test_a_folder_of_before_saelens_6_is_what_its_activation_says(tmp_path, activation, k, normalise, said):
    """SAELens issue 553: TopK SAEs whose config says "standard" were loaded as ReLU."""
    sae = make_sae(architecture="topk" if k else "relu")
    folder = sae.save(tmp_path / "sae")
    (folder / "goldengate.json").unlink()
    old = {"architecture": "standard", "d_in": 32, "d_sae": 96, "hook_name": "blocks.2.hook_resid_post"}
    old |= {"activation_fn_str": activation, "activation_fn_kwargs": {"k": k} if k else {}}
    (folder / "cfg.json").write_text(json.dumps(old | {"normalize_activations": normalise}))
    if said:
        with pytest.raises(UserError, match=said):
            SAE.load(folder)
        return
    x = torch.randn(20, 32)
    loaded = SAE.load(folder)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert loaded.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


def test_a_feature_out_of_range_is_one_line(tiny_sae):
    with pytest.raises(UserError, match="feature 96 does not exist: this SAE has 96"):
        tiny_sae.feature_acts(torch.zeros(1, 32), [96])


def test_activations_of_another_width_are_refused(tiny_sae):
    with pytest.raises(UserError, match="x has width 33, this SAE was trained on width 32"):
        tiny_sae.encode(torch.zeros(2, 33))
    with pytest.raises(UserError, match="97 features, this SAE 96"):
        tiny_sae.decode(torch.zeros(2, 97))


def test_saving_and_loading_changes_nothing(tmp_path, tiny_sae):
    tiny_sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    x = torch.randn(20, 32)
    assert torch.equal(loaded.encode(x), tiny_sae.encode(x))
    assert torch.equal(loaded(x), tiny_sae(x))
    assert loaded.cfg == tiny_sae.cfg
    assert loaded.stats is not None and torch.equal(loaded.stats.max_act, tiny_sae.stats.max_act)
    assert torch.equal(loaded.threshold, tiny_sae.threshold)


def test_a_bfloat16_save_is_close_and_keeps_biases_exact(tmp_path, tiny_sae):
    tiny_sae.save(tmp_path / "sae", dtype=torch.bfloat16)
    loaded = SAE.load(tmp_path / "sae")
    torch.testing.assert_close(loaded.W_dec, tiny_sae.W_dec, rtol=1e-2, atol=1e-2)
    assert torch.equal(loaded.b_enc, tiny_sae.b_enc)


def test_a_folder_of_saelens_without_our_files_loads(tmp_path, tiny_sae):
    folder = tiny_sae.save(tmp_path / "sae")
    (folder / "goldengate.json").unlink()
    (folder / "feature_stats.safetensors").unlink()
    loaded = SAE.load(folder)
    assert loaded.stats is None and loaded.threshold is None
    assert loaded.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


def test_decoder_norms_that_saelens_rescales_by_are_folded(tmp_path, tiny_sae):
    """With rescale_acts_by_decoder_norm SAELens selects by pre·‖W_dec‖ and divides again: the same as unit rows."""
    from safetensors.torch import load_file, save_file

    folder = tiny_sae.save(tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    norms = torch.rand(96) + 0.5
    tensors["W_dec"] = tensors["W_dec"] * norms[:, None]
    save_file(tensors, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text()) | {"rescale_acts_by_decoder_norm": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(9, 32)
    pre = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    values, indices = pre.topk(6)
    expected = torch.zeros_like(pre).scatter(1, indices, values.relu())
    loaded = SAE.load(folder)
    torch.testing.assert_close(loaded.encode(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        loaded(x), (expected / norms) @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-4, atol=1e-5
    )


def change(folder, **values):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | values))


def change_facts(folder, **values):
    own = json.loads((folder / "goldengate.json").read_text())
    metadata = own["metadata"] | {name: value for name, value in values.items() if name != "threshold"}
    own |= {"metadata": metadata, "threshold": values.get("threshold", own["threshold"])}
    (folder / "goldengate.json").write_text(json.dumps(own))


def change_stats(folder, n_tokens="1000", **tensors):
    from safetensors.torch import load_file, save_file

    path = folder / "feature_stats.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"n_tokens": n_tokens})


def in_place_of(path, kind):
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()


@pytest.mark.parametrize("name", ["goldengate.json", "labels.json", "feature_stats.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_what_is_no_file_in_place_of_an_optional_one_is_one_line(tmp_path, tiny_sae, name, kind):
    tiny_sae.labels = {3: "x"}
    folder = tiny_sae.save(tmp_path / "sae")
    in_place_of(folder / name, kind)
    with pytest.raises(UserError, match=rf"{name}: is (a folder|no regular file). Put the file there"):
        SAE.load(folder)


def test_json_without_end_is_not_read(tmp_path, tiny_sae):
    folder = tiny_sae.save(tmp_path / "sae")
    with (folder / "goldengate.json").open("r+b") as file:
        file.truncate(1 << 29)
    with pytest.raises(UserError, match="has 536,870,912 bytes, of JSON 268,435,456 are read"):
        SAE.load(folder)


def test_a_file_of_weights_is_its_folder(tmp_path, tiny_sae):
    folder = tiny_sae.save(tmp_path / "sae")
    assert SAE.load(folder / "sae_weights.safetensors").stats is not None
    assert info(folder / "sae_weights.safetensors") == info(folder)


def test_what_is_shown_of_an_sae_steers_no_terminal():
    assert "hook=a b" in repr(make_sae(hook_name="a\n\x1b[31mb"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda f: (f / "cfg.json").unlink(), "not an SAE folder"),
        (lambda f: (f / "cfg.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "is missing"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"short"), "is damaged"),
        (lambda f: (f / "cfg.json").write_text("[]"), "cfg.json: holds list"),
        (lambda f: change(f, k="six"), "k is 'six', expected a whole number, 1 to 96"),
        (lambda f: change(f, k=None), "k is None"),
        (lambda f: change(f, k=97), "k is 97"),
        (lambda f: change(f, d_in=-1), "d_in is -1"),
        (lambda f: change(f, metadata=[1]), "metadata is not an object"),
        (lambda f: change(f, apply_b_dec_to_input="no"), "apply_b_dec_to_input is 'no', expected true or false"),
        (
            lambda f: change(f, normalize_activations="expected_average_only_in"),
            "activation_scaler.json is not beside it",
        ),
        (lambda f: change(f, normalize_activations="covariance_whitening"), "whitening.safetensors is not beside it"),
        (lambda f: change(f, reshape_activations="hook_q"), "reshape_activations is 'hook_q', which is not read"),
        (lambda f: change(f, architecture="batchtopk"), "threshold is missing, cfg.json says"),
        (lambda f: change(f, architecture=None), "architecture None is not read"),
        (lambda f: cut(f / "feature_stats.safetensors"), "feature_stats.safetensors: is damaged"),
        (lambda f: (f / "goldengate.json").write_text("{}"), "goldengate.json: has no 'metadata'"),
        (lambda f: (f / "goldengate.json").write_text("[]"), "goldengate.json: holds list"),
        (lambda f: (f / "goldengate.json").write_text('{"metadata": 1, "threshold": 0}'), "metadata must be an obj"),
        (lambda f: change_facts(f, threshold=10**4000), "threshold is 1000.*expected a finite number"),
        (lambda f: change_facts(f, threshold=1e39), "threshold is 1e.39, expected a finite number"),
        (lambda f: change_facts(f, threshold=math.nan), "threshold is nan"),
        (lambda f: change_facts(f, threshold=math.inf), "threshold is inf"),
        (lambda f: change_facts(f, threshold=True), "threshold is True"),
        (lambda f: change_facts(f, units="furlongs"), "units are 'furlongs', expected raw, normalised, token, unknown"),
        (lambda f: change_facts(f, norm_factor=math.nan), "norm_factor is nan, expected a number above 0"),
        (lambda f: change_facts(f, context_size=-1), "context_size is -1"),
        (lambda f: (f / "labels.json").write_text("[" * 900 + "]" * 900), "nested more than 100 deep"),
        (lambda f: change(f, d_in=10**4000), "d_in is 1000.* … .*, expected a whole number"),
        (lambda f: change(f, architecture="x" * 3_000_000), "architecture 'xxx"),
        (lambda f: change_stats(f, density=torch.zeros(96, dtype=torch.complex64)), "density is complex64"),
        (lambda f: change_stats(f, max_act=torch.zeros(96, dtype=torch.int8)), "max_act is int8"),
        (lambda f: change_stats(f, p999=torch.zeros(96, dtype=torch.bool)), "p999 is bool"),
        (lambda f: change_stats(f, p999=torch.zeros(95)), r"p999 is float32 \(95,\)"),
        (lambda f: change_stats(f, density=torch.full((96,), math.nan)), "density is not finite"),
        (lambda f: change_stats(f, n_tokens="-5"), "n_tokens is -5"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, tiny_sae, damage, message):
    folder = tiny_sae.save(tmp_path / "sae")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        SAE.load(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(tmp_path)) + 50


def test_an_sae_of_another_architecture_or_shape_is_refused(tmp_path, tiny_sae):
    folder = tiny_sae.save(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"d_sae": 97}))
    with pytest.raises(UserError, match=r"W_enc is \(32, 96\), cfg.json says \(32, 97\)"):
        SAE.load(folder)
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": "temporal"}))
    with pytest.raises(UserError, match="'temporal' is not read"):
        SAE.load(folder)


def with_threshold(folder, value):
    """Another `threshold` in the weights; None takes it away."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors["threshold"]
    save_file(tensors | ({} if value is None else {"threshold": value}), folder / "sae_weights.safetensors")


def one_wrong(value):
    thresholds = torch.rand(96)
    thresholds[[7, 30]] = value
    return thresholds


@pytest.mark.parametrize(
    "threshold,message",
    [
        (None, "threshold is missing, cfg.json says"),
        (torch.rand(95), r"threshold is \(95,\), cfg.json says \(96,\)"),
        (torch.tensor(0.5), r"threshold is \(\), cfg.json says \(96,\)"),
        (one_wrong(float("-inf")), r"threshold\[7\] is -inf \(2 such\), expected finite numbers"),
        (one_wrong(float("nan")), r"threshold\[7\] is nan \(2 such\), expected finite numbers"),
    ],
)
def test_a_jumprelu_without_sound_thresholds_is_refused_in_one_line(tmp_path, threshold, message):
    folder = make_sae(architecture="jumprelu").save(tmp_path / "sae")
    with_threshold(folder, threshold)
    with pytest.raises(UserError, match=message) as caught:
        SAE.load(folder)
    assert "\n" not in str(caught.value)


def test_what_only_training_knows_and_a_topk_without_k_are_no_saes():
    with pytest.raises(UserError, match="batchtopk is how one is trained; finished, it is jumprelu"):
        SAE(SAEConfig("batchtopk", 4, 8))
    with pytest.raises(UserError, match="topk needs k"):
        SAE(SAEConfig("topk", 4, 8))
    with pytest.raises(UserError, match="'jumprelo' is not known .*[Dd]id you mean jumprelu"):
        SAE(SAEConfig("jumprelo", 4, 8))


def test_a_missing_path_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such SAE"):
        SAE.load(tmp_path / "nothing")


def test_statistics_round_trip(tmp_path):
    stats = FeatureStats(torch.rand(5), torch.rand(5), torch.rand(5), 1234)
    stats.save(tmp_path / "s.safetensors")
    again = FeatureStats.load(tmp_path / "s.safetensors")
    assert again.n_tokens == 1234 and torch.equal(again.p999, stats.p999)


def test_two_saes_of_one_seed_are_the_same():
    assert torch.equal(make_sae(seed=3).W_dec, make_sae(seed=3).W_dec)


def test_saving_replaces_an_sae_but_never_a_folder_of_something_else(tmp_path, tiny_sae):
    tiny_sae.save(tmp_path / "sae")
    make_sae(seed=1).save(tmp_path / "sae")
    assert torch.equal(SAE.load(tmp_path / "sae").W_dec, make_sae(seed=1).W_dec)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not ours to replace"):
        tiny_sae.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
