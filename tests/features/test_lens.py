"""The lens is the model's own last step without its scale; output scores equal one full forward each."""

import pytest
import torch

from sae.errors import UserError
from sae.features.lens import beginning_tokens, logit_lens, output_scores
from tests.conftest import make_sae

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def seasoned(tiny_host):
    """The tiny host with a final norm whose gain is not all ones."""
    gain = tiny_host.model.model.norm.weight
    before = gain.detach().clone()
    with torch.no_grad():
        gain.copy_(torch.linspace(-1, 2, len(gain)))
    yield tiny_host
    with torch.no_grad():
        gain.copy_(before)


def test_the_lens_is_the_models_own_last_step_without_its_scale(seasoned):
    rows = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        scale = rows.pow(2).mean(1, keepdim=True).add(seasoned.model.model.norm.variance_epsilon).sqrt()
        logits = seasoned.model.lm_head(seasoned.model.model.norm(rows)) * scale
    logits = logits - logits.mean(1, keepdim=True)
    read = logit_lens(seasoned, rows, 20, batch=2)
    assert torch.allclose(read.top_values, logits.topk(20).values, atol=1e-5)
    assert torch.allclose(logits.gather(1, read.top.long()), read.top_values, atol=1e-5)
    assert torch.allclose(read.bottom_values, logits.topk(20, largest=False).values, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_the_lens_knows_norms_that_centre_and_gains_of_one_plus_gamma(kind):
    import transformers

    from sae.host import Host

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
        model = transformers.GPT2LMHeadModel(config)
        norm = model.transformer.ln_f
    else:
        config = transformers.GemmaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, vocab_size=60,
        )  # fmt: skip
        model = transformers.GemmaForCausalLM(config)
        norm = model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        if kind == "gpt2":
            norm.bias.copy_(torch.randn(16))
    host = Host.from_model(model.eval(), None, name=kind)
    w = torch.randn(3, 16)
    with torch.no_grad():
        # far from the origin of the norm's own scale the two must agree up to one factor a row
        own = norm(w) - (norm.bias if kind == "gpt2" else 0)
        logits = model.lm_head(own)
    logits = logits - logits.mean(1, keepdim=True)
    read = logit_lens(host, w, 5)
    expected = logits.topk(5)
    assert torch.equal(read.top.long(), expected.indices)
    ratio = read.top_values / expected.values
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)


@pytest.mark.parametrize("amplitude", ["own", "strongest"])
@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out"])
def test_batched_output_scores_equal_one_full_forward_each(tiny_host, amplitude, hook):
    sae = make_sae()
    features = [0, 3, 50, 51, 95]
    beginnings = ("From my experience,", "Today")
    found = output_scores(tiny_host, sae, features, hook, amplitude=amplitude, beginnings=beginnings, batch=2, says=3)
    top = logit_lens(tiny_host, sae.W_dec[features]).top.long()
    for i, feature in enumerate(features):
        total, gained = 0.0, torch.zeros(())
        for text in beginnings:
            tokens = beginning_tokens(tiny_host, text)
            x = tiny_host.activations(tokens, [hook])[hook][0, -1:]
            size = 5 * sae.stats.max_act[feature] if amplitude == "own" else 10 * sae.encode(x).max()
            added = size * sae.W_dec[feature]

            def edit(x, at, added=added):
                return torch.cat([x[:, :-1], x[:, -1:] + added], 1)

            with torch.no_grad(), tiny_host.hooks([(hook, edit)]):
                logits = tiny_host.model(tokens).logits[0, -1]
            p = logits.softmax(-1)
            rank = min(int((logits > logits[v]).sum()) for v in top[i])
            total += (1 - rank / len(p)) * float(p[top[i]].max()) / 2
            gained = gained + p * (p.log() - tiny_host.logits(tokens)[0, -1].log_softmax(-1))
        assert float(found.score[i]) == pytest.approx(total, rel=1e-3, abs=1e-7)
        assert found.says[i].tolist() == gained.topk(3).indices.tolist()


def test_output_scores_leave_the_host_as_it_was(tiny_host):
    tokens = beginning_tokens(tiny_host, "Today")
    before = tiny_host.logits(tokens)
    output_scores(tiny_host, make_sae(), [1, 2], HOOK)
    assert torch.equal(tiny_host.logits(tokens), before)
    assert all("forward" not in vars(layer) for layer in tiny_host.model.model.layers)


def test_a_direction_that_writes_a_token_makes_the_model_say_it(tiny_host):
    """Feature 0's row is the unembedding of one token; this small host can be no surer of a token than some
    e^5/V."""
    sae = make_sae()
    token = 1234
    row = tiny_host.model.lm_head.weight[token].detach()
    sae.W_dec[0] = row / row.norm()
    found = output_scores(tiny_host, sae, [0], "blocks.3.hook_resid_post", max_act=torch.full((96,), 1e4), says=1)
    assert found.says[0, 0] == logit_lens(tiny_host, sae.W_dec[:1]).top[0, 0] == token
    assert found.score[0] > 100 / tiny_host.model.config.vocab_size


def test_no_features_no_scores_and_bad_requests_are_one_line(tiny_host):
    sae = make_sae()
    assert output_scores(tiny_host, sae, [], HOOK).score.shape == (0,)
    with pytest.raises(UserError, match="feature 96 does not exist"):
        output_scores(tiny_host, sae, [96], HOOK)
    with pytest.raises(UserError, match="amplitude 'loud'"):
        output_scores(tiny_host, sae, [1], HOOK, amplitude="loud")
    sae.stats = None
    with pytest.raises(UserError, match="no recorded maxima"):
        output_scores(tiny_host, sae, [1], HOOK)
    with pytest.raises(UserError, match="width 16"):
        logit_lens(tiny_host, torch.randn(2, 16))


def test_the_real_hosts_own_word_is_read_and_said(host):
    """A direction that is the unembedding of ' bridge': the lens reads it, the last layer says it."""
    token = host.tokenizer(" bridge", add_special_tokens=False)["input_ids"][0]
    W_U = host.model.get_output_embeddings().weight.detach().float()
    row = W_U[token] - W_U.mean(0)
    sae = make_sae(d_in=576, d_sae=8, k=2)
    sae.W_dec[0] = row / row.norm()
    max_act = torch.full((8,), 200.0)
    hook = f"blocks.{host.n_layers - 1}.hook_resid_post"
    assert logit_lens(host, sae.W_dec[:1]).top[0, 0] == token
    found = output_scores(host, sae, [0, 1], hook, max_act=max_act, beginnings=["I saw the"])
    assert found.says[0, 0] == token
    assert found.score[0] > 0.9
