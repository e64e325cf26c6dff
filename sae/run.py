"""Composes the rooms into the verbs: harvest, train, evaluate, index, find, show, steer. Used alike by the command
line, notebooks and scripts; it prints nothing but progress on stderr, and gives back objects.

`train` reads: open the source of activations, take a sample, begin or resume, loop, export, measure, evaluate.
"""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import __version__, config, files, kernels, machine
from sae.activations import batches as feed
from sae.activations import store as stores
from sae.activations.harvest import stream
from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.errors import Stopped, UserError
from sae.evaluation import core
from sae.features import index as indexes
from sae.features import search
from sae.host import Host
from sae.objectives import Objective, Params, objective
from sae.recipe import Recipe, TextRecipe
from sae.sources import Feed, Text, from_store, from_tensor, harvest, live, open_host
from sae.stats import calibrate_threshold, measure
from sae.steering import side_by_side, steer
from sae.text import Document
from sae.training import checkpoint
from sae.training.dead import Dead, dead_window
from sae.training.log import Log, Progress
from sae.training.loop import Batch, Run, fit
from sae.training.optimizer import RowAdam
from sae.training.schedule import peak_lr, steps_of

__all__ = ["evaluate", "find", "harvest", "index", "info", "show", "steer_prompt", "train"]
QUICK = 8192  # held-out rows behind the progress line
FINISHED = "feature_stats.safetensors"  # written with the finished SAE
MAY_CHANGE = ("log.", "evaluation.", "training.save_every", "host.device", "out")  # when a run is resumed
MEASURED = 500_000  # rows at most for the statistics at the end of training


# ---- train -----------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    acts: Any = None,
    *,
    host: Host | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SAE:
    """Train the recipe's SAE, from its store, live from its host, or from your own `acts` [N, d] (tensor or memmap).

    Returns the finished SAE, which is also in `recipe.out`/sae with statistics and (where there is a host)
    evaluation on held-out documents. Raises Stopped after Ctrl-C or SIGTERM with a checkpoint; `resume=True` goes on.
    """
    folder = Path(recipe.out)
    before = _earlier(folder, recipe, resume)
    saved = checkpoint.all_of(folder)
    steps = steps_of(recipe.training.tokens, recipe.training.batch)
    if before and saved and saved[-1].name.endswith(f"{steps:08d}") and (folder / "sae" / FINISHED).exists():
        return SAE.load(folder / "sae")
    if acts is None:
        if before.get("source") == "given rows":
            raise UserError(f"{folder}: was trained on given rows. Go on in Python: train(recipe, acts, resume=True).")
        host = host or open_host(recipe.host)
        source = from_store(recipe, host, progress) if recipe.activations.store else live(recipe, host)
    else:
        source = from_tensor(recipe, acts)
    if before and (source.kind, source.d_in) != (before["source"], before["d_in"]):
        raise UserError(
            f"{folder}: began on {before['source']} of width {before['d_in']:,}, now it would go on with {source.kind} "
            f"of width {source.d_in:,}. Resume with what it began with."
        )

    low = machine.dtype_of(recipe.training.dtype) == torch.bfloat16
    if before:  # the number format goes on as it began, whatever this machine would choose
        low = before["encoder_dtype"] == "bfloat16"
    scale = source.d_in**0.5 / source.sample.norm(dim=1).mean().item()
    sample = source.sample * scale
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    trained = objective(recipe, variance, low=low)
    params = trained.begin(sample)
    optimizer = RowAdam(params)
    dead = Dead(recipe.sae.d_sae, dead_window(recipe.training.tokens, recipe.training.dead_after))
    start, position = 0, None
    if before and saved:
        state = checkpoint.load(saved[-1], params, optimizer, dead)
        start, position = state["step"], state["position"]

    run = Run(
        folder=folder,
        steps=steps,
        start=start,
        peak_lr=peak_lr(recipe.training.lr, recipe.sae.d_sae, steps),
        evaluate_every=round(steps * recipe.evaluation.every),
        save_every=recipe.training.save_every,
        facts={"norm_factor": scale},
    )
    _begin_folder(folder, recipe, run, dead.window, low, source)
    if progress:
        print(
            f"{machine.describe()} · encoder in {'bfloat16' if low else 'float32'} · {source.sequences}",
            file=sys.stderr,
        )
    held_out = _held_out_sample(recipe, host, source.hook, source.outlier_norm, scale) if host is not None else None
    log = Log(
        folder,
        config.to_dict(recipe),
        wandb=recipe.log.wandb,
        every=recipe.log.every,
        total=steps * recipe.training.batch,
        done=start * recipe.training.batch,
        shown=progress,
    )
    batches = feed.prefetched(source.batches(position))
    try:
        finished = fit(
            params,
            trained,
            optimizer,
            dead,
            _normed(batches, scale),
            run,
            log,
            partial(_quick, trained, held_out),
        )
    finally:
        batches.close()
        log.close()
    if not finished:
        raise Stopped(f"stopped and saved. Go on with: sae train {folder} --resume")

    sae = _export(recipe, params, source, host, scale)
    sae.threshold = torch.full((recipe.sae.d_sae,), calibrate_threshold(sae, [source.sample]))
    bar = Progress(None, 0, "tok", name="statistics", shown=progress)
    sae.stats = measure(sae, source.blocks(), max_tokens=MEASURED, progress=bar.update)
    bar.close()
    sae.save(folder / "sae")
    if host is not None and recipe.evaluation.tokens:
        report = _evaluate(sae, host, recipe.text, recipe.evaluation.tokens, recipe.evaluation.ce_tokens, progress)
        sae = _with_evaluation(sae, report)
        sae.save(folder / "sae")
        files.write_json(folder / "sae" / "evaluation.json", report)
    return sae


