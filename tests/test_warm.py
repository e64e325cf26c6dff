"""A warm start begins as the SAE ends: codes, weights, what is frozen, what is refused, how it goes on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sae import cli, config, files
from sae.architectures import ARCHITECTURES, architecture
from sae.autoencoder import SAE, Metadata
from sae.errors import Stopped, UserError
from sae.export import export
from sae.host import Host
from sae.objectives import objective
from sae.plan import plan
from sae.run import train
from sae.training import checkpoint
from sae.training.optimizer import FROZEN
from sae.warm import begin_from, open_sae
from tests.conftest import make_sae
from tests.test_run import RECIPE
from tests.training.test_many import stop_after
from tests.training.test_training import planted, recipe

D, F, K = 24, 80, 4
MILD = {"jumprelu": {"l0_coefficient": 0.3}, "relu": {"l1_coefficient": 0.3}}  # 24 numbers bear no more
BEGINS = {
    "topk": ("topk", "batchtopk", "matryoshka", "jumprelu"),
    "jumprelu": ("topk", "batchtopk", "matryoshka", "jumprelu"),
    "relu": ("topk", "relu"),
}
PAIRS = [(name, to) for name, row in ARCHITECTURES.items() for to in BEGINS[row.inference]]


def of(out, name="topk", sae=None, **training):
    """A recipe on planted rows for one architecture."""
    made = recipe(out, **({"tokens": 20_000} | training))
    return replace(made, sae=replace(made.sae, architecture=name, **MILD.get(name, {}), **(sae or {})))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of a finished SAE of each architecture, trained on planted rows; read only."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ARCHITECTURES:
        train(of(folder / name, name), planted(2000)[0], progress=False)
    return {name: folder / name / "sae" for name in ARCHITECTURES}


def begun(sae, made, scale, low=False):
    """The parameters with which a run of this recipe would begin from the SAE, and its objective."""
    page = objective(made, 1.0, low=low)
    cold = page.begin(planted(300, d=sae.cfg.d_in)[0] * scale)
    return begin_from(cold, sae, made, scale, page.unit_norm), page


def expected(sae, name, x, k):
    """What the SAE's own pre-activations are under the rule of the architecture that begins from it."""
    pre = sae.pre_activations(x)
    if name == "topk":
        values, at = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter(1, at, values.relu())
    threshold = torch.zeros(()) if sae.threshold is None else sae.threshold
    return torch.where(pre > (threshold if name == "jumprelu" else threshold.mean()), pre, 0.0)


@pytest.mark.parametrize("name,to", PAIRS)
def test_a_run_begun_from_a_finished_sae_has_its_codes(finished, tmp_path, name, to):
    sae, x, scale = SAE.load(finished[name]), planted(500, seed=0)[0] + 0.1, 0.61
    params, page = begun(sae, of(tmp_path, to), scale)
    codes = page.encode(params, x * scale).dense() / scale
    torch.testing.assert_close(codes, expected(sae, to, x, K), rtol=1e-4, atol=1e-4)
    if name == to or (architecture(to).inference == sae.cfg.architecture and name != "jumprelu"):
        torch.testing.assert_close(codes, sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codes @ params.W_dec + params.b_dec / scale, sae.decode(codes), rtol=1e-4, atol=1e-4)


