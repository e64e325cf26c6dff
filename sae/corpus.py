"""The maker of the bundled corpus: a host answers prompts (topics × forms), sampled in batches, resumable.

Prompts come from a JSON list of blocks {topics, forms, samples}; every form is filled with every topic.
One line of `parts.jsonl` is one finished batch, so an interrupted run goes on at the next batch; each
batch has a seed of its own, so the passages do not depend on where it was interrupted. At the end
`corpus.jsonl.gz` (lines of topic, form, text, prompt) and `corpus.json` (the recipe and the counts) are
written beside it; both are free of dates. Passages that repeat themselves, are shorter than 20 tokens, or have
half of their 5-word sequences in common with another one are counted and dropped.

Cost: about 400 tokens/s for a 135M host in bfloat16 on 2 cores with nothing else running; the same bits
need the same machine and thread count.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae import bundled, files
from sae.errors import UserError
from sae.host import Host

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MIN_TOKENS = 20
MIN_DISTINCT = 0.5  # share of 4-grams that are distinct; a passage below it goes in circles
NEAR = 0.5  # share of the 5-word sequences of the shorter of two passages that both have: near-duplicates
_BATCHES_SORTED_TOGETHER = 8  # by length of the prompt: nearly equal lengths, little left padding


@dataclass(frozen=True)
class Prompt:
    """One request to the host; `topic` and `form` are what the passage is filed under."""

    topic: str
    form: str
    text: str


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: softmax(logits / temperature) over the `top_k` best, cut at mass `top_p`."""

    temperature: float = 0.85
    top_p: float = 0.95
    top_k: int = 64
    max_new_tokens: int = 126


def prompts(path: str | Path | None = None) -> list[tuple[Prompt, int]]:
    """Read blocks of prompts (the bundled ones by default): each prompt with the samples it is to have.

    A block is {"topics": […], "forms": […]} with optional "samples" (1), "topic" (file all under this
    name) and "names" ({phrase in the prompt: name of the topic}). Raises UserError when the file is not of
    that shape.
    """
    path = Path(path) if path else bundled.prompts_path()
    blocks = files.read_json(path)
    try:
        found = [
            (
                Prompt(
                    topic=block.get("topic") or block.get("names", {}).get(phrase, phrase),
                    form=form,
                    text=form.replace("{}", phrase),
                ),
                int(block.get("samples", 1)),
            )
            for block in blocks
            for phrase in block["topics"]
            for form in block["forms"]
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: not a list of blocks {{topics, forms, samples}} ({error!r}). "
            "Write it like sae/bundled/topics.json."
        ) from error
    if not found:
        raise UserError(f"{path}: holds no prompts. Give at least one topic and one form.")
    return found


def schedule(
    wanted: Sequence[tuple[Prompt, int]], batch: int, seed: int, length: Callable[[str], int]
) -> Iterator[list[Prompt]]:
    """Endless batches: in round r each prompt that is to have more than r samples, then all, again and again.

    A round is shuffled, then sorted by length within runs of a few batches, so that padding is small.
    """
    lengths = {prompt.text: length(prompt.text) for prompt, _ in wanted}
    most = max(samples for _, samples in wanted)
    for turn in itertools.count():
        order = [prompt for prompt, samples in wanted if samples > turn or turn >= most]
        random.Random(f"{seed}/{turn}").shuffle(order)
        run = batch * _BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), run):
            near = sorted(order[start : start + run], key=lambda prompt: lengths[prompt.text])
            yield from (near[i : i + batch] for i in range(0, len(near), batch))


def is_degenerate(tokens: Sequence[int]) -> bool:
    """Too short to be a passage, or going in circles."""
    if len(tokens) < MIN_TOKENS:
        return True
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(grams)) < MIN_DISTINCT * len(grams)


