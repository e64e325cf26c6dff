"""SAEs on the bridge: what stands at their hooks, what hook functions see and change, and that nothing stays."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.errors import UserError
from sae.host import Host
from sae.selections import Pursuit
from sae.splicing import POINTS
from sae.steering import steer
from tests.conftest import make_sae, make_tiny_host

ROOT = Path(__file__).parents[1]
RESID = "blocks.2.hook_resid_post"
SITES = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
TOKENS = torch.arange(100, 124).view(2, 12)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return make_tiny_host(tokenizer)


def plain(host):
    with torch.no_grad():
        return host.bridge(TOKENS)


def with_edit(host, hook, new):
    """Logits of the host's own forward with new(x) at a hook."""
    return host.logits(TOKENS, edits=[(hook, lambda x, at: new(x))])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


def transcoder(skip=False, d_out=32, reads="blocks.1.hook_resid_mid", writes="blocks.1.hook_mlp_out"):
    generator = torch.Generator().manual_seed(3)
    about = Metadata(hook_name=reads, hook_name_out=writes)
    sae = SAE(SAEConfig("topk", 32, 64, 5, about, apply_b_dec_to_input=False, d_out=d_out)).requires_grad_(False)
    for weight in (sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    if skip:
        sae.W_skip = torch.nn.Parameter(torch.randn(d_out, 32, generator=generator), requires_grad=False)
    return sae


# ---- what stands at the hook


@pytest.mark.parametrize("kind", SITES)
def test_the_reconstruction_stands_at_the_hook_as_in_the_hosts_own_forward(tiny, kind):
    sae = make_sae(hook_name=f"blocks.2.{kind}")
    ours = tiny.run_with_saes(TOKENS, saes=sae)
    close(ours, with_edit(tiny, f"blocks.2.{kind}", sae))
    assert not torch.allclose(ours, plain(tiny), atol=0.1)


@pytest.mark.parametrize("kind", SITES)
def test_with_the_error_term_nothing_changes_as_long_as_no_hook_changes_anything(tiny, kind):
    sae = make_sae(hook_name=f"blocks.2.{kind}")
    ours = tiny.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    if kind == "hook_resid_mid":  # written as what attention adds
        return close(ours, plain(tiny))
    assert torch.equal(ours, plain(tiny))
    cached, _ = tiny.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    assert torch.equal(cached, plain(tiny))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_one_hook_and_its_output_stands_at_another(tiny, skip):
    sae = transcoder(skip)
    read, written = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out
    x = tiny.activations(TOKENS, [read])[read]
    close(tiny.run_with_saes(TOKENS, saes=sae), with_edit(tiny, written, lambda _: sae(x)))
    logits, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    assert torch.equal(logits, plain(tiny))
    close(cache[f"{written}.hook_sae_input"], x)
    close(cache[f"{written}.hook_sae_recons"], sae(x))
    close(cache[f"{written}.hook_sae_error"] + sae(x), tiny.activations(TOKENS, [written])[written])


def test_a_transcoder_may_read_where_only_the_bridge_has_a_hook(tiny):
    sae, writes = transcoder(skip=True, reads="blocks.1.mlp.hook_in"), "blocks.1.hook_mlp_out"
    _, before = tiny.run_with_cache(TOKENS)
    close(tiny.run_with_saes(TOKENS, saes=sae), with_edit(tiny, writes, lambda _: sae(before["blocks.1.mlp.hook_in"])))


def test_the_mlps_input_is_a_site_and_hook_mlp_in_is_switched_on_first(tokenizer):
    tiny = make_tiny_host(tokenizer)
    sae, writes = transcoder(reads="blocks.1.mlp.hook_in"), "blocks.1.hook_mlp_out"
    x = tiny.activations(TOKENS, [sae.cfg.metadata.hook_name])[sae.cfg.metadata.hook_name]
    close(tiny.run_with_saes(TOKENS, saes=sae), with_edit(tiny, writes, lambda _: sae(x)))
    early = transcoder(reads="blocks.1.hook_mlp_in")
    raised(lambda: tiny.run_with_saes(TOKENS, saes=early), "set_use_hook_mlp_in(True) first")
    tiny.bridge.set_use_hook_mlp_in(True)
    mid = tiny.activations(TOKENS, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    close(tiny.run_with_saes(TOKENS, saes=early), with_edit(tiny, writes, lambda _: early(mid)))


def test_texts_are_tokenised_as_the_bridge_does_it(tiny):
    sae, text = make_sae(hook_name=RESID), "Who are you?"
    ids = tiny.bridge.to_tokens(text)
    assert torch.equal(tiny.run_with_saes(text, saes=sae), tiny.run_with_saes(ids, saes=sae))
    logits, cache = tiny.run_with_cache_with_saes([text], saes=sae)
    assert torch.equal(logits, tiny.run_with_saes(ids, saes=sae)) and cache[RESID].shape[1] == ids.shape[1]
    assert torch.equal(tiny.run_with_hooks_with_saes(text, saes=sae, fwd_hooks=[]), logits)
    assert torch.equal(tiny.run_with_cache(text)[0], tiny.run_with_cache(ids)[0])
    assert tiny.run_with_saes([text, "Hi"], saes=sae).shape[:2] == (2, ids.shape[1])
    raised(lambda: tiny.run_with_saes([1, 2], saes=sae), "[1, 2]", "Give a tensor, a str or a list")


def test_several_saes_stand_at_several_hooks(tiny):
    first, second = make_sae(hook_name="blocks.1.hook_resid_post"), make_sae(seed=1, hook_name="blocks.3.attn.hook_z")
    edits = [("blocks.1.hook_resid_post", lambda x, at: first(x)), ("blocks.3.attn.hook_z", lambda x, at: second(x))]
    close(tiny.run_with_saes(TOKENS, saes=[second, first]), tiny.logits(TOKENS, edits=edits))


KINDS = {
    "layer_norm": {"normalize_activations": "layer_norm"},
    "constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "abstopk": {"architecture": "abstopk"},
    "groupmax": {"architecture": "groupmax"},
    "matching_pursuit": {"architecture": "matching_pursuit", "k": None, "pursuit": Pursuit(max_iterations=4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_saes_that_norm_tokens_or_have_rules_of_their_own_stand_there_too(tiny, kind):
    given = make_sae(hook_name=RESID)
    sae = SAE(replace(given.cfg, **KINDS[kind])).requires_grad_(False)
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        setattr(sae, name, getattr(given, name))
    logits, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae)
    close(logits, with_edit(tiny, RESID, sae))
    assert (f"{RESID}.hook_sae_acts_pre" in cache) == (kind != "matching_pursuit")
    assert torch.equal(tiny.run_with_saes(TOKENS, saes=sae, use_error_term=True), plain(tiny))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_another_dtype_is_cast_in_and_out(tokenizer, dtypes):
    host, sae = make_tiny_host(tokenizer), make_sae(hook_name=RESID).to(dtypes[1])
    host = Host.from_model(host.model.to(dtypes[0]), tokenizer, "tiny-llama")
    logits, cache = host.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    assert torch.equal(logits, plain(host)) and logits.dtype == dtypes[0]
    assert cache[f"{RESID}.hook_sae_error"].dtype == torch.float32
    assert cache[f"{RESID}.hook_sae_acts_post"].dtype == dtypes[1]


# ---- names


@pytest.mark.parametrize("name", [RESID, "blocks.2.hook_out", "model.layers.2"])
def test_the_hooks_are_there_under_the_saes_own_name_transformerlens_and_the_bridges(tiny, name):
    sae = make_sae(hook_name=name)
    _, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    x = tiny.activations(TOKENS, [RESID])[RESID]
    for one in {name, RESID, "blocks.2.hook_out"}:
        assert all(f"{one}.{point}" in cache for point in POINTS)
        close(cache[f"{one}.hook_sae_input"], x)
        assert torch.equal(cache[f"{one}.hook_sae_acts_post"], sae.encode(cache[f"{one}.hook_sae_input"]))
        seen: list[str] = []
        hook = (f"{one}.hook_sae_acts_post", lambda acts, hook, seen=seen: seen.append(hook.name))
        tiny.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[hook])
        assert seen == ["blocks.2.hook_out.hook_sae_acts_post"]
    close(cache[f"{RESID}.hook_sae_recons"] + cache[f"{RESID}.hook_sae_error"], x)
    close(cache[f"{RESID}.hook_sae_output"], x)


def test_the_cache_holds_what_the_filter_names_and_no_error_without_the_term(tiny):
    sae = make_sae(hook_name=RESID)
    name = f"{RESID}.hook_sae_acts_post"
    _, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae, names_filter=name)
    assert set(cache) == {name, "blocks.2.hook_out.hook_sae_acts_post"}
    _, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae, names_filter=lambda one: "hook_sae" in one)
    assert {one.split(".")[-1] for one in cache} == set(POINTS) - {"hook_sae_error"}


def test_a_hook_where_the_sae_is_sees_what_flows_on(tiny):
    sae = make_sae(hook_name=RESID)
    _, cache = tiny.run_with_cache_with_saes(TOKENS, saes=sae)
    assert torch.equal(cache[RESID], cache[f"{RESID}.hook_sae_output"])


# ---- interventions


def expected(point, sae, x, change, error):
    """What stands at the hook where `change` is made of what is at a point, written out."""
    given = change(x) if point == "hook_sae_input" else x
    pre = sae.pre_activations(given)
    acts = sae.select(change(pre) if point == "hook_sae_acts_pre" else pre)
    recon = sae.decode(change(acts) if point == "hook_sae_acts_post" else acts)
    recon = change(recon) if point == "hook_sae_recons" else recon
    left = x - sae(x)
    out = recon + (change(left) if point == "hook_sae_error" else left) * error
    return change(out) if point == "hook_sae_output" else out


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_what_a_hook_function_makes_of_its_tensor_is_what_is_used(tiny, point, error, in_place):
    if point == "hook_sae_error" and not error:
        return
    sae = make_sae(hook_name=RESID)

    def change(tensor, hook=None):
        if hook is None or not in_place:
            return tensor * 1.5 + 0.1
        tensor.mul_(1.5).add_(0.1)

    ours = tiny.run_with_hooks_with_saes(
        TOKENS, saes=sae, fwd_hooks=[(f"{RESID}.{point}", change)], use_error_term=error
    )
    close(ours, with_edit(tiny, RESID, lambda x: expected(point, sae, x, change, error)))


def test_a_clamp_by_a_hook_and_the_error_term_is_what_steer_does(tiny):
    sae = make_sae(hook_name=RESID)

    def clamp(acts, hook):
        acts[:, 1:, 7] = 3.0
        return acts

    ours = tiny.run_with_hooks_with_saes(
        TOKENS, saes=sae, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", clamp)], use_error_term=True
    )
    close(ours, tiny.logits(TOKENS, edits=steer(tiny, sae, {7: 3.0}, positions="1:", special=True).edits))


def test_the_clean_reconstruction_is_made_again_only_where_a_hook_changed_something(tiny, monkeypatch):
    sae, calls = make_sae(hook_name=RESID), []
    for name in ("pre_activations", "decode"):
        was = getattr(SAE, name)
        monkeypatch.setattr(SAE, name, lambda *given, was=was, name=name: (calls.append(name), was(*given))[1])
    for change, again in ((lambda t, hook: t, 0), (lambda t, hook: t + 1, 1)):
        calls.clear()
        hook = (f"{RESID}.hook_sae_acts_post", change)
        tiny.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[hook], use_error_term=True)
        assert (calls.count("pre_activations"), calls.count("decode")) == (1, 1 + again)


