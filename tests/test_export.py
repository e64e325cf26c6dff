"""Export: the finished SAE says in raw units what training said in normed ones."""

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.autoencoder import Metadata
from sae.export import calibrate, export
from sae.objectives import Params
from sae.recipe import SAERecipe

SCALE, D, F = 0.37, 24, 101


def trained(unit, threshold, seed=0):
    """Parameters in normed units, decoder rows of norm 1 or of any norm."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(F, D, generator=g)
    rows /= rows.norm(dim=1, keepdim=True)
    if not unit:
        rows *= torch.rand(F, 1, generator=g) * 3 + 0.1
    return Params(
        torch.randn(F, D, generator=g) / 5,
        rows,
        torch.randn(F, generator=g) / 10,
        torch.randn(D, generator=g),
        log_threshold=torch.randn(F, generator=g) - 1 if threshold else None,
    )


# TopK ranks pre-activations, which folding would reorder: it is trained with unit rows.
CASES = [(name, True) for name in ARCHITECTURES] + [(name, False) for name in ARCHITECTURES if name != "topk"]


@pytest.mark.parametrize("name,unit", CASES)
def test_codes_are_training_s_over_the_scale_times_the_decoder_norms(name, unit):
    row = ARCHITECTURES[name]
    p = trained(unit, threshold=name == "jumprelu")
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(1)) * 4 + 1
    seen = x * SCALE
    pre = (seen - p.b_dec if row.subtracts_b_dec else seen) @ p.encoder.T + p.b_enc
    if row.selection == "topk":
        values, at = pre.topk(7)
        f = torch.zeros_like(pre).scatter(1, at, values.relu())
    elif p.log_threshold is not None:
        f = pre * (pre > p.log_threshold.exp())
    else:
        f = pre.relu()
    made = f @ p.W_dec + p.b_dec

    sae = export(p, SAERecipe(architecture=name, d_sae=F, k=7), Metadata(norm_factor=SCALE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(sae.encode(x), f * p.W_dec.norm(dim=1) / SCALE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), made / SCALE, rtol=1e-4, atol=1e-4)
    assert (sae.cfg.architecture, sae.cfg.apply_b_dec_to_input) == (row.inference, row.subtracts_b_dec)
    assert sae.cfg.k == (7 if name == "topk" else None)


def test_a_feature_without_a_decoder_row_never_fires_and_leaves_no_nan():
    p = trained(unit=False, threshold=True)
    p.W_dec[3] = 0
    sae = export(p, SAERecipe(architecture="jumprelu", d_sae=F), Metadata(norm_factor=SCALE))
    acts = sae.encode(torch.randn(500, D) * 50)
    assert (acts[:, 3] == 0).all() and sae.W_dec.isfinite().all() and (acts > 0).any()


def test_a_calibrated_threshold_lets_k_features_through_and_notes_the_running_one():
    p = trained(unit=True, threshold=False)
    sae = export(p, SAERecipe(architecture="batchtopk", d_sae=F, k=5), Metadata(norm_factor=SCALE))
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(2)) * 4
    calibrate(sae, x, 5, 2.5, "held-out rows")
    assert (sae.encode(x) > 0).sum() == 5 * 400
    noted = sae.cfg.metadata.calibration
    assert noted["l0"] == 5 and noted["k"] == 5 and noted["tokens"] == 400 and noted["rows"] == "held-out rows"
    assert noted["threshold"] == pytest.approx(float(sae.threshold[0])) and noted["ema_threshold"] == 2.5
    assert noted["ema_l0"] == pytest.approx(float((sae.pre_activations(x) > 2.5).sum() / 400))


def test_an_unset_running_threshold_is_noted_as_none():
    sae = export(trained(True, False), SAERecipe(architecture="batchtopk", d_sae=F, k=5), Metadata())
    calibrate(sae, torch.randn(50, D), 5, None, "training rows")
    assert sae.cfg.metadata.calibration["ema_threshold"] is None and sae.cfg.metadata.calibration["ema_l0"] is None