def write(
    host: Host,
    out: str | Path,
    *,
    tokens: int = 200_000,
    batch: int = 64,
    seed: int = 0,
    sampling: Sampling | None = None,
    prompts_file: str | Path | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Have the host write at least `tokens` tokens of passages into folder `out`; return recipe and counts.

    workers  batches sampled at once, a thread each; give each one core (OMP_NUM_THREADS=1) where jobs compete
    resumes  when `out/parts.jsonl` is there: its batches are kept; another recipe in it is a UserError
    result   `out/corpus.jsonl.gz` and `out/corpus.json`; equal for an interrupted and an uninterrupted run
    """
    if min(tokens, batch, workers) < 1:
        raise UserError(
            f"corpus: tokens, batch and workers must be at least 1 ({tokens:,}, {batch:,}, {workers:,}). "
            "Give larger numbers."
        )
    sampling = sampling or Sampling()
    out = Path(out)
    source = Path(prompts_file) if prompts_file else bundled.prompts_path()
    wanted = prompts(source)
    recipe = {
        "model": host.name,
        "fingerprint": host.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "prompts": source.name,
        "prompts_sha256": files.checksum(source),
        "seed": seed,
        "batch": batch,
        "sampling": vars(sampling).copy(),
    }
    done = _finished(out / "parts.jsonl", recipe)
    lines = files.Lines(out / "parts.jsonl")
    if done is None:
        lines.add({"recipe": recipe})
        done = []
    kept = sum(passage["tokens"] for line in done for passage in line["passages"])
    encoded = {prompt.text: host.chat_tokens(prompt.text)[0] for prompt, _ in wanted}
    batches = schedule(wanted, batch, seed, lambda text: len(encoded[text]))
    stops = frozenset(host.special_ids) | _end_ids(host)

    def answer(number: int, todo: list[Prompt]) -> list[list[int]]:
        own = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        requests = [encoded[prompt.text] for prompt in todo]
        return sample(host, requests, sampling, stops, seed=int.from_bytes(own[:7], "little"), on_step=step)

    def step(drawn: int) -> None:
        bar.update(drawn)
        if stopped.is_set():
            raise CancelledError

    # A batch a thread, not a batch for all threads: on a busy machine the latter wait for each other at
    # every product (50 against 250 tokens/s, seen with three other jobs on 2 cores). Finished batches are
    # written in order.
    bar = tqdm(total=tokens, initial=kept, unit="tok", unit_scale=True, disable=not progress, desc="corpus")
    stopped = threading.Event()
    numbered = itertools.islice(enumerate(batches), len(done), None)
    with bar, contextlib.closing(lines), ThreadPoolExecutor(workers) as pool:
        running: deque[tuple[int, list[Prompt], Future[list[list[int]]]]] = deque()
        try:
            while kept < tokens:
                while len(running) < workers:
                    number, todo = next(numbered)
                    running.append((number, todo, pool.submit(answer, number, todo)))
                number, todo, future = running.popleft()
                line = {"batch": number, **_passages(host, todo, future.result())}
                lines.add(line)
                done.append(line)
                kept += sum(passage["tokens"] for passage in line["passages"])
        finally:
            stopped.set()  # a batch that was begun beyond the last is not needed
    return _publish(out, recipe, done)


def _passages(host: Host, todo: list[Prompt], answers: list[list[int]]) -> dict[str, Any]:
    kept = [
        {
            "topic": prompt.topic,
            "form": prompt.form,
            "text": host.tokenizer.decode(answer, skip_special_tokens=True).strip().rstrip("\ufffd"),
            "prompt": prompt.text,
            "tokens": len(answer),
        }
        for prompt, answer in zip(todo, answers, strict=True)
        if not is_degenerate(answer)
    ]
    return {"dropped": len(todo) - len(kept), "passages": kept}


def _finished(path: Path, recipe: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The finished batches of an earlier run of the same recipe, or None when there was none."""
    if not path.exists():
        return None
    try:
        rows = files.read_lines(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON lines ({error}). Delete it or choose another folder.") from error
    if not rows:
        return None
    other = rows[0].get("recipe")
    if other != recipe:
        differing = sorted(key for key in recipe if not isinstance(other, dict) or other.get(key) != recipe[key])
        raise UserError(
            f"{path}: was begun with another recipe (differs in {', '.join(differing)}). "
            "Give the same settings, or choose another folder."
        )
    return rows[1:]


def _publish(out: Path, recipe: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    passages: dict[str, dict[str, Any]] = {}
    for line in done:
        for passage in line["passages"]:
            passages.setdefault(passage["text"], passage)
    if not passages:
        raise UserError(f"{out}: the host wrote no usable passage. Try another host or other prompts.")
    # Shuffled by hash, so that the first part of the corpus is like the whole.
    distinct = sorted(passages.values(), key=lambda row: hashlib.sha256(row["text"].encode("utf-8")).digest())
    rows = [distinct[i] for i in without_near_duplicates([row["text"] for row in distinct])]
    fields = ("topic", "form", "text", "prompt")
    text = "".join(json.dumps({key: row[key] for key in fields}, ensure_ascii=False) + "\n" for row in rows)
    files.write_bytes(out / "corpus.jsonl.gz", gzip.compress(text.encode("utf-8"), 9, mtime=0))
    counts = {
        "passages": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "topics": len({row["topic"] for row in rows}),
        "forms": len({row["form"] for row in rows}),
        "prompts": len({row["prompt"] for row in rows}),
        "dropped_degenerate": sum(line["dropped"] for line in done),
        "dropped_duplicates": sum(len(line["passages"]) for line in done) - len(distinct),
        "dropped_near_duplicates": len(distinct) - len(rows),
    }
    summary = {**recipe, "counts": counts}
    files.write_json(out / "corpus.json", summary)
    return summary


def without_near_duplicates(texts: Sequence[str]) -> list[int]:
    """Numbers of the texts to keep: of two that share `NEAR` of the shorter one's 5-word sequences, the first."""
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    for number, text in enumerate(texts):
        words = text.casefold().split()
        own = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
        shared = Counter(other for one in own for other in holders.get(one, ()))
        if any(count >= NEAR * min(len(own), sizes[other]) for other, count in shared.items()):
            continue
        sizes[number] = len(own)
        for one in own:
            holders.setdefault(one, []).append(number)
    return list(sizes)


def _end_ids(host: Host) -> frozenset[int]:
    ends = getattr(getattr(host.model, "generation_config", None), "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


@torch.inference_mode()
def sample(
    host: Host,
    requests: Sequence[Int[Tensor, " T"]],
    sampling: Sampling,
    stops: frozenset[int],
    *,
    seed: int,
    on_step: Callable[[int], object] = lambda n: None,
) -> list[list[int]]:
    """Sample one answer (token ids without the stop) to each request, in one left-padded batch.

    Only the `top_k` best logits are sorted: sorting a vocabulary of 49k for 64 rows, as `generate` with
    top_p does, costs nearly as much as the model's step (0.08 s against 0.11 s, 2 cores). Rows that are
    done leave the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(request) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request) :] = request.cpu()
        mask[row, longest - len(request) :] = 1
    ids, mask = ids.to(host.device), mask.to(host.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in requests]
    rows = list(range(len(requests)))  # which request each row of the batch is
    ended: set[int] = set()
    cache = None
    for _ in range(sampling.max_new_tokens):
        output = host.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        drawn = _draw(output.logits[:, -1].float().cpu(), sampling, generator)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            if token in stops:
                ended.add(row)
            elif row not in ended:
                answers[row].append(token)
        alive = [i for i, row in enumerate(rows) if row not in ended]
        on_step(len(alive))
        if not alive:
            break
        ids, position = drawn[:, None].to(host.device), position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if len(alive) <= 0.8 * len(rows):  # copying the cache has a cost too
            keep = torch.tensor(alive, device=mask.device)
            cache.batch_select_indices(keep)
            ids, position, mask = ids[keep], position[keep], mask[keep]
            rows = [rows[i] for i in alive]
    return answers


def _draw(logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator) -> Int[Tensor, " B"]:
    best, token = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    share = (best / sampling.temperature).softmax(-1)
    over = share.cumsum(-1) - share > sampling.top_p  # the token that reaches top_p stays
    share = share.masked_fill(over, 0)
    return token.gather(1, torch.multinomial(share, 1, generator=generator))[:, 0]
