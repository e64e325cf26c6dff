"""Harvest, tokens/s: rows to shards on disk, against the bare truncated forward and SAELens's ActivationsStore.

    python experiments/bench/harvest.py [--sequences 128] [--context 128] [--rounds 7] [--dtype auto] [--json FILE]

`ours, to disk` is what `sae harvest` does with token rows that are planned: forwards with attention inside documents,
masks, norms, checksums, shards written and synced beside the next forward; `compiled` as it does from 300k rows on.
`ours, no disk` is the same without writing. `bare forward` is the limit of plain layers: the first layers of the plain
transformers model in the same number format, no mask, no hooks, nothing kept, in the better of two batch sizes of each
round. SAELens runs its own store in its own environment (peers.sh saelens), in float32 (its default) and with autocast.
Same model, same rows of the bundled corpus, interleaved in random order, medians of paired rounds. Before the clock:
our float32 activations must equal SAELens's (relative error below 1e-4). A CPU without bf16 instructions:
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 before the command, and --dtype float32.
"""

import argparse
import copy
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from contender import interpreter
from inputs import HOOK
from report import save, show, spread
from torch import Tensor, nn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto", help="ours, and the bare forward's")
    parser.add_argument("--json")
    options = parser.parse_args()

    from sae.activations import build
    from sae.activations.harvest import stream
    from sae.harvesting import harvest
    from sae.host import Host
    from sae.places import Place
    from sae.recipe import ActivationsRecipe, HostRecipe, Recipe, TextRecipe
    from sae.token_rows import Text

    temporary = tempfile.TemporaryDirectory(prefix="harvest-")
    work = Path(temporary.name)
    host = Host.load("smollm2", dtype=options.dtype)
    recipe = Recipe(
        host=HostRecipe(hook=options.hook, dtype=options.dtype),
        text=TextRecipe(context=options.context, max_tokens=(options.sequences + 16) * options.context),
        activations=ActivationsRecipe(store=str(work / "acts"), shard_rows=64 * options.context),
    )
    store = harvest(recipe, host=host, progress=False)
    # Whole shards of 64 sequences, for everybody: the last one is smaller, and compiled layers compute whole groups.
    full = [number for number, n in enumerate(store.shard_rows) if n == 64 * options.context]
    tokens = torch.cat([rows.tokens for rows in Text(recipe.text, host, "train").rows()])[: 64 * len(full)].long()
    hook, layers = host.hook(options.hook), host.layer(options.hook) + 1

    def written(host: Host, disk: bool) -> Callable[[], int]:
        def run() -> int:
            place = Place(tempfile.mkdtemp(dir=work))
            manifest = copy.deepcopy(dict(store.manifest))
            manifest["readings"][0]["shards"] = None
            whole = build.TokenRows(store.place, manifest)
            limits = store.readings[0].outlier_norm

            def forward(part: object) -> Iterator:
                return stream(host, [part], [hook], outlier_norm=limits)  # type: ignore[list-item]

            if disk:
                for name in store.place.names():
                    if name.startswith("rows-"):
                        place.write(name, [store.place.read(name)])
                build.run(place, manifest, 0, full, forward)
            else:
                for number in full:
                    for _block in forward(whole.of(number)):
                        pass
            return sum(manifest["shards"][number] for number in full)

        return run

    bare = truncated(host.model.model, layers)

    def plain(group: int) -> Callable[[], int]:
        @torch.no_grad()
        def run() -> int:
            for part in tokens.split(group):
                bare(input_ids=part, use_cache=False)
            return tokens.numel()

        return run

    compiled = Host.load("smollm2", dtype=options.dtype)
    opened = ExitStack()
    opened.enter_context(compiled.compiled())
    contenders: dict[str, Callable[[], int]] = {
        "ours, to disk, compiled": written(compiled, True),
        "ours, to disk": written(host, True),
        "ours, no disk": written(host, False),
        "bare forward, 8 rows": plain(8),
        "bare forward, 64 rows": plain(64),
    }
    peers = start_peers(work, tokens, options.hook, autocast=host.dtype == torch.bfloat16)
    contenders |= {name: peer.round for name, peer in peers.items()}
    facts = {"hook": hook, "dtype": str(host.dtype).removeprefix("torch."), "sequences": len(tokens)}
    if "SAELens 6.54" in peers:
        own = Host.load("smollm2", dtype="float32").activations(tokens[:16], [hook])[hook]
        error = float((own - peers["SAELens 6.54"].check()).norm() / own.norm())
        facts["float32_error"] = error
        if error > 1e-4:
            raise SystemExit(f"parity failed: our float32 activations differ by {error:.2e}; nothing was timed.")
    # Medians of paired rounds: what disturbs this machine for a while disturbs all contenders of a round.
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):  # the first round warms up
        for name, run in random.sample(list(contenders.items()), len(contenders)):  # places in a round take turns
            start = time.perf_counter()
            n = run()
            if number:
                rates[name].append(n / (time.perf_counter() - start))
    best = [max(pair) for pair in zip(*(rates[name] for name in rates if name.startswith("bare")), strict=True)]
    ours = rates["ours, to disk, compiled"]
    result = []
    for name, values in rates.items():
        median, low, high = spread(values)
        result.append(
            {
                "name": name,
                "tokens_per_s": median,
                "quartile_low": low,
                "quartile_high": high,
                "share_of_bare_forward": paired(values, best),
                "compiled_is_times": paired(ours, values),
            }
        )
    save(options.json, show("harvest", result, facts=facts))
    temporary.cleanup()


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of one rate over another."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def truncated(model: nn.Module, layers: int) -> nn.Module:
    """The plain model with its first layers alone, sharing their weights; no final norm, no head."""
    twin = copy.copy(model)
    twin.__dict__ = dict(model.__dict__)
    twin._modules = dict(model._modules) | {"layers": model.layers[:layers], "norm": nn.Identity()}  # type: ignore[index]
    twin.config = copy.copy(model.config)  # type: ignore[assignment]
    twin.config.num_hidden_layers = layers  # type: ignore[union-attr]
    return twin


class Peer:
    """A waiting process of peer_harvest.py."""

    def __init__(self, work: Path, name: str, words: list[str]):
        self.file = work / f"{name}.safetensors"
        script = str(Path(__file__).with_name("peer_harvest.py"))
        self.process = subprocess.Popen(
            [str(interpreter("SAELens")), script, *words, "--check", str(self.file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(work / f"{name}.log").open("w"),
            text=True,
        )
        self.log = work / f"{name}.log"
        self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.log.read_text()[-2000:])
        return json.loads(line)

    def round(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("round 2\n")
        self.process.stdin.flush()
        return self._answer()["tokens"]

    def check(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.file)["acts"]


def start_peers(work: Path, tokens: Tensor, hook: str, autocast: bool) -> dict[str, Peer]:
    from safetensors.torch import save_file

    from sae import files

    try:
        interpreter("SAELens")
    except FileNotFoundError as error:
        print(error)
        return {}
    many = tokens.repeat(20, 1)  # its data set must not end while it is timed
    save_file({"tokens": many.contiguous()}, work / "rows.safetensors")
    (folder,) = (path for path in (files.cache_dir() / "hosts").iterdir() if path.name.startswith("SmolLM2"))
    words = ["--model", str(folder), "--rows", str(work / "rows.safetensors"), "--hook", hook]
    peers = {"SAELens 6.54": Peer(work, "plain", words)}
    if autocast:
        peers["SAELens 6.54, autocast"] = Peer(work, "autocast", [*words, "--autocast"])
    return peers


if __name__ == "__main__":
    main()
