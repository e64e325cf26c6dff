"""Checks of harvesting on a CUDA device, on a tiny random host: its activations, and the reader's own stream."""

import itertools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae.activations import batches as feed
from sae.activations.harvest import stream
from sae.host import Host
from sae.text import Rows

HOOK = "blocks.2.hook_resid_post"


class Tokenizer:
    """What a host asks of a tokenizer that reads no text."""

    all_special_ids = (0, 1, 2)
    added_tokens_decoder: dict = {}


def host(device: str) -> Host:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=500)
    return Host.from_model(LlamaForCausalLM(config).to(device).eval(), Tokenizer(), name="tiny-llama")


def token_rows(count: int, seed: int = 0) -> Rows:
    """Two documents of 24 tokens a row."""
    tokens = torch.randint(3, 500, (count, 48), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    doc = (torch.arange(48) // 24 + 2 * torch.arange(count)[:, None]).int()
    pos = (torch.arange(48) % 24).expand(count, 48).int().contiguous()
    return Rows(tokens, doc, pos, pos > 0)


def activations_equal_the_cpus() -> None:
    (here,), (there,) = (list(stream(host(device), [token_rows(40)], [HOOK])) for device in ("cpu", "cuda"))
    assert there.acts[HOOK].device.type == "cpu" and there.acts[HOOK].is_pinned()
    torch.testing.assert_close(there.acts[HOOK], here.acts[HOOK], atol=1e-3, rtol=1e-3)


def live_rows_are_the_same_beside_a_busy_device() -> None:
    """Read ahead in a thread with a stream of its own, while the default stream works, as while training."""
    model = host("cuda")

    def blocks(skip: int):
        return stream(model, (token_rows(8, seed) for seed in range(skip, 40)), [HOOK])

    plain = [b.acts[HOOK] for b in itertools.islice(feed.live(blocks, 64, 800, seed=0), 30)]
    ahead = feed.prefetched(feed.live(blocks, 64, 800, seed=0), one_core=False)
    busy = torch.randn(2048, 2048, device="cuda")
    for wanted in plain:
        busy = (busy @ busy).clamp(-1, 1)
        torch.testing.assert_close(next(ahead).acts[HOOK], wanted)
    ahead.close()


CHECKS = {check.__name__: check for check in (activations_equal_the_cpus, live_rows_are_the_same_beside_a_busy_device)}
