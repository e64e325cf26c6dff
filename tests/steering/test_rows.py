"""A dial of its own in each row of a batch."""

import pytest
import torch

from sae import UserError, steer
from sae.interventions import Edit, direction_part
from sae.where import Where
from tests.conftest import make_sae

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def where(tiny_host):
    return Where("all", False, tiny_host.special_ids)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_each_row_is_as_it_would_be_alone(tiny_host, architecture):
    sae = make_sae(architecture=architecture, hook_name=HOOK)
    prompts = ["Who are you?", "Tell me a very long story about the sea.", "Hi", "And you?"]
    rows = [{3: 25.0, 8: 4.0}, "70+=-12", "11=0x", "off"]
    with steer(tiny_host, sae, rows=rows):
        together = tiny_host.generate(prompts, max_new_tokens=12, temperature=0)
    for prompt, dials, answer in zip(prompts, rows, together, strict=True):
        with steer(tiny_host, sae, dials):
            assert tiny_host.generate(prompt, max_new_tokens=12, temperature=0) == answer
    plain = tiny_host.generate(prompts, max_new_tokens=12, temperature=0)
    assert together[0] != plain[0] and together[1] != plain[1] and together[3] == plain[3]


def test_logits_of_a_padded_batch_equal_those_of_each_row(tiny_host):
    sae = make_sae(architecture="jumprelu", hook_name=HOOK)
    ids = [tiny_host.chat_tokens(text)[0] for text in ("Who are you?", "What is the colour of the sea at night?")]
    tokens, doc = torch.zeros(2, max(map(len, ids)), dtype=torch.int64), torch.full((2, max(map(len, ids))), -1)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], doc[row, : len(one)] = one, 0
    rows = [{5: 9.0}, {6: 14.0, 5: ">=2"}]
    both = tiny_host.logits(tokens, doc=doc, edits=steer(tiny_host, sae, rows=rows).edits)
    for row, (one, dials) in enumerate(zip(ids, rows, strict=True)):
        expected = tiny_host.logits(one[None], edits=steer(tiny_host, sae, dials).edits)[0]
        torch.testing.assert_close(both[row, : len(one)], expected, atol=1e-4, rtol=1e-4)


def test_directions_are_added_at_their_own_strength(tiny_host, where):
    torch.manual_seed(0)
    vectors, prompts = torch.randn(2, 32), ["Who are you?", "Hi"]
    edit = Edit((direction_part(vectors, [20.0, 0.0], where, by_row=True),))
    together = tiny_host.generate(prompts, max_new_tokens=12, temperature=0, edits=[(HOOK, edit)])
    alone = Edit((direction_part(vectors[:1], [20.0], where),))
    assert together[0] == tiny_host.generate(prompts[0], max_new_tokens=12, temperature=0, edits=[(HOOK, alone)])
    assert together[1] == tiny_host.generate(prompts[1], max_new_tokens=12, temperature=0)


def test_rows_must_fit(tiny_host, where):
    sae = make_sae(architecture="jumprelu", hook_name=HOOK)
    with pytest.raises(UserError, match="2 directions and 1 amounts"):
        direction_part(torch.ones(2, 32), [3.0], where)
    with pytest.raises(UserError, match="feature 96 does not exist"):
        steer(tiny_host, sae, rows=["5=2", "96=off"])
    with pytest.raises(UserError, match="dials and rows"):
        steer(tiny_host, sae, "3=2", rows=["5=2"])
    with pytest.raises(UserError, match="made for 2 rows, this forward has 1"):
        tiny_host.logits(torch.tensor([[5, 6, 7]]), edits=steer(tiny_host, sae, rows=["1=3", "2=4"]).edits)
