"""Steering a host: cache, batches and padding agree with full forwards; it lets go; bad requests fail."""

import gc

import pytest
import torch

from sae import steer
from sae.errors import UserError
from sae.host import Pass
from sae.steering import Direction, side_by_side
from sae.where import Where
from tests.conftest import make_sae

HOOK = "blocks.2.hook_resid_post"
PROMPT = "Tell me about the bridge over the bay"


@pytest.fixture
def tokens(tiny_host):
    return tiny_host.tokenizer(PROMPT + " and its towers.", return_tensors="pt").input_ids


@pytest.fixture
def feature(tiny_host, tiny_sae, tokens):
    """One that fires somewhere in the tokens, though not everywhere."""
    fires = (tiny_sae.encode(tiny_host.activations(tokens, [HOOK])[HOOK]) > 0)[0, 1:].sum(0)
    return int(torch.nonzero((fires > 0) & (fires < tokens.shape[1] - 1)).flatten()[0])


def test_steered_activations_are_the_formula_and_logits_differ(tiny_host, tiny_sae, tokens, feature):
    plain = tiny_host.logits(tokens)
    x = tiny_host.activations(tokens, [HOOK])[HOOK]
    seen = {}
    with (
        steer(tiny_host, tiny_sae, {feature: "5x"}),
        tiny_host.hooks([(HOOK, lambda x, at: seen.update(x=x.clone()))]),
    ):
        steered = tiny_host.logits(tokens)
    c = 5 * tiny_sae.stats.max_act[feature]
    expected = x + (c - tiny_sae.encode(x)[..., feature])[..., None] * tiny_sae.W_dec[feature]
    expected[:, 0] = x[:, 0]
    torch.testing.assert_close(seen["x"], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, steered, atol=1e-2)
    assert torch.equal(tiny_host.logits(tokens), plain)


def test_clamping_to_its_own_value_leaves_logits_unchanged(tiny_host, tiny_sae, tokens):
    x = tiny_host.activations(tokens, [HOOK])[HOOK]
    last = tiny_sae.encode(x)[0, -1]
    feature = int(last.argmax())

    def only_last(at):
        mask = torch.zeros_like(at.tokens, dtype=torch.bool)
        mask[:, -1] = True
        return mask

    with steer(tiny_host, tiny_sae, {feature: float(last[feature])}, positions=only_last):
        steered = tiny_host.logits(tokens)
    torch.testing.assert_close(steered, tiny_host.logits(tokens), atol=1e-4, rtol=1e-5)


def test_off_is_the_unsteered_model_exactly(tiny_host, tiny_sae, tokens):
    with steer(tiny_host, tiny_sae, {3: "off"}) as steering:
        assert steering.edits == []
        assert torch.equal(tiny_host.logits(tokens), tiny_host.logits(tokens, edits=steering.edits))
        inside = tiny_host.logits(tokens)
    assert torch.equal(inside, tiny_host.logits(tokens))


def test_zero_x_removes_a_firing_feature(tiny_host, tiny_sae, tokens, feature):
    seen = {}
    with (
        steer(tiny_host, tiny_sae, f"{feature}=0x"),
        tiny_host.hooks([(HOOK, lambda x, at: seen.update(x=x.clone()))]),
    ):
        tiny_host.logits(tokens)
    x = tiny_host.activations(tokens, [HOOK])[HOOK]
    f = tiny_sae.encode(x)[..., feature]
    f[:, 0] = 0
    torch.testing.assert_close(x - seen["x"], f[..., None] * tiny_sae.W_dec[feature], atol=1e-4, rtol=1e-4)


