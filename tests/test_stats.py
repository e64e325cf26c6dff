"""Feature statistics against a brute force over dense activations, and the calibrated threshold."""

import pytest
import torch

from sae.codes import from_dense
from sae.errors import UserError
from sae.stats import BINS, PER_OCTAVE, calibrate_threshold, measure
from tests.conftest import make_sae


class Given:
    """A stand-in whose input already is its dense activations."""

    def __init__(self, F):
        self.cfg = type("Config", (), {"d_sae": F})

    def encode_sparse(self, x):
        return from_dense(x)


def skewed(N=5000, F=7, seed=0):
    """Activations over many octaves, features of different scale and density; the last one never fires."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(N, F, generator=generator).mul(0.8).exp() * torch.logspace(-3, 3, F)
    fires = torch.rand(N, F, generator=generator) < torch.linspace(0.9, 0.001, F)
    fires[:, -1] = False
    return acts * fires


def test_maximum_density_and_percentile_equal_a_brute_force():
    acts = skewed()
    found = measure(Given(7), acts.split(311))
    assert found.n_tokens == 5000
    assert torch.equal(found.max_act, acts.amax(0))
    assert torch.allclose(found.density, (acts > 0).float().mean(0))
    for i in range(6):
        fired = acts[acts[:, i] > 0, i].sort().values
        exact = fired[-(-len(fired) * 999 // 1000) - 1]
        assert float(found.p999[i] / exact) == pytest.approx(1, abs=2 ** (1 / PER_OCTAVE) - 1)
    assert found.max_act[6] == found.density[6] == found.p999[6] == 0


def test_statistics_do_not_depend_on_batches_even_when_the_maximum_grows():
    acts = skewed().sort(0).values  # every batch exceeds the one before
    one, many = measure(Given(7), [acts]), measure(Given(7), acts.split(13))
    for name in ("max_act", "density", "p999"):
        assert torch.equal(getattr(one, name), getattr(many, name)), name


def test_a_rare_feature_has_its_maximum_as_percentile():
    acts = torch.zeros(500, 2)
    acts[3, 0], acts[4, 0] = 0.25, 4e6  # further apart than the histogram is wide
    found = measure(Given(2), [acts])
    assert 2 ** (BINS / PER_OCTAVE) < 4e6 / 0.25
    assert found.p999[0] == found.max_act[0] == 4e6


def test_it_stops_at_max_tokens_and_tells_progress():
    told = []
    found = measure(Given(7), skewed().split(300), max_tokens=1000, progress=told.append)
    assert found.n_tokens == sum(told) == 1000


def test_without_a_token_it_says_so():
    with pytest.raises(UserError, match="no valid token"):
        measure(Given(7), [])
    with pytest.raises(UserError, match="no valid token"):
        calibrate_threshold(make_sae(), [])


def test_real_codes_are_measured_from_the_sae():
    sae = make_sae(d_in=24, d_sae=101, k=5)
    x = torch.randn(300, 24)
    found, acts = measure(sae, x.split(37)), sae.encode(x)
    assert torch.allclose(found.max_act, acts.amax(0), rtol=1e-5)
    assert torch.allclose(found.density, (acts > 0).float().mean(0))


@pytest.mark.parametrize("skew", [1.0, 30.0])
def test_the_threshold_selects_k_features_on_average(skew):
    sae = make_sae(d_in=24, d_sae=101, k=5)
    x = torch.randn(333, 24)
    x[:20] *= skew  # a few tokens that take far more than k features each
    threshold = calibrate_threshold(sae, x.split(50))
    chosen = (sae.pre_activations(x) > threshold).sum()
    assert abs(int(chosen) - 333 * 5) <= 1  # one where a product rounds otherwise in another chunk


def test_a_threshold_sae_is_told_its_k():
    sae = make_sae(d_in=24, d_sae=101, architecture="jumprelu")
    x = torch.randn(333, 24)
    sae.threshold = torch.full((101,), calibrate_threshold(sae, x.split(50), 7))
    assert abs(int((sae.encode(x) > 0).sum()) - 333 * 7) <= 1
    found, acts = measure(sae, x.split(37)), sae.encode(x)
    assert torch.allclose(found.max_act, acts.amax(0), rtol=1e-5)
    assert torch.allclose(found.density, (acts > 0).float().mean(0))


def test_the_threshold_is_never_negative():
    sae = make_sae(d_in=24, d_sae=101, k=90)
    assert calibrate_threshold(sae, [torch.randn(50, 24)]) == 0.0
