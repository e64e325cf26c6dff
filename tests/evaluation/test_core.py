"""The oracle table of methods.md §1.14, the float64 twin, and the shape of the report."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sae import codes
from sae.errors import UserError
from sae.evaluation.core import _spread, evaluate, headline, quick
from sae.evaluation.intervals import ClusterSums, ratio, wilson
from sae.evaluation.reconstruction import Reconstruction
from sae.text import Rows
from tests.conftest import make_sae, make_tiny_host
from tests.reference import core as reference

HOOK = "blocks.2.hook_resid_post"


class Linear:
    """Stand-in SAE that rebuilds scale·x + shift; its features are each axis' positive and negative part."""

    def __init__(self, d=32, scale=1.0, shift=0.0, outlier_norm=None):
        metadata = SimpleNamespace(hook_name=HOOK, outlier_norm=outlier_norm, model_name="tiny-llama")
        self.cfg = SimpleNamespace(architecture="linear", k=None, d_in=d, d_sae=2 * d, metadata=metadata)
        self.scale, self.shift = scale, shift

    def encode_sparse(self, x):
        return codes.from_dense(torch.cat([x.relu(), (-x).relu()], 1))

    def decode(self, found, x=None):
        positive, negative = found.dense().chunk(2, 1)
        return self.scale * (positive - negative) + self.shift


