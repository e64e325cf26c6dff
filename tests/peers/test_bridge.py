"""SAEs spliced into the real host, against SAELens's SAETransformerBridge in its own environment: same weights, same
tokens, float32. Both bridges are TransformerLens's, of different versions."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import files
from sae.autoencoder import SAE, Metadata, SAEConfig
from tests.peers.agree import BAR, ROOT, difference, python

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

SHIPPED, TRANSCODER, SKIP, MID = range(4)


def random_sae(seed, d_out=None, skip=False, **about):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig("jumprelu", 576, 64, None, Metadata(**about), d_out is None, d_out)).requires_grad_(False)
    for weight in (sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec):
        weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    sae.threshold = torch.rand(64, generator=generator)
    if skip:
        sae.W_skip = torch.nn.Parameter(torch.randn(d_out, 576, generator=generator) / 24, requires_grad=False)
    return sae


@pytest.fixture(scope="module")
def both(host, tmp_path_factory):
    """Our SAEs, the tokens, and what SAELens made of them."""
    peer = python("saelens")
    if not peer.exists():
        pytest.skip("SAELens's environment is not built: experiments/bench/peers.sh")
    work = tmp_path_factory.mktemp("bridge")
    across = {"hook_name": "blocks.5.hook_resid_mid", "hook_name_out": "blocks.5.hook_mlp_out"}
    saes = [
        SAE.load(ROOT / "checkpoints/smollm2-golden-gate"),
        random_sae(1, 576, **across),
        random_sae(2, 576, skip=True, **across),
        random_sae(3, hook_name="blocks.9.hook_resid_mid"),
    ]
    folders = [str(sae.save(work / str(i))) for i, sae in enumerate(saes)]
    tokens = host.chat_tokens("Which bridge crosses the Golden Gate?")
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    (model,) = (path for path in (files.cache_dir() / "hosts").iterdir() if path.name.startswith("SmolLM2"))
    script = Path(__file__).with_name("splice_saelens.py")
    words = [peer, script, model, work / "tokens.safetensors", work / "out.safetensors", *folders]
    said = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    return saes, tokens, load_file(work / "out.safetensors")


def figures(host, saes, tokens, theirs, number):
    """How far our logits and cached activations are from theirs, of the largest; by name."""
    sae = saes[number]
    name = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name

    def clamp(acts, hook):
        acts[:, 1:, 7] = 30.0

    hook = (f"{name}.hook_sae_acts_post", clamp)
    ours = {"plain": host.run_with_saes(tokens, saes=sae)}
    ours["logits"], cache = host.run_with_cache_with_saes(tokens, saes=sae, use_error_term=True)
    ours |= {one: cache[f"{name}.hook_sae_{one}"] for one in ("acts_post", "recons", "error")}
    ours["clamped"] = host.run_with_hooks_with_saes(tokens, saes=sae, fwd_hooks=[hook], use_error_term=True)
    return {one: difference(tensor, theirs[f"{number}.{one}"]) for one, tensor in ours.items()}


@pytest.mark.parametrize("number", [SHIPPED, TRANSCODER], ids=["shipped", "transcoder"])
def test_logits_and_what_the_hooks_see_are_saelens_s(host, both, number):
    found = figures(host, *both, number)
    print(found)
    assert max(found.values()) <= BAR, found


def test_saelens_s_bridge_drops_the_skip_connection_and_ours_does_not(host, both):
    saes, tokens, theirs = both
    with_skip = figures(host, saes, tokens, theirs, SKIP)
    assert with_skip["acts_post"] <= BAR and with_skip["recons"] > 0.01, with_skip
    saes[SKIP].W_skip = None
    without = figures(host, saes, tokens, theirs, SKIP)
    assert max(without.values()) <= BAR, without


def test_saelens_s_bridge_splices_resid_mid_for_the_mlp_only_and_ours_for_the_stream(host, both):
    saes, tokens, theirs = both
    found = figures(host, saes, tokens, theirs, MID)
    assert max(found[name] for name in ("acts_post", "recons", "error", "logits")) <= BAR, found
    assert found["plain"] > 0.01, found
    hook = saes[MID].cfg.metadata.hook_name
    stream = host.logits(tokens, edits=[(hook, lambda x, at: saes[MID](x))])
    assert difference(host.run_with_saes(tokens, saes=saes[MID]), stream) <= BAR
