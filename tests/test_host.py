"""The host: its sites equal TransformerLens', it stops early, edits hold under a cache, it restores."""

import copy

import pytest
import torch
from torch import nn

from sae.errors import UserError
from sae.host import Host
from tests.conftest import make_tiny_host

TEXT = "The Golden Gate Bridge is a suspension bridge over a strait."


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT, return_tensors="pt").input_ids


def enlarged(model, factor=3.0):
    """Random weights large enough that every sublayer matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tiny_gpt2(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=len(tokenizer),
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Host.from_model(enlarged(GPT2LMHeadModel(config)), tokenizer, "gpt2")


@pytest.fixture(scope="module")
def tiny_gemma2(tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(2)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        sliding_window=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return Host.from_model(enlarged(Gemma2ForCausalLM(config)), tokenizer, "google/gemma-2-2b")


@pytest.fixture(scope="module")
def tiny_neox(tokenizer):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(3)
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
    )
    return Host.from_model(enlarged(GPTNeoXForCausalLM(config)), tokenizer, "EleutherAI/pythia-70m")


@pytest.fixture(params=["host", "tiny_gpt2", "tiny_gemma2", "tiny_neox"])
def any_host(request):
    return request.getfixturevalue(request.param)


# ---- against TransformerLens


def test_every_site_and_the_logits_equal_the_bridge_on_the_same_weights(any_host, ids):
    logits, cache = any_host.run_with_cache(ids)
    ours = any_host.activations(ids, any_host.hook_names())
    for name, values in ours.items():
        theirs = cache[name].flatten(2)  # the bridge splits hook_z into heads
        assert values.shape == (1, ids.shape[1], any_host.width(name)) == theirs.shape, name
        bound = 1e-4 * float(theirs.abs().max())  # eager attention there, SDPA here
        torch.testing.assert_close(values, theirs, atol=bound, rtol=1e-4, msg=name)
    torch.testing.assert_close(any_host.logits(ids), logits, atol=1e-3, rtol=1e-4)


def test_the_bridge_shares_the_weights_and_leaves_the_host_plain(tiny_host, ids):
    before = tiny_host.logits(ids)
    theirs = {p.data_ptr() for p in tiny_host.bridge.original_model.parameters()}
    assert {p.data_ptr() for p in tiny_host.model.parameters()} == theirs
    assert not any("Bridge" in type(m).__name__ for m in tiny_host.model.modules())
    assert torch.equal(tiny_host.logits(ids), before)


def test_a_host_of_an_existing_bridge_has_the_same_sites_values_and_fingerprint(any_host, ids):
    of_bridge = Host.from_model(any_host.bridge, any_host.tokenizer, any_host.name)
    assert of_bridge.bridge is any_host.bridge
    assert of_bridge.hook_names() == any_host.hook_names()
    assert of_bridge.fingerprint == any_host.fingerprint
    plain, wrapped = (h.activations(ids, h.hook_names()) for h in (any_host, of_bridge))
    for name, values in plain.items():
        bound = 1e-4 * float(values.abs().max())
        torch.testing.assert_close(wrapped[name], values, atol=bound, rtol=1e-4, msg=name)


KINDS_EDITED = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "mlp.hook_in", "hook_mlp_out", "attn.hook_z"]


@pytest.mark.parametrize("kind", KINDS_EDITED)
def test_an_edit_does_what_the_same_edit_does_in_the_bridge(tiny_gemma2, ids, kind):
    name = f"blocks.1.{kind}"
    ours = tiny_gemma2.logits(ids, edits=[(name, lambda x, at: x * 0.5 + 1)])
    with torch.no_grad():
        theirs = tiny_gemma2.bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x * 0.5 + 1)])
    assert not torch.allclose(ours, tiny_gemma2.logits(ids), atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ---- sites and names


def test_three_naming_conventions_name_one_site(host, tiny_gpt2, tiny_gemma2):
    for name in ("blocks.15.hook_resid_post", "blocks.15.hook_out", "model.layers.15"):
        assert host.hook(name) == "blocks.15.hook_resid_post"
    assert host.hook("blocks.3.hook_in") == "blocks.3.hook_resid_pre"
    assert host.hook("blocks.3.attn.hook_out") == host.hook("model.layers.3.self_attn") == "blocks.3.hook_attn_out"
    assert host.hook("model.layers.3.mlp") == "blocks.3.hook_mlp_out"
    assert tiny_gpt2.hook("transformer.h.2.attn") == "blocks.2.hook_attn_out"
    assert tiny_gemma2.hook("model.layers.0.post_feedforward_layernorm") == "blocks.0.hook_mlp_out"
    assert host.layer("model.layers.15") == 15
    assert host.width("blocks.15.hook_resid_post") == host.d_model == 576
    assert tiny_gemma2.width("blocks.0.attn.hook_z") == 64


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.15.hook_resid_pots", "did you mean blocks.15.hook_resid_post"),
        ("layer 15", "names no site"),
        ("blocks.12.ln2.hook_normalized", "bridge alone. Use run_with_saes; "),
        ("blocks.12.hook_mlp_in", r"run_with_saes after host.bridge.set_use_hook_mlp_in\(True\); "),
        ("blocks.30.hook_resid_post", "layers 0 to 29"),
        ("model.layers.3.self_attn.q_proj", "names no site"),
        ("", "names no site"),
    ],
)
def test_an_unknown_hook_is_one_line_with_something_to_do(host, name, says):
    with pytest.raises(UserError, match=says) as error:
        host.hook(name)
    assert "\n" not in str(error.value) and "?." not in str(error.value)


def test_parallel_blocks_have_no_resid_mid(tiny_neox):
    assert not any("resid_mid" in name for name in tiny_neox.hook_names())
    with pytest.raises(UserError, match="parallel"):
        tiny_neox.hook("blocks.0.hook_resid_mid")


def test_a_wrapped_model_has_the_same_sites(tiny_host, ids):
    class Wrapper(nn.Module):
        """What PEFT does: the model two levels down, attributes handed through."""

        def __init__(self, model):
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = model
            self.forward = model.forward

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base_model").model, name)

    wrapped = Host.from_model(Wrapper(tiny_host.model), tiny_host.tokenizer)
    name = "base_model.model.model.layers.2"
    assert wrapped.hook(name) == "blocks.2.hook_resid_post"
    ours = wrapped.activations(ids, [name])["blocks.2.hook_resid_post"]
    assert torch.equal(ours, tiny_host.activations(ids, [name[17:]])["blocks.2.hook_resid_post"])


def test_something_that_is_no_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="no transformers config"):
        Host.from_model(nn.Linear(2, 2), tokenizer)


# ---- reading


def test_a_forward_stops_after_the_last_hook(tiny_host, ids):
    calls = []
    blocks = tiny_host.model.model.layers
    handles = [block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    try:
        found = tiny_host.activations(ids, ["blocks.1.hook_resid_post", "blocks.0.hook_attn_out"])
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [0, 1]
    assert list(found) == ["blocks.1.hook_resid_post", "blocks.0.hook_attn_out"]
    assert not blocks[0]._forward_hooks and not blocks[1]._forward_hooks


@pytest.mark.parametrize("which", ["tiny_host", "tiny_gpt2", "tiny_gemma2"])
def test_a_packed_document_reads_like_the_document_alone(which, request, tokenizer):
    at = request.getfixturevalue(which)
    first = tokenizer("Emails about money.", return_tensors="pt").input_ids
    second = tokenizer(TEXT, return_tensors="pt").input_ids
    n, m = first.shape[1], second.shape[1]
    padding = torch.full((1, 3), 2)
    tokens = torch.cat([first, second, padding], dim=1).repeat(2, 1)
    doc = torch.tensor([[0] * n + [1] * m + [-1] * 3, [5] * n + [6] * m + [-1] * 3])
    names = at.hook_names()
    packed, alone = at.activations(tokens, names, doc=doc), at.activations(second, names)
    for name in names:
        torch.testing.assert_close(packed[name][:1, n : n + m], alone[name], atol=1e-4, rtol=1e-4, msg=name)
        assert torch.isfinite(packed[name]).all(), name
    torch.testing.assert_close(at.logits(tokens, doc=doc)[1:, n : n + m], at.logits(second), atol=1e-4, rtol=1e-4)


def test_without_documents_attention_is_plainly_causal_even_where_positions_restart(tiny_host, ids):
    pos = torch.arange(ids.shape[1])[None] % 5
    changed = ids.clone()
    changed[0, 0] += 1
    hook = "blocks.3.hook_resid_post"
    a, b = (tiny_host.activations(t, [hook], pos=pos)[hook] for t in (ids, changed))
    assert not torch.allclose(a[0, -1], b[0, -1])


@pytest.mark.parametrize(
    ("site", "packed"),
    [
        ("1.hook_resid_post", False),
        ("2.hook_resid_pre", True),
        ("0.hook_resid_pre", False),
        ("last.hook_resid_post", True),
    ],
)
def test_logits_from_a_site_equal_an_edit_and_run_no_layer_below(any_host, ids, site, packed):
    name = f"blocks.{site.replace('last', str(any_host.n_layers - 1))}"
    tokens = ids.repeat(2, 3)  # longer than what the first try runs on
    doc = torch.arange(tokens.shape[1])[None].repeat(2, 1) // ids.shape[1] if packed else None
    if packed:
        doc[1, -3:] = -1
    x = any_host.activations(tokens, [name], doc=doc)[name]
    for value in (x + 0.1 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x * 0):
        edited = any_host.logits(tokens, doc=doc, edits=[(name, lambda _x, _at, value=value: value)])
        from_here = any_host.logits_from(name, value, tokens, doc=doc)
        torch.testing.assert_close(from_here, edited, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(any_host.logits_from(name, x, tokens, doc=doc), from_here, atol=1e-2)
    ran = []
    layers = [at.block for at in any_host._sites.layers]
    handles = [at.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, at in enumerate(layers)]
    try:
        any_host.logits_from(name, x, tokens, doc=doc)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(any_host.layer(name) + name.endswith("post"), any_host.n_layers))
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_logits_from_sites_inside_a_layer_and_under_open_hooks_run_the_whole_forward(tiny_host, ids):
    for name in ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_mid", "blocks.1.attn.hook_z"):
        x = tiny_host.activations(ids, [name])[name] * 0.5
        torch.testing.assert_close(
            tiny_host.logits_from(name, x, ids), tiny_host.logits(ids, edits=[(name, lambda _x, _at, x=x: x)])
        )
    name, seen = "blocks.1.hook_resid_post", []
    x = tiny_host.activations(ids, [name])[name]
    expected = tiny_host.logits_from(name, x, ids)
    with tiny_host.hooks([("blocks.0.hook_resid_post", lambda x, at: seen.append(at) or x + 1)]):
        torch.testing.assert_close(tiny_host.logits_from(name, x, ids), expected)
    assert len(seen) == 1
    with pytest.raises(UserError, match="logits_from: x is"):
        tiny_host.logits_from(name, x[:, 1:], ids)


def test_a_model_whose_later_layers_need_earlier_ones_runs_the_whole_forward(tokenizer, ids):
    at, kept = make_tiny_host(tokenizer), []
    layers = at.model.model.layers
    layers[0].mlp.register_forward_hook(lambda _module, _args, output: kept.append(output) or None)
    layers[3].mlp.register_forward_hook(lambda _module, _args, output: output + kept.pop())
    name = "blocks.1.hook_resid_post"
    x = at.activations(ids, [name])[name] * 0.5
    kept.clear()
    edited = at.logits(ids, edits=[(name, lambda _x, _at: x)])
    for _ in range(2):
        torch.testing.assert_close(at.logits_from(name, x, ids), edited)


def test_the_layers_are_whole_again_after_an_exception(tiny_host, ids):
    name = "blocks.2.hook_resid_post"
    x = tiny_host.activations(ids, [name])[name]
    before = tiny_host.logits(ids)
    with pytest.raises(RuntimeError, match="mine"), tiny_host._sites.held(name, x):
        raise RuntimeError("mine")
    assert torch.equal(tiny_host.logits(ids), before)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_format(host, tiny_host):
    import copy

    half = Host.from_model(copy.deepcopy(tiny_host.model).to(torch.bfloat16), tiny_host.tokenizer)
    assert half.fingerprint == tiny_host.fingerprint != host.fingerprint
    with torch.no_grad():
        half.model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert Host.from_model(half.model, half.tokenizer).fingerprint != tiny_host.fingerprint


# ---- editing


def test_hooks_are_gone_after_an_exception(tiny_host, ids):
    before = tiny_host.logits(ids)

    def broken(x, at):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), tiny_host.hooks([("blocks.1.hook_resid_mid", broken)]):
        tiny_host.logits(ids)
    with (
        pytest.raises(UserError),
        tiny_host.hooks([("blocks.1.hook_mlp_out", broken), ("blocks.9.hook_mlp_out", broken)]),
    ):
        pass
    assert torch.equal(tiny_host.logits(ids), before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in tiny_host.model.modules())


def test_an_edit_of_resid_mid_edits_the_stream_and_not_the_mlp_alone(tiny_host, ids):
    seen = {}
    edits = [
        ("blocks.1.hook_resid_mid", lambda x, at: x + 3),
        ("blocks.1.hook_resid_mid", lambda x, at: seen.update(mid=x) or None),
        ("blocks.1.hook_mlp_out", lambda x, at: torch.zeros_like(x)),
    ]
    plain = tiny_host.activations(ids, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    with tiny_host.hooks(edits):
        after = tiny_host.activations(ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    torch.testing.assert_close(seen["mid"], plain + 3, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, plain + 3, atol=1e-5, rtol=1e-5)


def test_edits_of_two_blocks_compose_in_the_order_of_a_forward(tiny_host, ids):
    name = "blocks.2.hook_resid_pre"
    plain = tiny_host.activations(ids, [name])[name]
    with tiny_host.hooks([("blocks.2.hook_resid_mid", lambda x, at: None)]):
        with tiny_host.hooks([(name, lambda x, at: x + 1), (name, lambda x, at: x * 2)]):
            edited = tiny_host.activations(ids, [name, "blocks.2.hook_resid_mid", "blocks.2.hook_attn_out"])
        again = tiny_host.activations(ids, [name])[name]
    torch.testing.assert_close(edited[name], (plain + 1) * 2)
    mid = edited["blocks.2.hook_resid_mid"]
    torch.testing.assert_close(mid, edited[name] + edited["blocks.2.hook_attn_out"])
    assert torch.equal(again, plain)


def test_an_edit_of_another_shape_is_refused(tiny_host, ids):
    with pytest.raises(UserError, match="Keep the shape"):
        tiny_host.logits(ids, edits=[("blocks.1.hook_resid_post", lambda x, at: x[:, :1])])


@pytest.mark.parametrize("kind", ["hook_resid_pre", "hook_resid_mid", "attn.hook_z", "hook_mlp_out"])
def test_edits_under_the_cache_equal_a_full_forward(tiny_host, kind):
    prompts = ["Hello there, who are you today?", "Bridges"]
    edits = [(f"blocks.2.{kind}", lambda x, at: x * 1.5 + 0.5)]
    tokens, mask, _ = tiny_host._prompt_tokens(prompts, True, None)
    with tiny_host.hooks(edits):
        out = tiny_host.model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=2, eos_token_id=None
        )
    plain = tiny_host.model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=2, eos_token_id=None
    )
    assert not torch.equal(out, plain)
    for row, live in zip(out, mask, strict=True):
        start = int((live == 0).sum())
        full = tiny_host.logits(row[None, start:-1], edits=edits)[0, tokens.shape[1] - start - 1 :]
        assert torch.equal(full.argmax(-1), row[tokens.shape[1] :])


def test_a_pass_knows_the_prompt_and_what_was_generated(tiny_host, ids):
    seen = []
    edits = [("blocks.0.hook_resid_pre", lambda x, at: seen.append((x.shape, at)) or None)]
    tiny_host.generate(["One two three", "One"], max_new_tokens=3, edits=edits, chat=False, temperature=0)
    (shape, first), (_, second) = seen[0], seen[1]
    assert first.doc is None and second.doc is None
    length = shape[1]
    assert (first.past, first.generating, first.prompt_length) == (0, True, length)
    assert first.tokens.shape == (2, length) and first.attention_mask[1].tolist() == [0] * (length - 1) + [1]
    assert (second.past, second.generating, second.prompt_length) == (length, True, length)
    assert second.tokens.shape == (2, 1) and second.attention_mask.shape == (2, length + 1)
    seen.clear()
    doc = torch.zeros_like(ids)
    doc[0, -2:] = -1
    tiny_host.logits(ids, edits=edits, doc=doc)
    at = seen[0][1]
    assert (at.past, at.generating, at.prompt_length) == (0, False, ids.shape[1])
    assert at.attention_mask[0, -3:].tolist() == [True, False, False] and torch.equal(at.doc, doc)


# ---- generating


def test_a_padded_batch_answers_as_each_prompt_alone(host):
    prompts = ["Who are you?", "Name three bridges in the United States, with their cities.", "Hi"]
    together = host.generate(prompts, max_new_tokens=6, temperature=0)
    assert together == [host.generate(prompt, max_new_tokens=6, temperature=0) for prompt in prompts]


def test_one_seed_gives_one_answer_and_leaves_the_generators_alone(tiny_host):
    state = torch.random.get_rng_state()
    one, same, other = (tiny_host.generate("Hi", max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_streamed_pieces_add_up_to_the_answer(host):
    pieces = []
    answer = host.generate("Say hello with an emoji.", max_new_tokens=10, stream=pieces.append)
    assert "".join(pieces) == answer and len(pieces) > 3


def test_a_stream_does_not_emit_half_characters(tiny_host):
    pieces = []
    answer = tiny_host.generate("x", max_new_tokens=40, temperature=1.5, stream=pieces.append)
    assert "".join(pieces) == answer


def test_messages_and_token_tensors_are_prompts_too(host):
    text = host.generate("Who are you?", max_new_tokens=3, temperature=0, system="You are a bridge.")
    messages = [
        {"role": "system", "content": "You are a bridge."},
        {"role": "user", "content": "Who are you?"},
    ]
    assert host.generate(messages, max_new_tokens=3, temperature=0) == text
    assert host.generate(host.chat_tokens(messages), max_new_tokens=3, temperature=0) == text
    assert "You are a bridge." in host.tokenizer.decode(host.chat_tokens("Who?", system="You are a bridge.")[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_k": -2},
        {"max_new_tokens": 0},
        {"prompt": ""},
        {"prompt": []},
    ],
)
def test_senseless_sampling_is_one_line(tiny_host, bad):
    with pytest.raises(UserError, match="generate:"):
        tiny_host.generate(**{"prompt": "Hi", "max_new_tokens": 2, "chat": False, **bad})


def test_every_token_has_one_display_string(host, ids):
    strings = host.text_of(ids)
    assert len(strings) == ids.shape[1] and "".join(strings) == TEXT
    assert host.text_of([1]) == ["<|im_start|>"]
    assert {0, 1, 2} <= host.special_ids


# ---- loading


def test_a_folder_loads_and_what_cannot_be_loaded_is_one_line(tiny_host, tmp_path):
    tiny_host.model.save_pretrained(tmp_path / "tiny")
    tiny_host.tokenizer.save_pretrained(tmp_path / "tiny")
    loaded = Host.load(str(tmp_path / "tiny"), dtype="float32", device="cpu")
    assert loaded.fingerprint == tiny_host.fingerprint and loaded.n_layers == 4
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"damaged")
    for name in (str(tmp_path / "tiny"), str(tmp_path / "no.gguf"), str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(UserError) as error:
            Host.load(name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_a_host_in_float32_has_the_same_weights_and_leaves_the_host_as_it_is(tiny_host, ids):
    narrow = Host.from_model(copy.deepcopy(tiny_host.model).to(torch.bfloat16), tiny_host.tokenizer, "tiny")
    wide = narrow.in_float32()
    assert (narrow.dtype, wide.dtype, wide.fingerprint) == (torch.bfloat16, torch.float32, narrow.fingerprint)
    by_torch = Host.from_model(copy.deepcopy(narrow.model).float(), tiny_host.tokenizer, "tiny")
    assert torch.equal(wide.logits(ids), by_torch.logits(ids)) and narrow.logits(ids).dtype == torch.bfloat16
    assert tiny_host.in_float32() is tiny_host


def test_an_unknown_dtype_or_device_is_one_line():
    with pytest.raises(UserError, match="float31"):
        Host.load("smollm2", dtype="float31")
    with pytest.raises(UserError, match="device"):
        Host.load("smollm2", device="abacus")


def test_the_machine_decides_the_number_format_by_its_flags(monkeypatch):
    from sae import machine

    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    assert machine.dtype_of("auto", "cpu") == torch.bfloat16
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    assert machine.dtype_of("auto", "cpu") == torch.float32
    assert machine.dtype_of("auto", "mps") == torch.float32
    assert machine.dtype_of("bfloat16", "cpu") == torch.bfloat16
    assert "torch" in machine.describe() and "\n" not in machine.describe()
