"""Top-p sampling against transformers' own processors."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sae.sampling import Nucleus, draw, nucleus


def _theirs(scores, temperature, top_p, top_k):
    steps = [TemperatureLogitsWarper(temperature)]
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    steps.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList(steps)(torch.zeros(len(scores), 1, dtype=torch.long), scores).softmax(-1)


@pytest.mark.parametrize("width", [40, 5000])
@pytest.mark.parametrize("spread", [0.1, 4.0])  # flat rows need more than the likeliest few
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, 0), (1.3, 0.5, 0), (0.7, 0.9, 7), (1.0, 0.99, 0)]
)
def test_the_nucleus_has_the_probabilities_that_transformers_gives(width, spread, temperature, top_p, top_k):
    scores = spread * torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    probs, tokens = nucleus(scores, temperature, top_p, top_k)
    ours = torch.zeros_like(scores).scatter_(1, tokens, probs / probs.sum(dim=1, keepdim=True))
    torch.testing.assert_close(ours, _theirs(scores, temperature, top_p, top_k), rtol=1e-4, atol=1e-7)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[2.0, 1.0, 0.0, -9.0]])
    torch.manual_seed(0)
    drawn = draw(scores.repeat(20_000, 1), 1.0, 0.95)
    counts = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(counts, _theirs(scores, 1.0, 0.95, 0)[0], rtol=0, atol=0.015)
    assert counts[3] == 0


def test_a_row_with_one_likely_token_has_a_nucleus_of_one():
    probs, tokens = nucleus(torch.tensor([[0.0, 50.0, 0.0]]), 1.0, 0.1)
    assert tokens[0, 0] == 1 and int((probs > 0).sum()) == 1


def test_the_processor_leaves_one_token_for_a_greedy_generate():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    chosen = draw(scores, 0.7, 0.9)
    torch.manual_seed(2)
    left = Nucleus(0.7, 0.9)(torch.zeros(3, 1, dtype=torch.long), scores)
    assert torch.equal(left.argmax(dim=1), chosen)
    assert torch.isfinite(left).sum() == 3