def test_a_jumprelu_s_mean_threshold_is_where_a_running_one_begins(finished, tmp_path):
    sae = SAE.load(finished["jumprelu"])
    for name in ("batchtopk", "matryoshka"):
        params, _ = begun(sae, of(tmp_path, name), 0.5)
        torch.testing.assert_close(params.ema_threshold, sae.threshold.mean() / 2)
        assert params.log_threshold is None and params.ema_threshold.dtype == torch.float32


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "relu"])
def test_no_step_at_all_gives_the_sae_back(finished, tmp_path, name):
    """JumpReLU in both of its kinds: the tanh form lets decoder norms free, the step form does not."""
    sae = SAE.load(finished[name])
    forms = ({}, {"jumprelu_sparsity_loss_mode": "step"}) if name == "jumprelu" else ({},)
    for form in forms:
        made = of(tmp_path, name, form)
        params, _ = begun(sae, made, 0.37)
        again = export(params, made.sae, Metadata(norm_factor=0.37))
        for weight in ("encoder", "W_dec", "b_enc", "b_dec"):
            torch.testing.assert_close(getattr(again, weight), getattr(sae, weight), rtol=2e-6, atol=1e-6, msg=weight)
        if name == "jumprelu":
            torch.testing.assert_close(again.threshold, sae.threshold, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("taken_off", [True, False])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
def test_b_dec_taken_off_the_input_or_not_makes_no_difference(tmp_path, kind, taken_off):
    """SAELens's own may do either; decoder rows of any norm are folded, as export would."""
    sae = make_sae(d_in=D, d_sae=F, k=K, architecture=kind, apply_b_dec_to_input=taken_off)
    norms = torch.rand(F, 1) * 3 + 0.1 if kind != "topk" else torch.ones(F, 1)
    sae.W_dec.mul_(norms)
    x = planted(400)[0] / 10
    step = {"jumprelu_sparsity_loss_mode": "step"}
    for name, form in [(name, {}) for name in BEGINS[kind]] + [("jumprelu", step)] * (kind != "relu"):
        params, page = begun(sae, of(tmp_path, name, form), 2.5)
        if params.ema_threshold is not None:
            continue  # a mean of thresholds that differ
        own = page.encode(params, x * 2.5).dense() / 2.5
        if page.unit_norm:
            torch.testing.assert_close(params.W_dec.norm(dim=1), torch.ones(F))
        if name == "topk" and kind != "topk":  # the k largest of what each adds
            own = own / norms.T
            assert ((own > 0).sum(1) == K).all()
            full = torch.where(own > 0, sae.pre_activations(x), 0.0)
        else:
            own = own / (norms.T if page.unit_norm else 1)
            full = expected(sae, name, x, K)
        torch.testing.assert_close(own, full, rtol=1e-4, atol=1e-4)


def test_a_feature_without_a_decoder_row_stays_silent_and_can_be_trained(tmp_path):
    sae = make_sae(d_in=D, d_sae=F, architecture="jumprelu")
    sae.W_dec[3] = 0
    for name in ("batchtopk", "jumprelu"):
        form = {"jumprelu_sparsity_loss_mode": "step"} if name == "jumprelu" else {}
        params, page = begun(sae, of(tmp_path, name, form), 1.0)
        torch.testing.assert_close(params.W_dec.norm(dim=1), torch.ones(F))
        assert (page.encode(params, planted(200)[0]).dense()[:, 3] == 0).all()
        assert all(weight.isfinite().all() for weight in vars(params).values() if weight is not None)


def test_the_copy_that_the_encoder_s_product_reads_is_of_the_sae_s_encoder(finished, tmp_path):
    sae = SAE.load(finished["topk"])
    params, _ = begun(sae, of(tmp_path), 0.5, low=True)
    assert torch.equal(params.encoder_low, params.encoder.to(torch.bfloat16))
    torch.testing.assert_close(params.encoder, sae.encoder.detach())


def test_a_warm_start_pays(finished, tmp_path):
    """Its first line is below a cold run's, and it notes which weights it began from."""
    x = planted(2000)[0]
    first = {}
    for name, folder in (("cold", None), ("warm", str(finished["topk"]))):
        train(of(tmp_path / name, init_from=folder, tokens=2_000), x, progress=False)
        first[name] = files.read_lines(tmp_path / name / "metrics.jsonl")[0]["losses/mse_loss"]
    assert first["warm"] < first["cold"] / 2
    noted = files.read_json(tmp_path / "warm" / "resolved.json")["init_from_sha256"]
    assert noted == files.checksum(finished["topk"] / "sae_weights.safetensors")
    assert "init_from_sha256" not in files.read_json(tmp_path / "cold" / "resolved.json")


def ended(out):
    """(tensors of a run's last checkpoint, its norm factor)."""
    folder = checkpoint.all_of(out)[-1]
    return load_file(folder / "training.safetensors"), files.read_json(folder / "training.json")["norm_factor"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu"])
def test_a_decoder_learns_alone_and_the_loss_falls(finished, tmp_path, name, dtype):
    """From a decoder that was blurred, with features dead; with an average and idle rows that are passed over too."""
    sae = SAE.load(finished["topk" if name == "matryoshka" else name])
    blur = 0.1 * torch.randn(F, D, generator=torch.Generator().manual_seed(1))
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec + blur, dim=1))
    given = {"init_from": str(sae.save(tmp_path / "sae")), "finetune": "decoder", "dtype": dtype, "dead_after": 300}
    lazy = {"adam_beta1": 0.0, "ema": 0.9} if name in ("topk", "jumprelu") else {"clip": 10.0}
    made = of(tmp_path / "run", name, **given, **lazy)
    train(made, planted(2000)[0], progress=False)
    after, scale = ended(tmp_path / "run")
    before, _ = begun(sae, made, scale)
    for weight in ("encoder", "b_enc", "log_threshold"):
        if (kept := getattr(before, weight)) is not None:
            assert torch.equal(after[weight], kept), weight
    assert not torch.equal(after["W_dec"], before.W_dec) and not torch.equal(after["b_dec"], before.b_dec)
    lines = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["losses/mse_loss"] for line in lines]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(line["losses/auxiliary_reconstruction_loss"] == 0 for line in lines)


