"""Generation: our host against plain transformers, and what steering one feature costs.

    python experiments/bench/generate.py [--tokens 64] [--rounds 20] [--d-sae 16384] [--json FILE]

Same model object, prompt, sampling and seed; every answer has exactly `--tokens` new tokens (the end token
is held back for all). The SAE is random but of the right shape: its cost is that of a trained one. Rounds
interleave, their order rotates; each ratio is the median over rounds of the pair in that round, speed
against `vs`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from inputs import HOOK
from report import save, show

PROMPT = "Who are you, and what do you like about the place where you live?"


def random_sae(host, hook: str, F: int, k: int):
    """An SAE of the right shape on this host, with a threshold that lets about k features fire."""
    from sae.autoencoder import SAE, Metadata, SAEConfig

    d = host.width(hook)
    metadata = Metadata(model_name=host.name, host_fingerprint=host.fingerprint, hook_name=hook)
    sae = SAE(SAEConfig("topk", d, F, k, metadata))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(F, d, generator=generator), dim=1))
        sae.encoder.copy_(sae.W_dec)
        ids = host.tokenizer(PROMPT, return_tensors="pt").input_ids
        x = host.activations(ids, [hook])[hook].float()
        sae.threshold = torch.full((F,), sae.pre_activations(x).topk(k, dim=-1).values[..., -1].median().item())
    return sae.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="smollm2")
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--json")
    options = parser.parse_args()

    from sae.host import Host
    from sae.steering import steer

    host = Host.load(options.host)
    hook = host.hook(options.hook)
    sae = random_sae(host, hook, options.d_sae, options.k)
    host.model.generation_config.min_new_tokens = options.tokens
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    made: dict[str, str] = {}

    @torch.no_grad()
    def transformers() -> str:
        ids = host.chat_tokens(PROMPT)
        torch.manual_seed(0)
        out = host.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.tokens,
            pad_token_id=host.tokenizer.pad_token_id,
            **sampling,
        )
        assert out.shape[1] == ids.shape[1] + options.tokens
        return host.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)[0]

    def ours(edits=()) -> str:
        return host.generate(PROMPT, max_new_tokens=options.tokens, temperature=options.temperature, edits=edits)

    # A strength below the noise of sampling: the answer may stay the same, the work is that of any strength.
    threshold = steer(host, sae, {7: 1.0}, select="threshold").edits
    ranked = steer(host, sae, {7: 1.0}, select="topk").edits
    contenders: dict[str, tuple[Callable[[], str], str]] = {
        "transformers": (transformers, "transformers"),
        "host": (ours, "transformers"),
        "host, one feature by threshold": (lambda: ours(threshold), "host"),
        "host, one feature by plain TopK": (lambda: ours(ranked), "host"),
    }
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # warm-up
        made[name] = contenders[name][0]()
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name][0]()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (_, against) in contenders.items():
        pairs = [b / a for a, b in zip(seconds[name], seconds[against], strict=True)]
        rows.append(
            {
                "name": name,
                "tokens_per_s": options.tokens / statistics.median(seconds[name]),
                "speed": statistics.median(pairs),
                "vs": against,
            }
        )
    facts = {
        "host": options.host,
        "hook": hook,
        "d_sae": options.d_sae,
        "rounds": options.rounds,
        "dtype": str(host.dtype).removeprefix("torch."),
        "same_answer_as_transformers": made["host"] == made["transformers"],
    }
    save(options.json, show("generation", rows, facts=facts))


if __name__ == "__main__":
    main()
