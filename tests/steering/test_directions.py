"""Difference of means against a computation by hand, and what it refuses."""

import pytest
import torch

from sae.errors import UserError
from sae.steering import difference_of_means

HOOK = "blocks.2.hook_resid_post"
BRIDGE = ["The bridge is red and very long.", "A bridge over the bay, with two towers."]
OTHER = ["Bread needs flour, water and salt.", "He wrote a letter to his sister last week."]


def by_hand(host, texts):
    rows = []
    for text in texts:
        tokens = torch.tensor([host.tokenizer(text).input_ids])
        rows.append(host.activations(tokens, [HOOK])[HOOK][0, 1:].double())
    return torch.cat(rows)


def test_it_is_the_difference_of_the_means_at_unit_length(tiny_host):
    direction = difference_of_means(tiny_host, "model.layers.2", BRIDGE, OTHER)
    with_it, without = by_hand(tiny_host, BRIDGE), by_hand(tiny_host, OTHER)
    difference = with_it.mean(0) - without.mean(0)
    expected = difference / difference.norm()
    assert direction.hook == HOOK
    torch.testing.assert_close(direction.vector.double(), expected, atol=1e-5, rtol=1e-5)
    assert direction.max_act == pytest.approx(float((with_it @ expected).max()), rel=1e-4)
    assert direction.norm == pytest.approx(float(torch.cat([with_it, without]).norm(dim=1).median()), rel=1e-4)
    assert direction.host_fingerprint == tiny_host.fingerprint


def test_texts_that_cannot_make_a_direction_are_refused(tiny_host):
    with pytest.raises(UserError, match="no negative texts"):
        difference_of_means(tiny_host, HOOK, BRIDGE, [])
    with pytest.raises(UserError, match="no ordinary tokens"):
        difference_of_means(tiny_host, HOOK, BRIDGE, [""])
    with pytest.raises(UserError, match="the same mean"):
        difference_of_means(tiny_host, HOOK, BRIDGE, BRIDGE)
