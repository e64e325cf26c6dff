"""The same promises on the real model: cache against full forward, and a direction that changes its words."""

import pytest
import torch

from sae.host import Pass
from sae.steering import difference_of_means, steer
from tests.conftest import make_sae

HOOK = "blocks.15.hook_resid_post"


@pytest.fixture(scope="module")
def smol_sae(host):
    return make_sae(d_in=576, d_sae=1024, k=16, hook_name=HOOK, host_fingerprint=host.fingerprint)


def test_cached_and_full_logits_agree_on_the_real_model(host, smol_sae):
    tokens = host.chat_tokens("Who are you?")
    steering = steer(host, smol_sae, {5: 60.0, 9: 20.0})
    chosen, ids = [], []
    head = host.model.lm_head.register_forward_hook(lambda module, args, out: chosen.append(out[:, -1]))
    try:
        spy = ("blocks.0.hook_resid_pre", lambda x, at: ids.append(at.tokens))
        host.generate(tokens, max_new_tokens=8, temperature=0, edits=[*steering.edits, spy])
    finally:
        head.remove()
    sequence, P = torch.cat(ids, dim=1), tokens.shape[1]
    full = host.logits(sequence, edits=steering.edits)[:, P - 1 :]
    torch.testing.assert_close(torch.stack(chosen, dim=1), full, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(full, host.logits(sequence)[:, P - 1 :], atol=0.1)


def test_a_plain_bridge_hook_list_steers_the_real_model_alike(host, smol_sae):
    tokens = host.chat_tokens("Who are you?")
    for options in ({}, {"special": True}):
        steering = steer(host, smol_sae, {5: 60.0}, **options)
        with torch.no_grad():
            by_bridge = host.bridge.run_with_hooks(tokens, fwd_hooks=steering.hooks(tokens))
        own = host.logits(tokens, edits=steering.edits)
        torch.testing.assert_close(by_bridge, own, atol=2e-3, rtol=1e-3)


def test_difference_of_means_moves_the_model_towards_its_texts(host):
    bridge = [
        "The Golden Gate Bridge spans the bay.",
        "I walked over the bridge in San Francisco.",
        "A red bridge.",
    ]
    other = ["The soup needs more salt and pepper.", "I wrote a letter to my sister.", "A green apple."]
    direction = difference_of_means(host, HOOK, bridge, other)
    tokens = host.tokenizer("My favourite place in the world is the", return_tensors="pt").input_ids
    word = host.tokenizer(" bridge").input_ids[0]

    def chance(edits):
        return float(host.logits(tokens, edits=edits)[0, -1].log_softmax(-1)[word])

    assert chance(steer(host, direction, direction.share(0.3)).edits) > chance(()) + 1


def test_a_positions_function_sees_the_pass(host, smol_sae):
    seen: list[Pass] = []

    def positions(at):
        seen.append(at)
        return torch.ones_like(at.tokens, dtype=torch.bool)

    host.generate(
        "Hi",
        max_new_tokens=3,
        temperature=0,
        edits=steer(host, smol_sae, {5: 1.0}, positions=positions).edits,
    )
    assert [at.past for at in seen] == [
        0,
        *range(seen[0].prompt_length, seen[0].prompt_length + len(seen) - 1),
    ]
    assert all(at.generating for at in seen)