@pytest.mark.parametrize("form", ["tanh", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_thresholds_learn_alone(finished, tmp_path, name, dtype, form):
    given = {"jumprelu_sparsity_loss_mode": form, "l0_coefficient": 0.3}
    made = of(tmp_path / "run", init_from=str(finished[name]), finetune="threshold", dtype=dtype)
    made = replace(made, sae=replace(made.sae, architecture="jumprelu", **given))
    train(made, planted(2000)[0], progress=False)
    after, scale = ended(tmp_path / "run")
    before, _ = begun(SAE.load(finished[name]), made, scale)
    for weight in ("encoder", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(after[weight], getattr(before, weight)), weight
    assert not torch.equal(after["log_threshold"], before.log_threshold)


@pytest.mark.parametrize("training", [{"finetune": "decoder", "dtype": "bfloat16"}, {"finetune": "all", "ema": 0.9}])
def test_a_resumed_run_needs_the_folder_no_more_and_ends_the_same_to_the_bit(tmp_path, monkeypatch, training):
    x = planted(2000)[0]
    folder = tmp_path / "sae"
    made = make_sae(d_in=D, d_sae=F, k=K, hook_name="mine")
    made.save(folder)
    given = {"init_from": str(folder)} | training
    whole = train(of(tmp_path / "whole", **given), x, progress=False)
    noted = files.read_json(tmp_path / "whole" / "resolved.json")["init_from_sha256"]
    undo = stop_after(monkeypatch, 33)
    with pytest.raises(Stopped):
        train(of(tmp_path / "run", **given), x, progress=False)
    undo()
    files.remove_folder(folder)
    resumed = train(of(tmp_path / "run", **given), x, progress=False, resume=True)
    for weight in ("W_dec", "encoder", "b_enc", "b_dec"):
        assert torch.equal(getattr(resumed, weight), getattr(whole, weight)), weight
    assert files.read_json(tmp_path / "run" / "resolved.json")["init_from_sha256"] == noted
    says = (
        "Set training.init_from"
        if training.get("finetune", "all") != "all"
        else "began with training.init_from = .*sae, now it is None"
    )
    with pytest.raises(UserError, match=says):
        train(of(tmp_path / "run", **training), x, progress=False, resume=True)


# ---- refusals --------------------------------------------------------------------------------------------


def saved(folder, change=None, **given):
    made = make_sae(**({"d_in": D, "d_sae": F, "k": K, "hook_name": "mine"} | given))
    if change is not None:
        change(made)
    return str(made.save(folder))


def without_threshold(sae):
    sae.threshold = None


def two_at_zero(sae):
    sae.threshold[[5, 17]] = 0


def long_rows(sae):
    sae.W_dec[7] *= 3


@pytest.mark.parametrize(
    "to,given,change,line",
    [
        ("topk", {"d_sae": 96}, None, "has 96 features, sae.d_sae is 80. Make them one."),
        ("topk", {"d_in": 32}, None, "was trained on width 32, this run's activations have 24. Give an SAE of its "
         "width."),
        ("topk", {"hook_name": "yours"}, None, "was trained at yours, this run reads mine. Set host.hook to its own."),
        ("jumprelu", {"architecture": "relu"}, None, "is relu, from which jumprelu cannot begin (topk, relu can). "
         "Choose another sae.architecture or SAE."),
        ("relu", {}, None, "is topk, from which relu cannot begin (topk, batchtopk, matryoshka, jumprelu can). "
         "Choose another sae.architecture or SAE."),
        ("matryoshka", {"architecture": "relu"}, None, "is relu, from which matryoshka cannot begin (topk, relu can). "
         "Choose another sae.architecture or SAE."),
        ("jumprelu", {}, without_threshold, "has no calibrated threshold for jumprelu to begin with. Begin batchtopk "
         "from it."),
        ("jumprelu", {"architecture": "jumprelu"}, two_at_zero, ": the thresholds of 2 features are not above 0 (5, "
         "17), and jumprelu trains their logarithms. Begin batchtopk or topk from it."),
        ("topk", {}, long_rows, "has decoder rows of norm 1 to 3: with norm 1, as topk trains them, it would choose "
         "other features. Begin batchtopk or jumprelu from it."),
    ],
)  # fmt: skip
def test_what_cannot_begin_is_one_line_and_nothing_is_written(tmp_path, to, given, change, line):
    folder = saved(tmp_path / "sae", change, **given)
    with pytest.raises(UserError) as caught:
        train(of(tmp_path / "run", to, init_from=folder), planted(500)[0], progress=False)
    assert str(caught.value) == f"training.init_from: {folder}{'' if line[0] == ':' else ' '}{line}"
    assert not (tmp_path / "run").exists()


def test_no_store_is_harvested_for_a_run_that_cannot_begin(tiny_host, tmp_path):
    given = RECIPE | {"out": str(tmp_path / "run"), "activations": {"store": str(tmp_path / "acts")}}
    made = config.build(given, "test", [f"training.init_from={saved(tmp_path / 'sae', d_sae=128, hook_name='')}"])
    with pytest.raises(UserError, match="was trained on width 24, this run's activations have 32"):
        train(made, host=tiny_host, progress=False)
    assert [one.name for one in tmp_path.iterdir()] == ["sae"]


def test_a_folder_that_is_not_there_or_no_sae_is_one_line(tmp_path):
    for folder, words in ((tmp_path / "no", "no: no such SAE"), (tmp_path, "not an SAE folder")):
        with pytest.raises(UserError, match=words):
            train(of(tmp_path / "run", init_from=str(folder)), planted(500)[0], progress=False)
    assert not (tmp_path / "run").exists()


def test_another_host_its_width_and_a_hook_it_has_not_are_refused_before_text_is_read(tmp_path):
    def canonical(name):
        if name == "blocks.9":
            raise UserError("no such hook")
        return f"canonical {name}"

    host = SimpleNamespace(fingerprint="aaaa", name="this", hook=canonical)
    wrong = {"host_fingerprint": "bbbb", "model_name": "that"}
    made = of(tmp_path / "run", init_from=saved(tmp_path / "a", **wrong))
    with pytest.raises(UserError, match=r"was trained on that \(bbbb\), this run's host is this \(aaaa\). Use its own"):
        open_sae(made, "canonical mine", host, None)
    made = of(tmp_path / "run", init_from=saved(tmp_path / "b", host_fingerprint="aaaa"))
    assert open_sae(made, "canonical mine", host, D).cfg.d_sae == F
    with pytest.raises(UserError, match="was trained at canonical mine, this run reads mine"):
        open_sae(made, "mine", host, D)
    with pytest.raises(UserError, match="was trained on width 24, this run's activations have 25"):
        open_sae(made, "canonical mine", host, 25)
    made = of(tmp_path / "run", init_from=saved(tmp_path / "c", hook_name="blocks.9"))
    with pytest.raises(UserError, match="was trained at blocks.9, this run reads canonical mine"):
        open_sae(made, "canonical mine", host, None)


@pytest.mark.parametrize(
    "given,line",
    [
        (["training.finetune=thresholds"], "command line: training.finetune is thresholds, expected one of all, "
         "threshold, decoder; did you mean threshold?"),
        (["training.finetune=threshold"], "r.yaml: training.finetune is threshold, and topk trains no threshold. "
         "Choose decoder, or begin jumprelu from that SAE."),
        (["training.finetune=decoder", "training.resample_every=1M"], "r.yaml: training.resample_every replaces "
         "encoder rows, and training.finetune is decoder. Leave one of the two out."),
    ],
)  # fmt: skip
def test_a_finetune_that_cannot_be_is_one_line(given, line):
    with pytest.raises(UserError) as caught:
        config.build({}, "r.yaml", given)
    assert str(caught.value) == line


def test_the_forecast_counts_the_copies_of_what_is_frozen(tiny_host, monkeypatch):
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    wide = ["sae.architecture=jumprelu", "sae.d_sae=100k"]
    begun = "training.init_from=somewhere"
    made = [config.build(RECIPE, "test", [*wide, begun, f"training.finetune={word}"]) for word in FROZEN]
    sizes = dict(zip(FROZEN, (plan([one])["facts"]["  weights and moments (MB)"] for one in made), strict=True))
    matrix = 4 * 100_000 * 32 / 1e6
    assert sizes["decoder"] - sizes["all"] == pytest.approx(matrix, abs=0.2)
    assert sizes["threshold"] - sizes["all"] == pytest.approx(2 * matrix, abs=0.2)


# ---- the command line ------------------------------------------------------------------------------------


def test_the_command_line_goes_on_from_an_sae(tiny_host, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    small = {"training": RECIPE["training"] | {"tokens": 20_000}, "evaluation": {"tokens": 500, "ce_tokens": 0}}
    files.write_json(tmp_path / "recipe.json", RECIPE | small)
    words = ["train", str(tmp_path / "recipe.json"), "--out"]
    assert cli.main([*words, str(tmp_path / "first")]) in (0, None)
    warm = [f"training.init_from={tmp_path / 'first' / 'sae'}", "training.finetune=decoder"]
    assert cli.main([*words, str(tmp_path / "second"), *warm]) in (0, None)
    first, second = SAE.load(tmp_path / "first" / "sae"), SAE.load(tmp_path / "second" / "sae")
    torch.testing.assert_close(second.encoder, first.encoder)
    assert not torch.allclose(second.W_dec, first.W_dec, atol=1e-3)
    loss = [files.read_lines(tmp_path / run / "metrics.jsonl")[0]["losses/mse_loss"] for run in ("first", "second")]
    assert loss[1] < loss[0]
    fvu = [sae.cfg.metadata.evaluation["fvu"]["value"] for sae in (first, second)]
    assert fvu[1] < fvu[0]