def draw_documents(lengths=(9, 17, 5, 12, 20, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(100, 40_000, (n,), generator=generator) for n in lengths]


def pack_rows(documents, layout, T=24, ids=None):
    """Rows whose documents are at the left, at the right, or several to a row."""
    rows = [[i] for i in range(len(documents))]
    if layout == "packed":
        rows = []
        for i in range(len(documents)):
            if rows and sum(len(documents[j]) for j in rows[-1]) + len(documents[i]) <= T:
                rows[-1].append(i)
            else:
                rows.append([i])
    R = len(rows)
    tokens, pos = torch.full((R, T), 2, dtype=torch.int32), torch.zeros(R, T, dtype=torch.int32)
    doc, mask = torch.full((R, T), -1, dtype=torch.int32), torch.zeros(R, T, dtype=torch.bool)
    for r, members in enumerate(rows):
        at = T - sum(len(documents[i]) for i in members) if layout == "right" else 0
        for i in members:
            end = at + len(documents[i])
            tokens[r, at:end] = documents[i].int()
            pos[r, at:end] = torch.arange(end - at, dtype=torch.int32)
            doc[r, at:end] = i if ids is None else ids[i]
            mask[r, at + 1 : end] = True
            at = end
    return Rows(tokens, doc, pos, mask)


def figures(report):
    ours = report["eval_result_unstructured"]["goldengate"]
    return {name: one["value"] for name, one in ours.items() if isinstance(one, dict) and "value" in one}


def run(sae, host, rows, **options):
    return figures(evaluate(sae, host, [rows], **{"tokens": 10**6, "ce_tokens": 10**6, **options}))


def reconstruct(sae, x, clusters=None, splits=1):
    clusters = torch.arange(len(x)) % 50 if clusters is None else clusters
    found = Reconstruction(int(clusters.max()) + 1, sae.cfg.d_sae)
    for at in torch.arange(len(x)).chunk(splits):
        active = sae.encode_sparse(x[at])
        found.add(x[at], sae.decode(active), active, clusters[at], torch.arange(len(at)))
    return found


def normal(N=400, d=6, seed=0):
    return torch.randn(N, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_an_identity_sae_loses_nothing(tiny_host):
    found = run(Linear(), tiny_host, pack_rows(draw_documents(), "packed"))
    assert found["fvu"] == 0 and found["explained_variance"] == 1
    assert found["cossim"] == pytest.approx(1, abs=1e-12)
    assert found["cossim_centred"] == pytest.approx(1, abs=1e-12)
    assert found["relative_reconstruction_bias"] == 1 and found["l2_ratio"] == 1
    assert found["ce_delta"] == 0 and found["kl"] == 0
    assert found["recovered_zero"] == 1 and found["recovered_mean"] == 1 and found["kl_div_score"] == 1


def test_predicting_the_mean_has_fvu_one_and_recovers_nothing(tiny_host):
    rows = pack_rows(draw_documents(), "packed")
    x = tiny_host.activations(rows.tokens, [HOOK], pos=rows.pos, doc=rows.doc)[HOOK][rows.mask]
    mean = x.double().mean(0).float()
    found = run(Linear(scale=0.0, shift=mean), tiny_host, rows, mean=mean)
    assert found["fvu"] == pytest.approx(1, abs=1e-9)
    assert found["cossim_centred"] == pytest.approx(0, abs=1e-6)
    assert found["recovered_mean"] == 0
    without = run(Linear(scale=0.0, shift=mean), tiny_host, rows)
    assert without["recovered_mean"] == pytest.approx(0, abs=1e-5)  # the same mean, found by the evaluation


def test_shrinking_centred_data_by_alpha():
    x, alpha = normal(), 0.7
    x = x - x.mean(0)
    found = reconstruct(Linear(d=6, scale=alpha), x).metrics()
    assert found["fvu"].value == pytest.approx((1 - alpha) ** 2, abs=1e-12)
    assert found["relative_reconstruction_bias"].value == pytest.approx(alpha, abs=1e-12)
    assert found["l2_ratio"].value == pytest.approx(alpha, abs=1e-12)


def test_a_common_constant_changes_no_centred_figure():
    x, c = normal(), 1000.0
    near = reconstruct(Linear(d=6, scale=0.8), x).metrics()
    far = reconstruct(Linear(d=6, scale=0.8, shift=0.2 * c), x + c).metrics()
    for name in ("fvu", "explained_variance", "mse", "cossim_centred"):
        assert far[name].value == pytest.approx(near[name].value, abs=1e-7)
    bias = "relative_reconstruction_bias"  # about the origin, so it must change
    assert near[bias].value == pytest.approx(0.8) and far[bias].value > 0.999


def test_figures_and_intervals_do_not_depend_on_batches():
    sae, x = make_sae(d_in=6, d_sae=20, k=3), normal()
    one = reconstruct(sae, x).metrics()
    for splits in (7, 100):
        many = reconstruct(sae, x, splits=splits)
        assert torch.equal(many.fired, reconstruct(sae, x).fired)
        for name, figure in many.metrics().items():
            assert figure.value == pytest.approx(one[name].value, rel=1e-12), name
            assert figure.low == pytest.approx(one[name].low, rel=1e-12), name


def test_evaluate_does_not_depend_on_how_rows_arrive(tiny_host, tiny_sae):
    rows = pack_rows(draw_documents(), "left")
    parts = [Rows(*(t[i : i + 2] for t in (rows.tokens, rows.doc, rows.pos, rows.mask))) for i in (0, 2, 4)]
    whole = evaluate(tiny_sae, tiny_host, [rows], tokens=40, ce_tokens=20)
    assert figures(whole) == figures(evaluate(tiny_sae, tiny_host, parts, tokens=40, ce_tokens=20))


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_padding_and_packing_change_nothing(tiny_host, tiny_sae, layout):
    documents = draw_documents()
    alone = run(tiny_sae, tiny_host, pack_rows(documents, "left"))
    other = run(tiny_sae, tiny_host, pack_rows(documents, layout))
    for name in ("fvu", "l0", "cossim", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl", "kl_zero"):
        assert other[name] == pytest.approx(alone[name], rel=2e-6), name


def test_a_position_of_outlying_norm_is_left_out_and_kept_in_the_forward(tokenizer, tiny_sae):
    host, documents = make_tiny_host(tokenizer), draw_documents()
    documents[1][6] = 77
    with torch.no_grad():
        host.model.get_input_embeddings().weight[77] *= 3000
    rows = pack_rows(documents, "packed")
    x = host.activations(rows.tokens, [HOOK], pos=rows.pos, doc=rows.doc)[HOOK].norm(dim=-1)
    here = rows.tokens == 77
    limit = float(x[rows.mask & ~here].max()) * 2
    assert float(x[here]) > limit
    metadata = replace(tiny_sae.cfg.metadata, outlier_norm=limit)
    limited = make_sae(hook_name=HOOK)
    limited.cfg = replace(tiny_sae.cfg, metadata=metadata)
    by_norm = evaluate(limited, host, [rows], tokens=10**6, ce_tokens=0)
    by_text = run(tiny_sae, host, replace(rows, mask=rows.mask & ~here), ce_tokens=0)
    assert figures(by_norm)["fvu"] == by_text["fvu"]
    assert by_norm["eval_result_unstructured"]["goldengate"]["masked"]["outlier_norm"]["positions"] == 1
    assert run(tiny_sae, host, rows, ce_tokens=0)["fvu"] != pytest.approx(by_text["fvu"], rel=0.1)


@pytest.mark.parametrize("share", [None, 0.7])
def test_every_figure_equals_its_float64_twin(tiny_host, tiny_sae, share):
    documents = draw_documents()
    rows = pack_rows(documents, "packed")
    x = tiny_host.activations(rows.tokens, [HOOK], pos=rows.pos, doc=rows.doc)[HOOK][rows.mask]
    limit = None if share is None else float(x.norm(dim=1).quantile(share))
    tiny_sae.cfg = replace(tiny_sae.cfg, metadata=replace(tiny_sae.cfg.metadata, outlier_norm=limit))
    mean = x.mean(0)
    found = run(tiny_sae, tiny_host, rows, mean=mean)
    masks = [torch.arange(len(document)) > 0 for document in documents]
    layer = tiny_host.model.model.layers[2]
    x, expected = reference.losses(
        tiny_host.model, layer, tiny_sae, list(zip(documents, masks, strict=True)), mean, limit
    )
    acts = tiny_sae.encode_sparse(x)
    expected |= reference.reconstruction(x, tiny_sae.decode(acts), acts.dense(), tiny_sae.W_dec.norm(dim=1))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_repeated_documents_change_neither_value_nor_clustered_interval():
    sae, x = make_sae(d_in=6, d_sae=20, k=3), normal()
    clusters = torch.arange(len(x)) // 8
    once = reconstruct(sae, x, clusters).metrics()
    again = reconstruct(sae, x.repeat(4, 1), clusters.repeat(4)).metrics()
    apart = reconstruct(sae, x.repeat(4, 1), torch.arange(4 * len(x)) // 8).metrics()
    for name in ("fvu", "l0", "cossim"):
        assert again[name].value == pytest.approx(once[name].value, rel=1e-12)
    assert again["fvu"].low == pytest.approx(once["fvu"].low, rel=1e-9)
    assert again["fvu"].high == pytest.approx(once["fvu"].high, rel=1e-9)
    naive = (apart["fvu"].high - apart["fvu"].low) / (once["fvu"].high - once["fvu"].low)
    assert naive == pytest.approx(1 / math.sqrt(4), rel=0.15)


@pytest.mark.parametrize("n_clusters", [8, 60])
def test_the_interval_covers_the_truth_about_95_times_in_100(n_clusters):
    generator, covered, trials = torch.Generator().manual_seed(1), 0, 300
    for _ in range(trials):
        sums = ClusterSums(n_clusters)
        each = torch.randn(n_clusters, 1, generator=generator) + torch.randn(n_clusters, 9, generator=generator)
        sums.add(torch.arange(n_clusters).repeat_interleave(9), n=torch.ones(9 * n_clusters), u=each.flatten())
        found = sums.estimates().of(ratio("u"))
        covered += found.low < 0 < found.high
    assert 0.90 < covered / trials < 0.985  # a percentile bootstrap of 60 clusters runs a little short of 95 %


def test_the_linearised_error_of_a_ratio_is_the_textbook_one():
    u, v = torch.rand(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 1
    sums = ClusterSums(12)
    sums.add(torch.arange(12), n=torch.ones(12), u=u, v=v)
    R = u.sum() / v.sum()
    expected = math.sqrt(12 / 11 * float(((u - R * v) ** 2).sum()) / float(v.sum()) ** 2)
    assert sums.estimates().linearised_error(ratio("u", "v")) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_and_linearised_error_agree():
    sae, x = make_sae(d_in=6, d_sae=20, k=3), normal(2000)
    estimates = reconstruct(sae, x).sums.estimates()
    from sae.evaluation.reconstruction import STATISTICS

    for name in ("fvu", "cossim_centred", "relative_reconstruction_bias"):
        found = estimates.of(STATISTICS[name])
        half = 1.96 * estimates.linearised_error(STATISTICS[name])
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15), name


def test_wilson_gives_the_published_values():
    assert wilson(50, 100).low == pytest.approx(0.4038, abs=1e-4)
    assert wilson(50, 100).high == pytest.approx(0.5962, abs=1e-4)
    assert wilson(0, 100).low == 0 and wilson(0, 100).high == pytest.approx(0.0370, abs=1e-4)


def test_the_report_has_saebench_names_and_is_json(tiny_host, tiny_sae):
    rows = pack_rows(draw_documents(), "packed")
    groups = ["a", "b", "c", "a", "b", "c"]
    report = evaluate(
        tiny_sae, tiny_host, [rows], tokens=10**6, ce_tokens=30, groups=groups, details=True, noise_draws=1
    )
    assert report["eval_type_id"] == "core"
    names = {
        "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
        "model_performance_preservation": "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
        "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
        "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
        "sparsity": "l0 l1",
        "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
        "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
        "normalized_freq_over_10_percent average_max_encoder_cosine_sim average_max_decoder_cosine_sim "
        "frac_alive",
    }
    for category, expected in names.items():
        for name in expected.split():
            assert isinstance(report["eval_result_metrics"][category][name], int | float), name
    detail = (
        "index feature_density consistent_activation_heuristic encoder_bias encoder_norm "
        "encoder_decoder_cosine_sim max_decoder_cosine_sim max_encoder_cosine_sim"
    )
    assert len(report["eval_result_details"]) == tiny_sae.cfg.d_sae
    assert set(report["eval_result_details"][0]) == set(detail.split())
    json.dumps(report, allow_nan=False)

    ours = report["eval_result_unstructured"]["goldengate"]
    for name in ("fvu", "l0", "ce_delta", "recovered_mean", "kl"):
        assert ours[name]["low"] <= ours[name]["value"] <= ours[name]["high"], name
    assert ours["fvu"]["clusters"] == 3 >= ours["kl"]["clusters"]
    assert ours["kl"]["tokens"] < ours["fvu"]["tokens"] == int(rows.mask.sum())
    assert ours["fvu"]["documents"] == 6
    assert sum(one["share"] for one in ours["masked"].values()) == pytest.approx(1)
    histogram = ours["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never"] == tiny_sae.cfg.d_sae
    assert ours["kl_error_ratio"]["value"] > 0
    assert "evaluated positions" in ours["notes"]["mean_ablation"]
    top = headline(report)
    assert {"fvu", "l0", "dead_frac", "ce_delta", "recovered_mean", "recovered_zero", "kl"} <= set(top)
    assert set(top["fvu"]) == {"value", "low", "high", "n"}


def test_a_matryoshka_sae_has_an_fvu_for_each_prefix_of_its_features(tiny_host):
    rows = pack_rows(draw_documents(), "packed")
    calibration = {"threshold": 1.5, "k": 6}
    about = {"hook_name": HOOK, "matryoshka_widths": [17, 40, 96], "calibration": calibration}
    sae = make_sae(architecture="jumprelu", **about)
    report = evaluate(sae, tiny_host, [rows], tokens=10**6, ce_tokens=0)
    x = tiny_host.activations(rows.tokens, [HOOK], pos=rows.pos, doc=rows.doc)[HOOK][rows.mask].double()
    acts, variance = sae.encode(x.float()), (x - x.mean(0)).square().sum()
    ours = report["eval_result_unstructured"]["goldengate"]
    assert list(ours["fvu_by_width"]) == ["17", "40", "96"] and ours["calibration"] == calibration
    for width, figure in ours["fvu_by_width"].items():
        first = acts * (torch.arange(96) < int(width))
        expected = float((sae.decode(first).double() - x).square().sum() / variance)
        assert figure["value"] == pytest.approx(expected, rel=1e-5) and figure["low"] < expected < figure["high"]
        assert headline(report)[f"fvu_{width}"]["value"] == figure["value"]
    assert ours["fvu_by_width"]["96"]["value"] == pytest.approx(ours["fvu"]["value"])
    assert report["eval_config"]["selection"] == "jumprelu, by threshold"


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_a_threshold_sae_is_evaluated_by_its_own_rule(tiny_host, name):
    rows = pack_rows(draw_documents(), "left")
    sae = make_sae(architecture=name, hook_name=HOOK, apply_b_dec_to_input=False)
    x = tiny_host.activations(rows.tokens, [HOOK], pos=rows.pos, doc=rows.doc)[HOOK][rows.mask]
    found = run(sae, tiny_host, rows)
    assert found["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()))
    miss, spread = (sae(x) - x).square().sum(), (x - x.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(miss / spread), rel=1e-4)


def test_progress_ends_at_its_total(tiny_host, tiny_sae):
    told = []
    rows = pack_rows(draw_documents(), "left")
    evaluate(tiny_sae, tiny_host, [rows], tokens=60, ce_tokens=20, progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] and [at[0] for at in told] == sorted(at[0] for at in told)


def test_rows_for_cross_entropy_are_spread_over_the_text():
    valid = torch.full((100,), 50)
    chosen = _spread(valid, 1000).nonzero().flatten()
    assert len(chosen) == 20 and chosen[0] == 0 and chosen[-1] >= 90
    assert int(_spread(valid, 0).sum()) == 0 and int(_spread(valid, 10**9).sum()) == 100


def test_without_valid_text_it_says_so(tiny_host, tiny_sae):
    rows = pack_rows(draw_documents(), "left")
    with pytest.raises(UserError, match="no valid token"):
        evaluate(tiny_sae, tiny_host, [replace(rows, mask=torch.zeros_like(rows.mask))])
    with pytest.raises(UserError, match="no valid token"):
        evaluate(tiny_sae, tiny_host, [])


def test_an_sae_of_another_width_is_refused(tiny_host):
    with pytest.raises(UserError, match="width 16"):
        evaluate(make_sae(d_in=16, hook_name=HOOK), tiny_host, [pack_rows(draw_documents(), "left")])


def test_quick_agrees_with_the_full_figures():
    sae, x = make_sae(d_in=6, d_sae=20, k=3), normal()
    full = reconstruct(sae, x).metrics()
    for given in (sae, (sae.encode_sparse, sae.decode)):
        found = quick(given, x, chunk=37)
        assert found["fvu"] == pytest.approx(full["fvu"].value, rel=1e-9)
        assert found["l0"] == pytest.approx(full["l0"].value)
