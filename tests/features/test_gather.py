"""Lists, samples and sums of a pass equal brute force, whatever the blocks and whenever lists are merged."""

import pytest
import torch

from sae.features import gather
from sae.features.gather import BANDS, PER_BAND, SAMPLED, TOKENS, Gather
from sae.features.pool import Entries, strongest

F, ROWS, PER_DOCUMENT = 12, 6000, 40


def entries(seed: int = 0, features: int = F, rows: int = ROWS, share: float = 0.3) -> Entries:
    """Exponential strengths at random (row, feature); some equal ones, so that ties occur."""
    generator = torch.Generator().manual_seed(seed)
    row, feature = (torch.rand(rows, features, generator=generator) < share).nonzero(as_tuple=True)
    act = torch.empty(len(row)).exponential_(1.0, generator=generator).add_(0.01)
    act[::7] = act[0]
    token = torch.randint(0, 30, (rows,), generator=generator)[row]
    return Entries(feature, row, act, row // PER_DOCUMENT, token)


def gathered(whole: Entries, sizes, features: int = F) -> Gather:
    made, start = Gather(features), 0
    for end in [*torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist(), ROWS]:
        part = whole[((whole.row >= start) & (whole.row < end)).nonzero().flatten()]
        made.add(part, strongest(part, features))
        start = end
    made.close_part()
    return made


@pytest.mark.parametrize("sizes", [(), (400,), (40,) * 60, (1, 2, 3, 5000)], ids=["one", "two", "many", "odd"])
@pytest.mark.parametrize("waiting", [0, 100, 1 << 20])
@pytest.mark.parametrize("slice", [5, 1 << 14])
def test_the_strongest_are_one_a_document_the_earlier_among_equals(monkeypatch, sizes, waiting, slice):
    monkeypatch.setattr(gather, "_WAITING", waiting)
    monkeypatch.setattr(gather, "SLICE", slice)
    whole = entries()
    found = gathered(whole, sizes).examples()
    for feature in range(F):
        own = (whole.feature == feature).nonzero().flatten().tolist()
        best: dict[int, tuple[float, int]] = {}
        for i in own:
            document, one = int(whole.document[i]), (float(whole.act[i]), -int(whole.row[i]))
            best[document] = max(best.get(document, one), one)
        expected = sorted(best.values(), reverse=True)[:20]
        start, end = found["offsets"][feature : feature + 2].tolist()
        top = [i for i in range(start, end) if found["kind"][i] == 0]
        assert [(float(found["act"][i]), -int(found["row"][i])) for i in top] == expected


def test_samples_do_not_depend_on_blocks_or_merges(monkeypatch):
    whole = entries()
    one = gathered(whole, ()).examples()
    monkeypatch.setattr(gather, "_WAITING", 50)
    monkeypatch.setattr(gather, "SLICE", 12)
    two = gathered(whole, (40,) * 60).examples()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_band_has_up_to_five_of_its_own_tokens_and_the_uniform_sample_fifty():
    """A band whose edges cut the bins may have fewer than five of more."""
    whole, full = entries(), []
    made = gathered(whole, (40,) * 30)
    found = made.examples()
    for feature in range(F):
        start, end = found["offsets"][feature : feature + 2].tolist()
        kinds, acts = found["kind"][start:end], found["act"][start:end]
        own = whole.act[whole.feature == feature]
        for band in range(BANDS):
            share = acts[kinds == band + 1] / own.max() * BANDS
            inside = ((own / own.max() * BANDS).floor().clamp(max=BANDS - 1) == band).sum()
            assert min(2, int(inside)) <= len(share) <= PER_BAND
            full.append(len(share) == min(PER_BAND, int(inside)))
            assert bool(((share.floor().clamp(max=BANDS - 1)) == band).all())
            rows = found["row"][start:end][kinds == band + 1]
            assert len(rows.unique()) == len(rows)
        assert int((kinds == BANDS + 1).sum()) == min(SAMPLED, len(own))
    assert sum(full) > 0.9 * len(full)


def test_bands_are_exact_where_a_feature_fires_rarely():
    whole = entries(2, F, ROWS, 0.004)
    found = gathered(whole, (400,)).stats(ROWS)
    counts = torch.bincount(whole.feature, minlength=F)
    assert int(counts.min()) > 0 and int(counts.max()) <= SAMPLED
    for feature in range(F):
        own = whole.act[whole.feature == feature]
        exact = torch.bincount((own / own.max() * BANDS).floor().clamp(max=BANDS - 1).long(), minlength=BANDS)
        assert found["bands"][feature].tolist() == exact.tolist()


def test_the_uniform_sample_is_uniform_over_the_text():
    """Mean place of 50 of each of 200 features: 0.5 with a standard error of 0.003; a fair share in each quarter."""
    features = 200
    whole = entries(1, features, ROWS, 0.1)
    found = gathered(whole, (500,) * 8, features).examples()
    place = found["row"][found["kind"] == BANDS + 1] / ROWS
    assert len(place) == features * SAMPLED
    assert abs(float(place.mean()) - 0.5) < 0.012
    quarters = torch.histc(place, 4, 0, 1) / len(place)
    assert bool(((quarters - 0.25).abs() < 0.02).all())


def test_token_masses_are_sums_of_activation():
    whole = entries()
    found = gathered(whole, (40,) * 30).top_tokens(5)
    for feature in range(F):
        own = whole.feature == feature
        mass = torch.zeros(30).index_add_(0, whole.token[own], whole.act[own])
        best = mass.topk(5)
        assert found["token"][feature].tolist() == best.indices.tolist()
        assert torch.allclose(found["mass"][feature], best.values, rtol=1e-5)
        counts = torch.bincount(whole.token[own], minlength=30)
        assert found["firing"][feature].tolist() == counts[best.indices].tolist()


def test_heavy_tokens_survive_where_a_feature_fires_on_more_than_are_kept(monkeypatch):
    monkeypatch.setattr(gather, "_PENDING", 10)
    n = 20 * TOKENS
    rows = torch.arange(4 * n)
    token = torch.where(rows % 2 == 0, rows % 8, 8 + rows % n)  # 0, 2, 4, 6 have half of all rows
    act = torch.where(rows % 2 == 0, 5.0, 0.1)
    made = Gather(1)
    for part in rows.split(200):
        one = Entries(torch.zeros_like(part), part, act[part], part // 40, token[part])
        made.add(one, strongest(one, 1))
        made.close_part()
    assert len(made.slices[0].masses.keys) <= 2 * TOKENS
    found = made.top_tokens(4)
    assert found["token"][0].sort().values.tolist() == [0, 2, 4, 6]
    assert torch.allclose(found["mass"][0], torch.full((4,), 5.0 * n / 2))


def test_a_pass_that_went_through_a_file_goes_on_alike(tmp_path):
    from sae import files

    whole = entries()
    half = ROWS // 2
    first, second = (whole[((whole.row < half) == early).nonzero().flatten()] for early in (True, False))
    unbroken, broken = Gather(F), Gather(F)
    for made in (unbroken, broken):
        made.add(first, strongest(first, F))
        made.close_part()
    files.write_safetensors(tmp_path / "s", broken.tensors())
    broken = Gather.of(files.read_safetensors(tmp_path / "s")[0], F)
    for made in (unbroken, broken):
        made.add(second, strongest(second, F))
        made.close_part()
    for name, value in unbroken.tensors().items():
        assert torch.equal(value, broken.tensors()[name]), name