def greedy_with_cache(host, steering, prompt, n):
    """Logits that chose each of n tokens, and the whole sequence, decoding with a KV cache."""
    chosen = []
    steps = host.model.lm_head.register_forward_hook(lambda module, args, out: chosen.append(out[:, -1]))
    ids = []
    spy = ("blocks.0.hook_resid_pre", lambda x, at: ids.append(at.tokens))
    try:
        host.generate(prompt, max_new_tokens=n, temperature=0, edits=[*steering.edits, spy])
    finally:
        steps.remove()
    return torch.stack(chosen, dim=1), torch.cat(ids, dim=1)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_logits_with_a_cache_are_those_of_a_full_forward(tiny_host, tiny_sae, tokens, feature, positions):
    steering = steer(tiny_host, tiny_sae, {feature: "3x"}, positions=positions)
    cached, sequence = greedy_with_cache(tiny_host, steering, tokens, 6)
    P = tokens.shape[1]
    assert sequence.shape[1] > P + 2, "the case must decode several tokens"

    def as_generated(edit):
        return lambda x, at: edit(x, Pass(at.tokens, 0, at.attention_mask, False, P))

    full = tiny_host.logits(sequence, edits=[(name, as_generated(edit)) for name, edit in steering.edits])
    torch.testing.assert_close(cached, full[:, P - 1 :], atol=1e-3, rtol=1e-4)
    assert not torch.allclose(full[:, -1], tiny_host.logits(sequence)[:, -1], atol=1e-2)


def test_a_left_padded_batch_answers_as_each_prompt_alone(tiny_host, tiny_sae, feature):
    prompts = ["Who are you?", "What is the colour of the big bridge that stands over the bay?"]
    edits = steer(tiny_host, tiny_sae, {feature: "3x"}).edits
    settings = {"max_new_tokens": 8, "temperature": 0, "edits": edits}
    together = tiny_host.generate(prompts, **settings)
    assert together == [tiny_host.generate(prompt, **settings) for prompt in prompts]
    assert together != tiny_host.generate(prompts, max_new_tokens=8, temperature=0)


def test_special_tokens_and_the_first_position_are_left_alone(tiny_host, tiny_sae, feature):
    tokens = tiny_host.chat_tokens("Who are you?")
    plain = tiny_host.activations(tokens, [HOOK])[HOOK]
    special = torch.isin(tokens, torch.tensor(sorted(tiny_host.special_ids)))
    special[:, 0] = True

    def touched(**options):
        seen = {}
        with (
            steer(tiny_host, tiny_sae, {feature: "5x"}, **options),
            tiny_host.hooks([(HOOK, lambda x, at: seen.update(x=x.clone()))]),
        ):
            tiny_host.logits(tokens)
        return (seen["x"] != plain).any(-1)

    assert special.sum() > 1
    assert torch.equal(touched(), ~special)
    assert touched(special=True).all()


def test_it_restores_whatever_raises(tiny_host, tiny_sae, tokens):
    plain = tiny_host.logits(tokens)
    with pytest.raises(ZeroDivisionError), steer(tiny_host, tiny_sae, {3: "5x"}):
        raise ZeroDivisionError
    assert torch.equal(tiny_host.logits(tokens), plain)

    def broken(at):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), steer(tiny_host, tiny_sae, {3: "5x"}, positions=broken):
        tiny_host.generate(tokens, max_new_tokens=3)
    assert torch.equal(tiny_host.logits(tokens), plain)


def test_a_handle_attaches_and_lets_go(tiny_host, tiny_sae, tokens, feature):
    plain = tiny_host.logits(tokens)
    steering = steer(tiny_host, tiny_sae, {feature: "5x"}).attach()
    try:
        assert not torch.equal(tiny_host.logits(tokens), plain)
        with pytest.raises(UserError, match="attached already"):
            steering.attach()
    finally:
        steering.remove()
    steering.remove()
    assert torch.equal(tiny_host.logits(tokens), plain)
    with steering:
        assert not torch.equal(tiny_host.logits(tokens), plain)
    assert torch.equal(tiny_host.logits(tokens), plain)


