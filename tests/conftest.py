"""Fixtures shared by all tests: a real host, a tiny random host with the real tokenizer, a tiny SAE."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch


@pytest.fixture(scope="session")
def host():
    """SmolLM2-135M-Instruct with its real weights, float32."""
    from sae.host import Host

    return Host.load("smollm2", dtype="float32")


@pytest.fixture(scope="session")
def tokenizer(host):
    return host.tokenizer


def make_tiny_host(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.host import Host

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8)
    return Host.from_model(model, tokenizer, name="tiny-llama")


@pytest.fixture(scope="session")
def tiny_host(tokenizer):
    """A random 4-layer Llama of width 32 with SmolLM2's tokenizer: fast, wrong, deterministic."""
    return make_tiny_host(tokenizer)


def make_sae(d_in=32, d_sae=96, k=6, seed=0, architecture="topk", apply_b_dec_to_input=True, **metadata):
    from sae.autoencoder import SAE, FeatureStats, Metadata, SAEConfig

    generator = torch.Generator().manual_seed(seed)
    k = k if architecture == "topk" else None
    model = SAE(SAEConfig(architecture, d_in, d_sae, k, Metadata(**metadata), apply_b_dec_to_input))
    with torch.no_grad():
        rows = torch.randn(d_sae, d_in, generator=generator)
        model.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        model.encoder.copy_(model.W_dec + 0.1 * torch.randn(d_sae, d_in, generator=generator))
        model.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        model.b_dec.copy_(0.1 * torch.randn(d_in, generator=generator))
    if architecture == "topk":
        model.threshold = torch.full((d_sae,), 0.5)
    elif architecture == "jumprelu":
        model.threshold = torch.rand(d_sae, generator=generator)
    model.stats = FeatureStats(
        max_act=torch.rand(d_sae, generator=generator) + 1,
        density=torch.full((d_sae,), 0.01),
        p999=torch.ones(d_sae),
        n_tokens=1000,
    )
    return model.requires_grad_(False)


@pytest.fixture
def tiny_sae():
    """A random TopK SAE for layer 2 of the tiny host."""
    return make_sae(hook_name="blocks.2.hook_resid_post", model_name="tiny-llama")
