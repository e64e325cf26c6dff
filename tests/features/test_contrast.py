"""Halves keep groups together, noise is what shuffled labels reach, and few firing texts count for little."""

import pytest
import torch

from sae.features.contrast import Pair, Side, contrast, halves, noise
from sae.features.index import IndexedDocument
from sae.features.pool import in_csr

F = 400


def side(acts, first=0, groups=None):
    """Texts with these max-pooled activations [n, F]."""
    row, feature = acts.nonzero(as_tuple=True)
    maxima = in_csr(row, feature, acts[row, feature], torch.ones(len(acts), dtype=torch.bool), acts.shape[1])
    names = [f"g{first + i}" for i in range(len(acts))] if groups is None else groups
    texts = [IndexedDocument(f"text {first + i}", group=name) for i, name in enumerate(names)]
    return Side(texts, maxima, torch.arange(len(acts)))


def random(n, seed, share=0.3, features=F):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(n, features, generator=generator)
    return acts * (torch.rand(n, features, generator=generator) < share)


def test_a_group_stays_in_one_half():
    groups = [f"g{i // 3}" for i in range(30)]
    for seed in range(5):
        first, second = halves(side(random(30, 0), groups=groups), seed)
        own = [{text.group for text in half.texts} for half in (first, second)]
        assert not own[0] & own[1]
        assert len(first) + len(second) == 30 and min(len(first), len(second)) >= 7
        assert set(first.rows.tolist()) | set(second.rows.tolist()) == set(range(30))


def test_noise_is_what_the_best_of_so_many_reaches_by_luck():
    """400 features without any meaning, 20 + 20 texts: the best reaches some 0.75; of one feature 0.5 on average."""
    pair = Pair(side(random(20, 1)), side(random(20, 2), 20), F)
    everything = torch.ones(F, dtype=torch.bool)
    level = noise(pair, everything)
    assert 0.68 < level < 0.85
    assert level == pytest.approx(float(contrast(pair).auroc.max()), abs=0.08)  # labels mean nothing here
    one = torch.zeros(F, dtype=torch.bool)
    one[3] = True
    assert abs(noise(pair, one) - 0.5) < 0.1
    more = Pair(side(random(200, 1)), side(random(200, 2), 200), F)
    assert noise(more, everything) < level - 0.08  # more texts leave less to luck


def test_near_copies_of_a_text_are_shuffled_as_one():
    """8 + 8 groups of five equal texts are 8 + 8 texts, not 40 + 40."""
    copies = [random(8, seed).repeat_interleave(5, 0) for seed in (1, 2)]
    names = [[f"{where}{i // 5}" for i in range(40)] for where in ("p", "n")]
    grouped = Pair(side(copies[0], groups=names[0]), side(copies[1], 40, names[1]), F)
    alone = Pair(side(copies[0]), side(copies[1], 40), F)
    everything = torch.ones(F, dtype=torch.bool)
    assert noise(grouped, everything) > noise(alone, everything) + 0.1
    assert noise(grouped, everything) == pytest.approx(float(contrast(grouped).auroc.max()), abs=0.1)


def test_a_feature_that_fires_in_few_texts_is_shrunk():
    acts = torch.zeros(10, 3)
    acts[:2, 0], acts[:6, 1] = 1.0, 1.0
    found = contrast(Pair(side(acts), side(torch.zeros(10, 3), 10), 3))
    assert found.auroc.tolist() == pytest.approx([0.6, 0.8, 0.5])
    assert found.shrunk.tolist() == pytest.approx([0.1 * 2 / 5, 0.3, 0.0])
    assert found.sensitivity.tolist() == pytest.approx([0.2, 0.6, 0.0])
    assert found.specificity.tolist() == [1, 1, 1]
    assert found.n_fired.tolist() == [2, 6, 0]