def test_blocks_of_several_saes_and_hooks_compose(tiny_host, tiny_sae, tokens):
    earlier = make_sae(seed=5, hook_name="blocks.1.hook_mlp_out")
    first, second = steer(tiny_host, earlier, {2: "4x"}), steer(tiny_host, tiny_sae, {3: "4x"})
    with first, second:
        nested = tiny_host.logits(tokens)
    torch.testing.assert_close(nested, tiny_host.logits(tokens, edits=[*second.edits, *first.edits]))
    with first:
        one = tiny_host.logits(tokens)
    assert not torch.allclose(one, nested, atol=1e-2)


def test_at_one_hook_the_inner_block_sees_what_the_outer_wrote(tiny_host, tiny_sae, tokens, feature):
    outer = steer(tiny_host, tiny_sae, {feature: "9x"})
    with outer, steer(tiny_host, tiny_sae, {feature: "2x"}):
        both = tiny_host.logits(tokens)
    with outer, steer(tiny_host, tiny_sae, {feature: "2x"}, kind="add"):
        added = tiny_host.logits(tokens)
    assert not torch.allclose(both, added, atol=1e-2), "a clamp over a clamp sets, an add over a clamp adds"


def test_plain_transformer_lens_hooks_equal_the_hosts_own_path(tiny_host, tiny_sae, tokens, feature):
    steering = steer(tiny_host, tiny_sae, {feature: "5x"})
    own = tiny_host.logits(tokens, edits=steering.edits)
    with torch.no_grad():
        by_bridge = tiny_host.bridge.run_with_hooks(tokens, fwd_hooks=steering.hooks(tokens))
        without = tiny_host.bridge.run_with_hooks(tokens, fwd_hooks=steering.hooks())
    torch.testing.assert_close(by_bridge, own, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(without, own, atol=1e-3, rtol=1e-4)  # no special token among these


def test_bridge_hooks_that_cannot_know_are_refused(tiny_host, tiny_sae, tokens):
    with pytest.raises(UserError, match=r"hooks\(tokens\)"):
        steer(tiny_host, tiny_sae, {3: "5x"}, positions="prompt").hooks()
    hook = steer(tiny_host, tiny_sae, {3: "5x"}).hooks(tokens)[0][1]
    with pytest.raises(UserError, match="Make them anew"):
        hook(torch.zeros(1, 3, 32))


def test_side_by_side_is_the_plain_and_the_steered_answer(tiny_host, tiny_sae, feature):
    steering = steer(tiny_host, tiny_sae, {feature: "9x"})
    pieces = {"plain": "", "steered": ""}
    plain, steered = side_by_side(
        tiny_host,
        steering,
        "Who are you?",
        stream_plain=lambda text: pieces.update(plain=pieces["plain"] + text),
        stream_steered=lambda text: pieces.update(steered=pieces["steered"] + text),
        max_new_tokens=8,
        seed=1,
    )
    assert plain == tiny_host.generate("Who are you?", max_new_tokens=8, seed=1) == pieces["plain"]
    assert steered == tiny_host.generate("Who are you?", max_new_tokens=8, seed=1, edits=steering.edits)
    assert steered == pieces["steered"] != plain


def test_an_sae_folder_serves_as_well(tiny_host, tiny_sae, tokens, feature, tmp_path):
    tiny_sae.save(tmp_path / "sae")
    from_disk = steer(tiny_host, tmp_path / "sae", {feature: "5x"}).edits
    in_memory = steer(tiny_host, tiny_sae, {feature: "5x"}).edits
    torch.testing.assert_close(tiny_host.logits(tokens, edits=from_disk), tiny_host.logits(tokens, edits=in_memory))


def test_a_direction_steers_by_the_same_door(tiny_host, tokens):
    vector = torch.nn.functional.normalize(torch.arange(32.0), dim=0)
    direction = Direction(HOOK, vector, max_act=2.0, norm=10.0)
    steering = steer(tiny_host, direction, "3x")
    assert steering.edits[0][1].parts[0].laws[0].tolist() == [6.0]
    assert direction.share(0.5) == 5.0
    x = torch.zeros(1, 3, 32)
    edited = steering.edits[0][1](x, Pass(torch.full((1, 3), 100), 0, None, False, 3))
    torch.testing.assert_close(edited[0, 1], 6.0 * vector)
    assert steer(tiny_host, direction, "off").edits == []


@pytest.mark.parametrize("dials", ["3=5y", "96=5x", "3", {}, 5.0])
def test_bad_dials_are_refused_before_anything_is_attached(tiny_host, tiny_sae, tokens, dials):
    plain = tiny_host.logits(tokens)
    with pytest.raises(UserError) as caught:
        steer(tiny_host, tiny_sae, dials)
    assert "\n" not in str(caught.value)
    assert torch.equal(tiny_host.logits(tokens), plain)


def test_an_sae_of_another_width_model_or_hook_is_refused(tiny_host):
    with pytest.raises(UserError, match=r"width 24.* 32 wide"):
        steer(tiny_host, make_sae(d_in=24, hook_name=HOOK), {3: "5x"}, force=True)
    with pytest.raises(UserError, match="layers 0 to 3"):
        steer(tiny_host, make_sae(hook_name="blocks.9.hook_resid_post"), {3: "5x"})
    stranger = make_sae(hook_name=HOOK, host_fingerprint="0123456789abcdef")
    with pytest.raises(UserError, match=f"0123456789abcdef.*{tiny_host.fingerprint}"):
        steer(tiny_host, stranger, {3: "5x"})
    assert steer(tiny_host, stranger, {3: "5x"}, force=True).edits
    own = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint, outlier_norm=50.0)
    where = steer(tiny_host, own, {3: "5x"}).edits[0][1].parts[0].where
    assert where == Where(special_ids=tiny_host.special_ids, outlier_norm=50.0)


