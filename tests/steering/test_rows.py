"""A dial of its own in each row of a batch."""

import pytest
import torch

from sae import UserError
from sae.interventions import Dial, Where, direction_edit, feature_edit, row_edit
from tests.conftest import make_sae

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def where(tiny_host):
    return Where("all", False, tiny_host.special_ids)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_each_row_is_as_it_would_be_alone(tiny_host, where, architecture):
    sae = make_sae(architecture=architecture)
    prompts = ["Who are you?", "Tell me a very long story about the sea.", "Hi"]
    features, amounts = [3, 70, 11], [25.0, -12.0, 0.0]
    edit = row_edit(sae, features, amounts, where)
    together = tiny_host.generate(prompts, max_new_tokens=12, temperature=0, edits=[(HOOK, edit)])
    for prompt, feature, amount, answer in zip(prompts, features, amounts, together, strict=True):
        alone = feature_edit(sae, [Dial(feature, amount)], where, select="threshold")
        assert tiny_host.generate(prompt, max_new_tokens=12, temperature=0, edits=[(HOOK, alone)]) == answer
    plain = tiny_host.generate(prompts, max_new_tokens=12, temperature=0)
    assert together[0] != plain[0] and together[1] != plain[1]


def test_logits_of_a_padded_batch_equal_those_of_each_row(tiny_host, where):
    sae = make_sae(architecture="jumprelu")
    ids = [tiny_host.chat_tokens(text)[0] for text in ("Who are you?", "What is the colour of the sea at night?")]
    tokens, doc = torch.zeros(2, max(map(len, ids)), dtype=torch.int64), torch.full((2, max(map(len, ids))), -1)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], doc[row, : len(one)] = one, 0
    both = tiny_host.logits(tokens, doc=doc, edits=[(HOOK, row_edit(sae, [5, 6], [9.0, 14.0], where))])
    for row, (one, feature, amount) in enumerate(zip(ids, (5, 6), (9.0, 14.0), strict=True)):
        alone = feature_edit(sae, [Dial(feature, amount)], where)
        expected = tiny_host.logits(one[None], edits=[(HOOK, alone)])[0]
        torch.testing.assert_close(both[row, : len(one)], expected, atol=1e-4, rtol=1e-4)


def test_directions_are_added_at_their_own_strength(tiny_host, where):
    torch.manual_seed(0)
    vectors, prompts = torch.randn(2, 32), ["Who are you?", "Hi"]
    edit = row_edit(None, vectors, [20.0, 0.0], where)
    together = tiny_host.generate(prompts, max_new_tokens=12, temperature=0, edits=[(HOOK, edit)])
    alone = direction_edit(vectors[0], 20.0, where)
    assert together[0] == tiny_host.generate(prompts[0], max_new_tokens=12, temperature=0, edits=[(HOOK, alone)])
    assert together[1] == tiny_host.generate(prompts[1], max_new_tokens=12, temperature=0)


def test_rows_and_amounts_must_fit(tiny_host, where):
    sae = make_sae(architecture="jumprelu")
    with pytest.raises(UserError, match="2 rows and 1 amounts"):
        row_edit(sae, [1, 2], [3.0], where)
    with pytest.raises(UserError, match="feature 96 does not exist"):
        row_edit(sae, [96], [3.0], where)
    with pytest.raises(UserError, match="made for 2 rows, this forward has 1"):
        tiny_host.logits(torch.tensor([[5, 6, 7]]), edits=[(HOOK, row_edit(sae, [1, 2], [3.0, 4.0], where))])
