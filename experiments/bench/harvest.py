"""Harvest, tokens/s: our stopped forward in the machine's dtype against TransformerBridge in float32.

    python experiments/bench/harvest.py [--rows 16] [--context 128] [--rounds 7] [--json FILE]

The peer is what SAELens does: `run_with_cache(names_filter=hook, stop_at_layer=L+1)` on the TransformerLens
bridge, float32, under no_grad. Same model, same rows of the bundled corpus, one process, interleaved,
medians. Before the clock: our float32 activations must equal the bridge's (relative error below 1e-4). Rows
that count are `ours` (plain causal attention, like for like) and `ours, isolated` (attention inside
documents, what `sae harvest` does).
"""

import argparse
import time
from collections.abc import Callable

import torch
from inputs import HOOK
from report import save, show, spread
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="smollm2")
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto", help="ours")
    parser.add_argument("--json")
    options = parser.parse_args()

    from sae.host import Host
    from sae.text import documents, pack

    host, plain = Host.load(options.host, dtype=options.dtype), Host.load(options.host, dtype="float32")
    packed = pack(documents("bundled"), host.tokenizer, options.context, special_ids=host.special_ids)
    rows = next(iter(packed))
    tokens, doc, pos = (part[: options.rows].long() for part in (rows.tokens, rows.doc, rows.pos))
    hook, stop = host.hook(options.hook), host.layer(options.hook) + 1
    bridge = plain.bridge

    def ours() -> Tensor:
        return host.activations(tokens, [hook])[hook]

    def ours_isolated() -> Tensor:
        return host.activations(tokens, [hook], pos=pos, doc=doc)[hook]

    def peer() -> Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter=[hook], stop_at_layer=stop)
        return cache[hook]

    truth = peer()
    own = plain.activations(tokens, [hook])[hook]
    error = ((own - truth).norm() / truth.norm()).item()
    if error > 1e-4:
        raise SystemExit(f"parity failed: our float32 activations differ by {error:.2e}; nothing was timed.")
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "ours, isolated": ours_isolated,
        "TransformerBridge float32": peer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):  # the first round warms up
        for name, forward in contenders.items():
            start = time.perf_counter()
            forward()
            if number:
                seconds[name].append(time.perf_counter() - start)
    slow = spread(seconds["TransformerBridge float32"])[0]
    result = []
    for name, values in seconds.items():
        median, low, high = spread(values)
        n = tokens.numel()
        result.append(
            {
                "name": name,
                "tokens_per_s": n / median,
                "quartile_low": n / high,
                "quartile_high": n / low,
                "times_bridge": slow / median,
            }
        )
    facts = {
        "host": options.host,
        "hook": hook,
        "rows": list(tokens.shape),
        "dtype": str(host.dtype).removeprefix("torch."),
        "float32_error": error,
    }
    save(options.json, show("harvest", result, facts=facts))


if __name__ == "__main__":
    main()