def test_handles_add_up_and_read_the_same_x(tiny_host, tiny_sae, tokens, feature):
    other = make_sae(seed=5, hook_name="blocks.1.hook_mlp_out")
    direction = Direction(HOOK, torch.nn.functional.normalize(torch.arange(32.0), dim=0), max_act=2.0, norm=10.0)
    a, b = steer(tiny_host, tiny_sae, {feature: "9x"}), steer(tiny_host, direction, "3x")
    x = tiny_host.activations(tokens, [HOOK])[HOOK]
    at = Pass(tokens, 0, None, False, tokens.shape[1])
    (_, both), *_ = (a + b).edits
    separately = [handle.edits[0][1](x, at) - x for handle in (a, b)]
    torch.testing.assert_close(both(x, at), x + sum(separately), atol=1e-4, rtol=1e-4)
    three = a + b + steer(tiny_host, other, {2: "4x"})
    assert [hook for hook, _ in three.edits] == [HOOK, "blocks.1.hook_mlp_out"]
    with three:
        steered = tiny_host.logits(tokens)
    assert not torch.allclose(steered, tiny_host.logits(tokens), atol=1e-2)
    with pytest.raises(UserError, match="has no dials of its own"):
        three.set({feature: "2x"})


def test_dials_change_while_attached_and_a_wrong_one_changes_nothing(tiny_host, tiny_sae, tokens, feature):
    plain = tiny_host.logits(tokens)
    with steer(tiny_host, tiny_sae, "off") as handle:
        assert torch.equal(tiny_host.logits(tokens), plain)
        for dials in ({feature: "9x"}, {feature: "9x", 3: 5.0}, "7+=3"):
            handle.set(dials)
            expected = tiny_host.logits(tokens)
            with pytest.raises(UserError):
                handle.set("96=3")
            assert torch.equal(tiny_host.logits(tokens), expected)
            assert not torch.equal(expected, plain)
        handle.set("off")
        assert torch.equal(tiny_host.logits(tokens), plain)