def test_gradients_flow_through_the_features_and_not_through_the_error(tiny):
    sae, kept = make_sae(hook_name=RESID), []

    def keep(acts, hook):
        acts.retain_grad()
        kept.append(acts)

    with tiny.saes([sae], use_error_term=True) as bridge:
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", keep)])[:, -1, 9].sum().backward()
    tiny.model.zero_grad(set_to_none=True)
    active = kept[0].grad[kept[0] > 0]
    assert active.abs().min() > 0 and bool(torch.isfinite(active).all())


# ---- what is refused, and that nothing stays


def raised(run, *words):
    with pytest.raises(UserError) as error:
        run()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


REFUSED = {
    "a hook that there is not": ({"hook_name": "blocks.2.hook_nothing"}, ["blocks.2.hook_nothing", "names no site"]),
    "no hook at all": ({}, ["names no site"]),
    "another width": ({"d_in": 48, "hook_name": RESID}, ["32 wide", "48"]),
    "another host": ({"hook_name": RESID, "host_fingerprint": "0" * 16}, ["0" * 16, "tiny-llama", "Load that model"]),
    "a hook that is switched off": ({"hook_name": "blocks.2.hook_mlp_in"}, ["use_hook_mlp_in"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_sae_that_does_not_fit_is_one_line(tiny, case):
    given, words = REFUSED[case]
    raised(lambda: tiny.run_with_saes(TOKENS, saes=make_sae(**given)), *words)


def test_two_saes_at_one_hook_are_refused(tiny):
    sae = make_sae(hook_name=RESID)
    raised(lambda: tiny.run_with_saes(TOKENS, saes=[sae, make_sae(hook_name="blocks.2.hook_out")]), "two SAEs", "hook")
    with tiny.saes(sae):
        raised(lambda: tiny.run_with_saes(TOKENS, saes=sae), "two SAEs")
    tiny.run_with_saes(TOKENS, saes=sae)


def test_an_output_of_another_width_or_before_what_is_read_is_one_line(tiny):
    raised(lambda: tiny.run_with_saes(TOKENS, saes=transcoder(d_out=24)), "blocks.1.mlp.hook_out", "24")
    early = transcoder(writes="blocks.0.hook_mlp_out")
    raised(lambda: tiny.run_with_saes(TOKENS, saes=early), "after blocks.0.mlp.hook_out", "Swap")


def test_unknown_names_open_edits_wrong_shapes_and_what_is_no_sae_are_one_line(tiny):
    sae = make_sae(hook_name=RESID)
    error = f"{RESID}.hook_sae_error"
    run, cached = tiny.run_with_hooks_with_saes, tiny.run_with_cache_with_saes
    raised(lambda: run(TOKENS, saes=sae, fwd_hooks=[(error, print)]), error, "no hook of this run")
    raised(lambda: cached(TOKENS, saes=sae, names_filter=[error]), error)
    cut = (f"{RESID}.hook_sae_acts_post", lambda acts, hook: acts[..., :5])
    raised(lambda: run(TOKENS, saes=sae, fwd_hooks=[cut]), "hook_sae_acts_post", "[2, 12, 5]", "[2, 12, 96]")
    raised(lambda: tiny.run_with_saes(TOKENS, saes=["folder"]), "str", "SAE.load")
    with steer(tiny, sae, {7: 3.0}):
        raised(lambda: tiny.run_with_saes(TOKENS, saes=sae), "edits are open", "fwd_hooks")


def test_a_forward_that_fails_leaves_bridge_and_host_as_they_were(tiny):
    ours, theirs, names = tiny.logits(TOKENS), plain(tiny), set(tiny.bridge.hook_dict)

    def fail(tensor, hook):
        raise RuntimeError("in the middle")

    saes = [make_sae(hook_name=RESID), transcoder(), make_sae(hook_name="blocks.3.hook_resid_mid")]
    with pytest.raises(RuntimeError, match="in the middle"):
        tiny.run_with_hooks_with_saes(
            TOKENS, saes=saes, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", fail)], use_error_term=True
        )
    assert torch.equal(tiny.logits(TOKENS), ours) and torch.equal(plain(tiny), theirs)
    assert set(tiny.bridge.hook_dict) == names and not tiny.bridge.list_hooks()


# ---- the real host


def test_the_shipped_sae_on_the_real_host_shows_its_features_and_keeps_the_logits(host):
    sae = SAE.load(ROOT / "checkpoints/smollm2-golden-gate")
    name = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    ids = host.tokenizer("The Golden Gate Bridge is red.", return_tensors="pt").input_ids
    logits, cache = host.run_with_cache_with_saes(ids, saes=sae, use_error_term=True, names_filter=[name])
    with torch.no_grad():
        assert torch.equal(logits, host.bridge(ids))
    assert ((cache[name] > 0).sum(-1) <= 16).all()
    spliced = host.run_with_saes(ids, saes=sae)
    close(spliced, host.logits(ids, edits=[(sae.cfg.metadata.hook_name, lambda x, at: sae(x))]))
