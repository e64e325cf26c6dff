"""What clamping features adds to generation: the same `generate` of transformers with and without our hook.

    python experiments/bench/steer.py [--pairs 40] [--rows 1,32] [--d-sae 8192,131072] [--features 16] [--json FILE]

Each pair is two calls of `model.generate` (plain transformers, greedy, KV cache, exactly --tokens new tokens) right
after each other, in turns first and second; the ratio of a pair is their time with the hook over without. Printed: the
mean ratio with its 95% interval by bootstrap over pairs; beside it what does not depend on this machine's clock: the
microseconds a forward of one token adds, measured on the hook alone (an empty hook's taken off, median of many), the
ATen calls and the multiply-adds of that forward. `empty` is a hook that looks at nothing: what any hook costs. SAEs
are random, of the right shape: jumprelu reads the clamped rows alone, plain TopK ("topk", its own rule) ranks.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from inputs import HOOK
from report import save, show
from torch.utils._python_dispatch import TorchDispatchMode

from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.host import Host, Pass
from sae.steering import Steering, steer

PROMPT = "Who are you, and what do you like about the place where you live?"


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def random_sae(host: Host, architecture: str, F: int, k: int = 32) -> SAE:
    d = host.width(HOOK)
    metadata = Metadata(model_name=host.name, host_fingerprint=host.fingerprint, hook_name=HOOK, outlier_norm=1e4)
    sae = SAE(SAEConfig(architecture, d, F, k if architecture == "topk" else None, metadata)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(F, d, generator=generator), dim=1))
    sae.encoder.copy_(sae.W_dec)
    return sae


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval by bootstrap over pairs."""
    values, generator = torch.tensor(ratios), torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (10_000, len(values)), generator=generator)].mean(dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(values.mean()), low, high


@torch.no_grad()
def microseconds(steering: Steering | None, host: Host, rows: int, forwards: int = 3000) -> tuple[float, int]:
    """What the hook alone takes for one token of each row, and its ATen calls."""
    if steering is None:
        return 0.0, 0
    (_, edit), *_ = steering.edits
    x = torch.randn(rows, 1, host.width(HOOK)).to(host.dtype)
    at = Pass(torch.full((rows, 1), 100), 50, torch.ones(rows, 51), True, 40)
    taken = []
    for _ in range(forwards):
        start = time.perf_counter()
        edit(x, at)
        taken.append(time.perf_counter() - start)
    with Counting() as counted:
        edit(x, at)
    return 1e6 * statistics.median(taken), counted.calls


@torch.no_grad()
def generation(host: Host, rows: int, tokens: int) -> float:
    ids = host.chat_tokens(PROMPT).repeat(rows, 1)
    start = time.perf_counter()
    out = host.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, pad_token_id=host.tokenizer.pad_token_id,
    )  # fmt: skip
    assert out.shape[1] == ids.shape[1] + tokens
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--d-sae", default="8192,131072")
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--architectures", default="jumprelu,topk", help="jumprelu reads by threshold, topk ranks")
    parser.add_argument("--json")
    options = parser.parse_args()
    host = Host.load("smollm2")
    dials = {i: 1.0 for i in range(options.features)}  # below what changes the answer: the work is that of any strength
    contenders: dict[str, Steering | None] = {"empty": None}
    for F in map(int, options.d_sae.split(",")):
        for architecture in options.architectures.split(","):
            sae = random_sae(host, architecture, F)
            contenders[f"{architecture} {F:,}"] = steer(host, sae, dials)
    lines = []
    for rows in map(int, options.rows.split(",")):
        ratios: dict[str, list[float]] = {name: [] for name in contenders}
        generation(host, rows, 4)
        for number in range(options.pairs):
            for name, steering in contenders.items():
                block = host.hooks([(HOOK, lambda x, at: None)]) if steering is None else steering
                seconds = [0.0, 0.0]
                for steered in ((0, 1), (1, 0))[number % 2]:
                    if steered:
                        with block:
                            seconds[1] = generation(host, rows, options.tokens)
                    else:
                        seconds[0] = generation(host, rows, options.tokens)
                ratios[name].append(seconds[1] / seconds[0])
        for name, steering in contenders.items():
            mean, low, high = interval(ratios[name])
            added, calls = microseconds(steering, host, rows)
            n, d, F = options.features, host.width(HOOK), int(name.split()[-1].replace(",", "")) if steering else 0
            products = 0 if steering is None else 2 * n * d + (F * d if name.startswith("topk") else 0)
            lines.append(
                {"rows": rows, "hook": name, "ratio": mean, "low": low, "high": high, "µs a forward": added,
                 "ATen calls": calls, "multiply-adds a row, at most": products}
            )  # fmt: skip
    facts = {"pairs": options.pairs, "tokens": options.tokens, "features": options.features, "dtype": str(host.dtype)}
    save(options.json, show("clamping while generating", lines, facts=facts))


if __name__ == "__main__":
    main()
