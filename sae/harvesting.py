"""From a recipe to an activation store: the text as token rows, the forecast, the host's pass over them.

Promise: before a host runs for long it is said how many rows, how many bytes and about how much time it will take, and
what the disk cannot hold is refused. A harvest that was stopped, however it was, goes on with the same command; a
finished one is opened. What SAELens cached is read in place of the host's pass, after a few rows were run again to see
that this host made them. Several processes (RANK and WORLD_SIZE, as torchrun sets them) share one store.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from sae.activations import build
from sae.activations.cached import TOKENS, Cached
from sae.activations.harvest import Block, limits_of, stream
from sae.activations.manifest import Reading, TextFacts, layout_of, read_manifest
from sae.activations.shards import ROW_BYTES, Layout
from sae.activations.store import Store
from sae.activations.verify import bad_shards
from sae.documents import told
from sae.errors import Stopped, UserError, first_line
from sae.host import Host
from sae.parallel import Rank, this_rank
from sae.places import Place
from sae.recipe import Recipe
from sae.text import Rows
from sae.token_rows import Text, open_host, positions_of
from sae.training.log import Progress

# From so many rows on, compiled layers pay for their compilation on a CPU with bfloat16 instructions: 3 to 15% more
# tokens/s for 11 s (4 s from the cache). In float32 they give up to 5%, on CUDA nobody has measured them.
_COMPILED_FROM = 300_000
_TRIED = 1024  # tokens of the forward that is timed
# Relative difference of the same rows on another machine, in bfloat16 or int8. SmolLM2's bfloat16 rows differ from its
# float32 ones by 0.3 to 3.1% (32 sites of 8 layers), its bfloat16 weights in float32 by 0.1 to 0.6%.
_SAME = 0.04
_AT_ONCE = 64  # sequences between two looks at the progress bar


# ---- what it will take -------------------------------------------------------------------------------------


def _size(n: float) -> str:
    unit, name = (1e9, "GB") if n >= 1e9 else (1e6, "MB") if n >= 1e6 else (1e3, "kB")
    return f"{n / unit:,.1f} {name}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


Blocks = Callable[..., Iterator[Block]]
"""(rows, hooks, *, outlier_norm) → a block of each batch of rows: by the host, or of what was cached."""


def _pace(blocks: Blocks, rows: Rows, hooks: Sequence[str]) -> float:
    """Tokens a second of the fastest of three short forwards, which the first one warms up."""
    some = rows.part(0, max(1, _TRIED // rows.tokens.shape[1]))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _block in blocks([some], hooks):
            pass
        seconds.append(time.perf_counter() - start)
    return some.tokens.numel() / min(seconds)


# ---- the harvest -------------------------------------------------------------------------------------------


def harvest(
    recipe: Recipe,
    *,
    host: Host | None = None,
    hooks: Sequence[str] | None = None,
    part: str = "train",
    rank: Rank | None = None,
    repair: bool = False,
    progress: bool = True,
) -> Store:
    """Run the host over the text and write the activation store. A finished one is opened, an unfinished one goes on.

    hooks    all are read in one forward; None is the recipe's one
    rank     this process's share; by default from RANK and WORLD_SIZE
    repair   look at every shard that is there first, and make those anew that are not what was written
    A store that has this text, read by another host, is given one more reading. Raises Stopped after Ctrl-C, or where
    other ranks have not finished theirs; UserError for a store of other text, and where the disk cannot hold it.
    """
    place = _place(recipe)
    host = host or open_host(recipe.host)
    names = [host.hook(name) for name in hooks or [recipe.host.hook]]
    rank = rank or this_rank()
    facts, wanted = _facts(recipe, host, part), _wanted(recipe, host, names)
    if not repair and (store := _opened(place, facts, wanted)) is not None:
        return store
    cached = _cached(recipe, host, names)
    blocks: Blocks = partial(stream, host) if cached is None else cached.blocks
    if cached is not None:  # before anything is written
        _refuse_another_host_s(cached, place, recipe, host, wanted)
    with build.writing(place, rank):
        with build.changing_manifest(place):
            manifest = _planned(place, recipe, host, facts, wanted, part, cached, progress)
            readings = _readings(place, manifest, host, wanted, recipe, blocks, progress)
            if repair:
                for reading in readings:
                    manifest = _reopened(place, manifest, reading, progress)
        stores = [_read(place, manifest, reading, host, blocks, rank, progress) for reading in readings]
    for reading, store in zip(readings, stores, strict=True):
        if store is None:
            left = len(manifest["shards"]) - len(build.finished(place, manifest, reading))
            raise Stopped(
                f"{rank} has done its share of {place}; {left:,} of {len(manifest['shards']):,} shards are still to "
                "come from other ranks, and the last of these completes the store. Start again a rank that was killed.",
                code=0,
            )
    return Store.open(place.url)


def _read(
    place: Place, manifest: dict[str, Any], reading: int, host: Host, blocks: Blocks, rank: Rank, progress: bool
) -> Store | None:
    """One reading's shards that are this rank's and not there yet; the store when the reading is complete."""
    read = manifest["readings"][reading]["facts"]
    hooks: dict[str, int] = read["hooks"]
    there = build.finished(place, manifest, reading)
    now = read_manifest(place)  # after the notes: who gathers them writes it before they go
    if now is not None and now["readings"][reading]["shards"] is not None:
        return Store.open(place.url)
    mine = [n for n in rank.mine(range(len(manifest["shards"]))) if n not in there]
    with host.compiled() if read["computed"].endswith("compiled") and mine else nullcontext():
        if mine:
            first = build.TokenRows(place, manifest).of(mine[0])
            a_second = _pace(blocks, first, list(hooks))
            _say(progress, _announced(place, manifest, reading, mine, len(there), a_second, rank))
            _make(place, manifest, reading, mine, blocks, list(hooks), progress)
    store = build.merged(place, reading, rank)
    if store is not None:
        _say(progress and bool(mine), masked(store, store.numbers.index(reading)))
    return store


def forecast(recipe: Recipe, *, hooks: Sequence[str] | None = None, part: str = "train") -> dict[str, Any]:
    """What `harvest` would take, as facts for a table: the text is read and counted, nothing is written."""
    place, host = _place(recipe), open_host(recipe.host)
    names = [host.hook(name) for name in hooks or [recipe.host.hook]]
    facts, wanted = _facts(recipe, host, part), _wanted(recipe, host, names)
    if (store := _opened(place, facts, wanted)) is not None:
        return {"store": place.url, "rows": store.n_rows, "harvested": "already", "on disk (MB)": 0, "time (s)": 0}
    cached = _cached(recipe, host, names)
    blocks: Blocks = partial(stream, host) if cached is None else cached.blocks
    packer = _packer(recipe, host, part, cached)(lambda document: None)
    first = next(packer, None)
    if first is None:
        raise UserError(f"{told(recipe.text.source)}: holds no text (part {part}). Check the source.")
    for _rows in packer:
        pass
    rows = packer.counts["positions"]
    needed = rows * _bytes_a_row(facts, wanted)
    a_second = _pace(blocks, first, names)
    free = place.free()
    return {
        "store": place.url,
        "host": host.name,
        "hooks": ", ".join(f"{hook} ({width:,})" for hook, width in wanted.hooks.items()),
        "rows": rows,
        "documents": packer.counts["documents"],
        "padding, special and first positions": 1 - _valid(packer.counts) / rows,
        "on disk (MB)": round(needed / 1e6, 1),
        "free there (MB)": None if free is None else round(free / 1e6, 1),
        "tokens a second": round(a_second),
        "time (s)": round(rows / a_second, 1),
    }


def for_training(recipe: Recipe, hooks: Sequence[str], host: Host, progress: bool) -> Store:
    """The recipe's store, harvested now where there is none or it is unfinished; `hooks` as the host names them.

    Refused, with both values, where it is of another host, hook, tokenizer, width or text.
    """
    place = _place(recipe)
    manifest = read_manifest(place)
    if manifest is None or not any(one["shards"] is not None for one in manifest["readings"]):
        return harvest(recipe, host=host, hooks=hooks, progress=progress)
    store = Store.open(place.url)
    for hook in hooks:
        store.check(host.fingerprint, hook, tokenizer=host.tokenizer_fingerprint, width=host.width(hook))
    build.refuse_other_text(place, manifest, _facts(recipe, host, "train"))
    wanted = _wanted(recipe, host, hooks)
    for hook in hooks:
        source = store.source(hook, host.fingerprint)
        if source.dtype != wanted.dtype:
            raise UserError(
                f"{place}: holds {hook} as {source.dtype}, the recipe says activations.dtype={wanted.dtype}. "
                "Change the one or harvest into another folder."
            )
    return store


def checked_by_host(store: Store, number: int) -> dict[str, Any]:
    """Load a reading's host, compare its fingerprints and some sequences run again; a UserError says both values."""
    reading, text = store.readings[number], store.text
    host = Host.load(reading.host, dtype=reading.computed.partition(",")[0])
    for hook, width in reading.hooks.items():
        if host.fingerprint != reading.host_fingerprint:
            raise UserError(
                f"{store.path}: was harvested from {reading.host} ({reading.host_fingerprint}), the {reading.host} of "
                f"today is {host.fingerprint}. Harvest again, or find the weights that it was made with."
            )
        store.check(host.fingerprint, hook, tokenizer=host.tokenizer_fingerprint, width=width)
    sources = [source for source in store.sources if source.reading == number]
    block = store.read(sources, 0)
    rows = build.TokenRows(store.place, dict(store.manifest)).of(0).part(0, len(block) // text.context)
    (again,) = stream(host, [rows], list(reading.hooks), outlier_norm=reading.outlier_norm)
    error = _difference(again, block)
    if not error <= _SAME:  # NaN is no small error
        raise UserError(
            f"{store.path}: {len(again):,} tokens run again differ by {error:.1%} from what is there. Harvest again."
        )
    return {"rows run again": len(again), "their relative difference": error}


def _difference(again: Block, there: Block) -> float:
    """Of rows run again, relative, at the hook where it is largest; NaN where one is not finite."""
    errors = [
        (acts - there.acts[hook])[again.mask].float().norm() / acts[again.mask].float().norm()
        for hook, acts in again.acts.items()
    ]
    return float(torch.stack(errors).max())


def masked(store: Store, reading: int = 0) -> str:
    """What share of the rows does not count, and why."""
    counts, rows = store.manifest["counts"], store.n_rows
    valid = sum(entry.valid for entry in store.entries[reading])
    why = {"padding": "padding", "special": "special tokens", "first": "first positions", "sliced": "outside positions"}
    parts = [f"{words} {counts[key] / rows:.2%}" for key, words in why.items() if counts[key]]
    parts.append(f"outlier norms {(_valid(counts) - valid) / rows:.2%}")
    return f"{valid:,} of {rows:,} rows count ({valid / rows:.1%}); masked: {', '.join(parts)}"


def _valid(counts: dict[str, int]) -> int:
    """Positions that the text lets count."""
    return counts["positions"] - sum(counts[name] for name in ("padding", "special", "first", "sliced"))


def _place(recipe: Recipe) -> Place:
    if recipe.activations.store is None:
        raise UserError(
            "activations.store: not set. Give the folder to harvest into, for example activations.store=runs/acts."
        )
    return Place(recipe.activations.store)


def _cached(recipe: Recipe, host: Host, hooks: Sequence[str]) -> Cached | None:
    path = recipe.activations.cached_activations_path
    return None if path is None else Cached(path, host, hooks, recipe.text.context)


def _facts(recipe: Recipe, host: Host, part: str) -> TextFacts:
    text = recipe.text
    facts = TextFacts(
        source=text.source,
        column=text.column,
        part=part,
        held_out=text.held_out,
        max_tokens=text.max_tokens,
        context=text.context,
        isolate_documents=text.isolate_documents,
        positions=text.positions,
        tokenizer=host.tokenizer_fingerprint,
        shard_rows=recipe.activations.shard_rows,
    )
    path = recipe.activations.cached_activations_path
    if path is None:
        return facts
    whole = {"column": TOKENS, "part": "all", "held_out": 0.0, "isolate_documents": False}
    return replace(facts, source=f"{build.CACHED}{path}", **whole)


def _wanted(recipe: Recipe, host: Host, hooks: Sequence[str]) -> Reading:
    """What this recipe reads. Of what was cached, `computed` is the format that it was compared in."""
    return Reading(
        host=recipe.host.name,
        host_fingerprint=host.fingerprint,
        computed="float32, cached by SAELens"
        if recipe.activations.cached_activations_path
        else str(host.dtype).removeprefix("torch."),
        hooks={hook: host.width(hook) for hook in hooks},
        dtype=recipe.activations.dtype,
        outlier_norm={},
    )


def _computed(recipe: Recipe, host: Host, manifest: dict[str, Any], wanted: Reading, progress: bool) -> str:
    """How the forward computes: the number format, and whether its layers are compiled. A function of the recipe, the
    machine and the number of rows, so that a harvest goes on as it began."""
    asked = recipe.activations.compile
    outside = all(hook.endswith(("hook_resid_pre", "hook_resid_post")) for hook in wanted.hooks)
    pays = host.device.type == "cpu" and host.dtype == torch.bfloat16 and sum(manifest["shards"]) >= _COMPILED_FROM
    if asked == "off" or (asked == "auto" and not (pays and outside)):
        return wanted.computed
    if not outside:
        raise UserError(
            f"activations.compile: on, and {', '.join(wanted.hooks)} are read inside the layers. Leave it to auto, or "
            "read resid_pre and resid_post alone."
        )
    _say(progress, "compiling the host's layers (some ten seconds)")
    nothing = torch.zeros(1, manifest["text"]["context"], dtype=torch.int32)
    rows = Rows(nothing, nothing, nothing, nothing.bool())
    try:
        with host.compiled():
            for _block in stream(host, [rows], list(wanted.hooks)):
                pass
    except Exception as error:  # no compiler, or a layer that it does not take: torch raises many kinds
        reason = first_line(error)
        if asked == "on":
            raise UserError(f"activations.compile: on, and it fails here ({reason}). Set it to off.") from error
        _say(True, f"layers are not compiled: {reason}")
        return wanted.computed
    return f"{wanted.computed}, compiled"


def _opened(place: Place, facts: TextFacts, wanted: Reading) -> Store | None:
    """The store, where all that is wanted is there."""
    manifest = read_manifest(place)
    if manifest is None:
        return None
    build.refuse_other_text(place, manifest, facts)
    numbers, missing = build.begun(place, manifest, wanted)
    if missing or any(manifest["readings"][number]["shards"] is None for number in numbers):
        return None
    store = Store.open(place.url)
    store.refuse_missing()
    return store


def _bytes_a_row(facts: TextFacts, wanted: Reading) -> int:
    """Of the shards, and of the token rows beside them."""
    return Layout("", facts.context, wanted.hooks, wanted.dtype).bytes_a_row() + ROW_BYTES


def _refuse_too_large(place: Place, needed: int) -> None:
    free = place.free()
    if free is not None and needed > free:
        raise UserError(
            f"{place}: needs {_size(needed)}, {_size(free)} are free there. Free some, choose another folder, or lower "
            "text.max_tokens or take activations.dtype=int8."
        )


def _planned(
    place: Place,
    recipe: Recipe,
    host: Host,
    facts: TextFacts,
    wanted: Reading,
    part: str,
    cached: Cached | None,
    progress: bool,
) -> dict[str, Any]:
    total = Text(recipe.text, host, part).expected_tokens() if cached is None else None
    bar = Progress(total, 0, "tok", name="text", shown=progress)
    a_row = _bytes_a_row(facts, wanted)
    try:
        return build.planned(
            place,
            facts,
            lambda: build.plan(
                place,
                facts,
                _packer(recipe, host, part, cached),
                lambda rows: _refuse_too_large(place, rows * a_row),
                bar.update,
            ),
        )
    finally:
        bar.close()


def _packer(recipe: Recipe, host: Host, part: str, cached: Cached | None) -> Callable[..., Any]:
    """What gives token rows, asked with what takes note of documents."""
    if cached is None:
        return Text(recipe.text, host, part).rows
    return partial(cached.rows, positions=positions_of(recipe.text), max_tokens=recipe.text.max_tokens)


def _readings(
    place: Place,
    manifest: dict[str, Any],
    host: Host,
    wanted: Reading,
    recipe: Recipe,
    blocks: Blocks,
    progress: bool,
) -> list[int]:
    """The numbers of this host's readings that have the wanted hooks; a new one is begun for those that none has."""
    numbers, missing = build.begun(place, manifest, wanted)
    if missing is None:
        return numbers
    first = build.TokenRows(place, manifest).of(0).part(0, _AT_ONCE)
    (block,) = blocks([first], list(missing.hooks))
    computed = missing.computed
    if recipe.activations.cached_activations_path is None:
        computed = _computed(recipe, host, manifest, missing, progress)
    whole = replace(missing, computed=computed, outlier_norm=limits_of(block))
    manifest["readings"].append({"facts": asdict(whole), "shards": None})
    place.write_json(build.MANIFEST, manifest)
    return [*numbers, len(manifest["readings"]) - 1]


def _refuse_another_host_s(cached: Cached, place: Place, recipe: Recipe, host: Host, wanted: Reading) -> None:
    """Raise UserError where what was cached is not what the host computes, for hooks that the store has not yet.

    In float32, as SAELens caches by default: a host in bfloat16 would differ by as much as some other model does.
    """
    manifest = read_manifest(place)
    missing = wanted if manifest is None else build.begun(place, manifest, wanted)[1]
    first = next(_packer(recipe, host, "train", cached)(lambda document: None), None)
    if missing is None or first is None:
        return
    hooks = list(missing.hooks)
    (there,), (again,) = cached.blocks([first], hooks), stream(host.in_float32(), [first], hooks)
    if not (error := _difference(again, there)) <= _SAME:  # NaN is no small error
        raise UserError(
            f"{cached.path}: {len(first):,} rows of {cached.context:,} tokens run through {host.name} in float32 "
            f"differ by {error:.1%} from what is there. Give the host that made it; rows that were cut (seqpos_slice) "
            "or weights that were processed (fold_ln, center_writing_weights) cannot be used."
        )


def _announced(
    place: Place, manifest: dict[str, Any], reading: int, mine: Sequence[int], there: int, a_second: float, rank: Rank
) -> str:
    """What is still to be written, and how long this process's share takes; refused where the disk cannot hold it."""
    sizes, facts = manifest["shards"], manifest["readings"][reading]["facts"]
    needed = sum(sizes) * (len(sizes) - there) // len(sizes) * layout_of(manifest, reading).bytes_a_row()
    _refuse_too_large(place, needed)
    wide = ", ".join(f"{hook} ({width:,})" for hook, width in facts["hooks"].items())
    free = "" if (left := place.free()) is None else f" ({_size(left)} free)"
    more = f" · {there:,} of {len(sizes):,} shards are there" if there else ""
    more += f" · {rank}" if rank.world > 1 else ""
    seconds = sum(sizes[number] for number in mine) / a_second
    return (
        f"{sum(sizes):,} rows ({manifest['counts']['sequences']:,} sequences) of {wide} from {facts['host']} → "
        f"{place}: {_size(needed)} on disk{free}, about {_duration(seconds)} at {a_second:,.0f} tokens/s{more}"
    )


def _make(
    place: Place,
    manifest: dict[str, Any],
    reading: int,
    mine: Sequence[int],
    blocks: Blocks,
    hooks: Sequence[str],
    progress: bool,
) -> None:
    facts = manifest["readings"][reading]["facts"]
    total = sum(manifest["shards"][number] for number in mine)
    bar = Progress(total, 0, "tok", name="harvest", shown=progress)

    def forward(rows: Rows) -> Iterator[Block]:
        parts = (rows.part(start, start + _AT_ONCE) for start in range(0, len(rows), _AT_ONCE))
        for block in blocks(parts, hooks, outlier_norm=facts["outlier_norm"]):
            bar.update(len(block))
            yield block

    try:
        with _sigterm_interrupts():
            build.run(place, manifest, reading, mine, forward)
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, _Terminated) else 130
        raise Stopped(f"{place}: stopped; whole shards are kept. Go on with the same command.", code) from interrupt
    finally:
        bar.close()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a harvest as Ctrl-C does."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Only in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reopened(place: Place, manifest: dict[str, Any], reading: int, progress: bool) -> dict[str, Any]:
    """Take out of the reading what is not what was written, so that it is made anew."""
    bad = bad_shards(place, manifest, reading)
    for why in bad.values():
        _say(progress, f"made anew: {why}")
    return build.without(place, manifest, reading, set(bad))


def _say(shown: bool, line: str) -> None:
    if shown:
        print(line, file=sys.stderr)