def _earlier(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
    """What an earlier start of this run resolved (empty for a new run); refuses to overwrite or to change it."""
    if not resume:
        if checkpoint.all_of(folder):
            raise UserError(
                f"{folder}: holds a run already. "
                f"Go on with `sae train {folder} --resume`, choose another `out`, or delete it."
            )
        return {}
    if not (folder / "resolved.json").exists():
        return {}
    before = files.read_json(folder / "resolved.json")
    then, now = _flat(before["recipe"]), _flat(config.to_dict(recipe))
    for name in now:
        if name in then and then[name] != now[name] and not name.startswith(MAY_CHANGE):
            raise UserError(
                f"{folder}: began with {name} = {then[name]}, now it is {now[name]}. Resume without that change, or "
                "begin a new run with another `out`."
            )
    return before


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    pages = {name: page if isinstance(page, dict) else {"": page} for name, page in recipe.items()}
    return {f"{name}.{field}".rstrip("."): value for name, page in pages.items() for field, value in page.items()}


def _begin_folder(folder: Path, recipe: Recipe, run: Run, window: int, low: bool, source: Feed) -> None:
    """Only now, when everything is open and checked, is anything written."""
    if run.start == 0 and (folder / "metrics.jsonl").exists():
        files.write_text(folder / "metrics.jsonl", "")
    files.write_text(folder / "recipe.yaml", config.to_yaml(recipe))
    files.write_json(
        folder / "resolved.json",
        {
            "recipe": config.to_dict(recipe),
            "steps": run.steps,
            "lr": run.peak_lr,
            "dead_after": window,
            "encoder_dtype": "bfloat16" if low else "float32",
            "source": source.kind,
            "d_in": source.d_in,
            "hook": source.hook,
            "norm_factor": run.facts["norm_factor"],
            "machine": machine.describe(),
            "versions": {"goldengate-sae": __version__, "torch": torch.__version__},
            "git_revision": git_revision(),
        },
    )


def git_revision() -> str:
    """Revision of the code that runs, where it is a checkout; else empty."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _normed(batches: Iterator[feed.RawBatch], scale: float) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(batch.acts.to(torch.float32, copy=True).mul_(scale), batch.position)


def _held_out_sample(recipe: Recipe, host: Host, hook: str, outlier_norm: float | None, scale: float) -> Tensor | None:
    """Normed held-out activations for the progress line; None where nothing is held out or asked."""
    if not recipe.evaluation.every or not recipe.text.held_out:
        return None
    limits = None if outlier_norm is None else {hook: outlier_norm}
    parts, n = [], 0
    for block in stream(host, Text(recipe.text, host, "held_out").rows(), [hook], outlier_norm=limits):
        parts.append(block.acts[hook][block.mask].float())
        n += len(parts[-1])
        if n >= QUICK:
            break
    return torch.cat(parts) * scale if parts else None


def _quick(trained: Objective, held_out: Tensor | None, params: Params) -> dict[str, float]:
    if held_out is None:
        return {}
    codes = trained.encode(params, held_out)
    miss = kernels.decode(codes, params.W_dec, params.b_dec) - held_out
    spread = held_out - held_out.mean(0)
    return {"held_out/fvu": (miss.double().square().sum() / spread.double().square().sum()).item()}


def _export(recipe: Recipe, params: Params, source: Feed, host: Host | None, scale: float) -> SAE:
    """Back to raw units: decoder rows stay of unit norm, so weights stay and biases are divided by the scale."""
    metadata = Metadata(
        model_name=recipe.host.name if host is not None else "",
        host_fingerprint=host.fingerprint if host is not None else "",
        hook_name=source.hook,
        context_size=recipe.text.context,
        dataset=recipe.text.source if host is not None else "",
        norm_factor=scale,
        outlier_norm=source.outlier_norm,
        recipe=config.to_dict(recipe),
        git_revision=git_revision(),
    )
    sae = SAE(SAEConfig(recipe.sae.architecture, source.d_in, recipe.sae.d_sae, recipe.sae.k, metadata))
    with torch.no_grad():
        sae.encoder.copy_(params.encoder)
        sae.W_dec.copy_(params.W_dec)
        sae.b_enc.copy_(params.b_enc / scale)
        sae.b_dec.copy_(params.b_dec / scale)
    return sae.requires_grad_(False)


# ---- evaluate --------------------------------------------------------------------------------------------


def evaluate(
    sae: SAE | str | Path,
    *,
    host: Host | None = None,
    text: str | None = None,
    tokens: int = 20_000,
    ce_tokens: int = 5_000,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate on the held-out documents of the SAE's own text, or on all of another `text`. A report for JSON;
    `sae.evaluation.core.headline` has its figures."""
    sae = _sae(sae)
    recipe = _text_recipe(sae)
    if text is not None and text != recipe.source:
        recipe = dataclasses.replace(recipe, source=text, held_out=0.0, max_tokens=None)
    return _evaluate(sae, host or host_of(sae), recipe, tokens, ce_tokens, progress)


def _evaluate(sae: SAE, host: Host, text: TextRecipe, tokens: int, ce_tokens: int, progress: bool) -> dict[str, Any]:
    check_host(sae, host)
    part = "held_out" if text.held_out else "all"
    source = Text(text, host, part)
    rows = source.rows()
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"text: {text.source} has no {part.replace('_', '-')} documents. Hold out more or give another text."
        )
    in_sample = part == "all" and text.source == sae.cfg.metadata.dataset
    about = "in sample: nothing was held out" if in_sample else f"{part.replace('_', '-')} documents"
    if progress:
        print(f"text: {text.source}, {about}", file=sys.stderr)
    bar: Progress | None = None

    def tell(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress(total, 0, "tok", name="evaluate", shown=progress)
        bar.update(done - bar.done)

    try:
        report = core.evaluate(
            sae,
            host,
            itertools.chain([first], rows),
            tokens=tokens,
            ce_tokens=ce_tokens,
            groups=_Groups(source.documents),
            progress=tell,
        )
    finally:
        if bar is not None:
            bar.close()
    report["eval_config"] |= {"text": text.source, "documents": about}
    return report


class _Groups(Sequence[str]):
    """The groups of documents that are still being read."""

    def __init__(self, documents: list[Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number):
        return self.documents[number].group


def _with_evaluation(sae: SAE, report: dict[str, Any]) -> SAE:
    metadata = dataclasses.replace(sae.cfg.metadata, evaluation=core.headline(report))
    sae.cfg = dataclasses.replace(sae.cfg, metadata=metadata)
    return sae


# ---- index, find, show, steer ----------------------------------------------------------------------------


def index(
    sae: SAE | str | Path,
    *,
    host: Host | None = None,
    text: str | None = None,
    store: str | Path | None = None,
    out: str | Path | None = None,
    tokens: int | None = None,
    scores: bool = True,
    progress: bool = True,
) -> indexes.Index:
    """Where every feature fires, over the SAE's own text (all parts), another `text`, or a `store`.

    scores  also every feature's output score; without them a search computes those of its candidates
    """
    path = sae if isinstance(sae, str | Path) else None
    sae = _sae(sae)
    if out is None:
        if path is None:
            raise UserError("index: an SAE object has no folder. Say where the index goes with out=.")
        out = Path(path) / "index"
    host = host or host_of(sae)
    check_host(sae, host)
    hook = host.hook(sae.cfg.metadata.hook_name)
    if store is not None:
        opened = stores.Store.open(store)
        opened.check(host.fingerprint, hook)
        blocks, found, total = opened.blocks(hook), opened.documents, opened.n_rows
    else:
        recipe = _text_recipe(sae)
        if text is not None and text != recipe.source:
            recipe = dataclasses.replace(recipe, source=text, max_tokens=None)
        if tokens is not None:
            recipe = dataclasses.replace(recipe, max_tokens=tokens)
        source = Text(recipe, host, "all")
        limit = sae.cfg.metadata.outlier_norm
        blocks = stream(host, source.rows(), [hook], outlier_norm=None if limit is None else {hook: limit})
        found, total = source.documents, source.expected_tokens()
    bar = Progress(total, 0, "tok", name="index", shown=progress)
    scored = Progress(sae.cfg.d_sae, 0, "features", name="output scores", shown=progress and scores)
    strings = host.text_of(list(range(len(host.tokenizer))))
    try:
        return indexes.build(
            sae,
            blocks,
            found,
            strings,
            Path(out),
            hook=hook,
            host=host,
            scores=scores,
            progress=bar.update,
            score_progress=scored.update,
        )
    finally:
        bar.close()
        scored.close()


def open_index(sae_path: str | Path, index_path: str | Path | None = None) -> indexes.Index:
    """The index of an SAE folder; a UserError that says how to make one."""
    path = Path(index_path) if index_path else Path(sae_path) / "index"
    if not Path(sae_path).exists():
        raise UserError(f"{sae_path}: no such SAE. Check the path.")
    if not path.exists():
        raise UserError(f"{path}: no index. Make it with `sae index {sae_path}`.")
    return indexes.Index.open(path)


def find(
    sae: str | Path,
    concept: str | None = None,
    *,
    pos: Sequence[str] | None = None,
    neg: Sequence[str] | None = None,
    goal: str = "detect",
    n: int = 10,
    index_path: str | Path | None = None,
    host: Host | None = None,
) -> list[search.Found]:
    """Features of the SAE in a folder, by contrast between texts with the concept and texts of the same form without.

    A concept is looked up in the folder's index and needs no host. Own texts (`pos`, `neg`) are run through it, and
    goal "steer" has it answer two questions with each candidate turned up.
    """
    opened = open_index(sae, index_path)
    if pos is None and goal != "steer":
        return search.find(opened, concept, neg=neg, goal=goal, n=n)
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    return search.find(opened, concept, pos=pos, neg=neg, sae=loaded, host=host, goal=goal, n=n)


def show(sae: str | Path, feature: int, *, n: int = 10, index_path: str | Path | None = None) -> search.Feature:
    """One feature of the SAE in a folder, whole."""
    loaded = SAE.load(sae)
    loaded.check_features([feature])
    return search.show(open_index(sae, index_path), feature, loaded, n=n)


def steer_prompt(
    sae: str | Path,
    dials: str | Sequence[str],
    prompt: str,
    *,
    host: Host | None = None,
    positions: Any = "all",
    kind: str = "clamp",
    stream_plain: Callable[[str], None] | None = None,
    stream_steered: Callable[[str], None] | None = None,
    **sampling: Any,
) -> tuple[str, str]:
    """The plain and the steered answer to one prompt."""
    loaded = SAE.load(sae)
    host = host or host_of(loaded)
    steering = steer(host, loaded, dials, positions=positions, kind=kind)
    return side_by_side(host, steering, prompt, stream_plain=stream_plain, stream_steered=stream_steered, **sampling)


def info(path: str | Path) -> dict[str, Any]:
    """What a folder is (SAE, store, index, run) and what is known of it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Check the path.")
    if (path / "cfg.json").exists():
        sae = SAE.load(path)
        facts = {
            "architecture": sae.cfg.architecture,
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "k": sae.cfg.k,
        }
        metadata = sae.cfg.metadata
        facts |= {"host": metadata.model_name, "hook": metadata.hook_name, "units": "raw"}
        facts |= {name: figure["value"] for name, figure in metadata.evaluation.items() if isinstance(figure, dict)}
        return {
            "what": "SAE",
            **facts,
            "index": (path / "index").exists(),
            "statistics": sae.stats is not None,
        }
    if (path / stores.MANIFEST).exists():
        store = stores.Store.open(path)
        return {"what": "activation store", "rows": store.n_rows, **dataclasses.asdict(store.description)}
    if (path / "index.json").exists():
        return {"what": "feature index", **dataclasses.asdict(indexes.Index.open(path).facts)}
    if (path / "recipe.yaml").exists():
        saved = checkpoint.all_of(path)
        return {
            "what": "training run",
            "finished": (path / "sae" / "cfg.json").exists(),
            "last checkpoint": saved[-1].name if saved else None,
            "recipe": files.read_json(path / "resolved.json")["recipe"] if (path / "resolved.json").exists() else None,
        }
    raise UserError(f"{path}: neither an SAE, a store, an index nor a run. Give one of these folders.")


def _sae(sae: SAE | str | Path) -> SAE:
    return sae if isinstance(sae, SAE) else SAE.load(sae)


def host_of(sae: SAE) -> Host:
    """Load the host that an SAE was trained on."""
    name = sae.cfg.metadata.model_name
    if not name:
        raise UserError("this SAE does not say which model it was trained on. Pass host=Host.load(...).")
    return Host.load(name)


def check_host(sae: SAE, host: Host) -> None:
    """Refuse a host that the SAE was not trained on, saying both."""
    known = sae.cfg.metadata.host_fingerprint
    if known and known != host.fingerprint:
        raise UserError(
            f"the SAE was trained on {sae.cfg.metadata.model_name} ({known}), this host is {host.name} "
            f"({host.fingerprint}). Use its own host."
        )


def _text_recipe(sae: SAE) -> TextRecipe:
    """The text part of the recipe that trained the SAE; the defaults where it is unknown."""
    known = sae.cfg.metadata.recipe.get("text")
    return TextRecipe(**known) if known else TextRecipe(context=sae.cfg.metadata.context_size or 128, held_out=0.0)