def test_a_compiled_model_is_steered_by_a_hook_that_stays(tiny_host, tiny_sae, tokens, feature):
    eager = {}
    for dials in ("off", {feature: "9x"}, {3: 5.0, 4: 5.0}):
        with steer(tiny_host, tiny_sae, dials):
            eager[str(dials)] = tiny_host.logits(tokens)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    before = tiny_host.model.forward
    torch._dynamo.reset()
    with steer(tiny_host, tiny_sae, "off") as handle:
        tiny_host.model.forward = torch.compile(before, backend=backend)
        try:
            for dials in ("off", {feature: "9x"}, {3: 5.0, 4: 5.0}):
                handle.set(dials)
                torch.testing.assert_close(tiny_host.logits(tokens), eager[str(dials)], atol=1e-4, rtol=1e-4)
                graphs = len(compiled) if dials == "off" else graphs  # noqa: F821
                assert len(compiled) == graphs > 0, "other dials compile nothing"
        finally:
            del tiny_host.model.forward
            torch._dynamo.reset()


def test_a_static_cache_gives_the_steered_answer_of_a_growing_one(tiny_host, tiny_sae, feature):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = tiny_host.chat_tokens("Who are you?")
    for positions in ("all", "generated", "prompt"):
        with steer(tiny_host, tiny_sae, {feature: "9x"}, positions=positions), torch.no_grad():
            growing = tiny_host.model.generate(tokens, **settings)
            static = tiny_host.model.generate(tokens, cache_implementation="static", **settings)
        assert torch.equal(growing, static)


def test_a_condition_gates_what_is_steered(tiny_host, tiny_sae, tokens, feature):
    acts = tiny_sae.encode(tiny_host.activations(tokens, [HOOK])[HOOK])[0, 1:, feature]
    with steer(tiny_host, tiny_sae, {3: 9.0}, when=f"{feature}>0"):
        some = tiny_host.activations(tokens, [HOOK])[HOOK][0, 1:]
    plain = tiny_host.activations(tokens, [HOOK])[HOOK][0, 1:]
    assert torch.equal((some != plain).any(-1), acts > 0)


def test_a_generation_ends_where_a_feature_fires(tiny_host, tiny_sae):
    prompts = ["Who are you?", "What is the colour of the big bridge that stands over the bay?", "Hi"]
    settings = {"max_new_tokens": 16, "temperature": 0}
    plain = tiny_host.generate(prompts, **settings)
    spied = []
    with tiny_host.hooks([(HOOK, lambda x, at: spied.append(x[:, -1]))]):
        tiny_host.generate(prompts, **settings)
    acts = tiny_sae.encode(torch.stack(spied[1:], dim=1))  # of generated tokens [B, T, F]
    peaks = acts.amax(dim=1)
    watched = int((peaks[0] - peaks[1:].amax(dim=0)).argmax())  # one that fires in the first row more than elsewhere
    limit = float((peaks[0, watched] + peaks[1:, watched].amax()) / 2)
    with steer(tiny_host, tiny_sae, "off", abort_when=f"{watched}>{limit}"):
        ended = tiny_host.generate(prompts, **settings)
    assert ended[1:] == plain[1:]
    assert plain[0].startswith(ended[0]) and len(ended[0]) < len(plain[0])
    when = int((acts[0, :, watched] > limit).nonzero()[0])
    assert len(tiny_host.tokenizer(ended[0]).input_ids) <= when + 2
    assert tiny_host.generate(prompts, **settings) == plain


def test_an_attached_handle_that_nobody_keeps_goes_on_steering(tiny_host, folder, tokens):
    plain = tiny_host.logits(tokens)
    kept = steer(tiny_host, folder, {7: 9.0}).attach()
    wanted = tiny_host.logits(tokens)
    kept.remove()
    assert torch.equal(tiny_host.logits(tokens), plain) and not torch.equal(wanted, plain)
    steer(tiny_host, folder, {7: 9.0}).attach()
    gc.collect()
    try:
        assert torch.equal(tiny_host.logits(tokens), wanted)
    finally:
        tiny_host.held.pop().__exit__(None, None, None)
    assert torch.equal(tiny_host.logits(tokens), plain)
