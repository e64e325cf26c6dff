"""Composes the rooms of finding: an index over a text or a store, the searches in it, one feature, labels, two corpora
compared, classes told apart, a word looked up.

Everything starts from the folder of an SAE; its index lies in `index/` inside it unless another is named. The host is
loaded only by what has to run text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import features, labels
from sae.activations import store as stores
from sae.activations.harvest import stream
from sae.autoencoder import SAE
from sae.documents import Document
from sae.errors import UserError
from sae.features import Feature, FeatureList, compare, labelled, probe, writing
from sae.features import atlas as embeddings
from sae.features import index as indexes
from sae.features.concept import FEWEST
from sae.features.depths import Depths, depths
from sae.features.sides import holding
from sae.finish import check_host
from sae.host import Host
from sae.labels import feature_of
from sae.recipe import TextRecipe
from sae.token_rows import Text
from sae.training.log import Progress
from sae.training.stop import ended_by_signal

logger = logging.getLogger("sae")


def index(
    sae: SAE | str | Path,
    *,
    host: Host | str | None = None,
    text: str | None = None,
    store: str | Path | None = None,
    out: str | Path | None = None,
    part: str = "all",
    tokens: int | None = None,
    scores: bool = True,
    progress: bool = True,
) -> indexes.Index:
    """Where every feature fires, over the SAE's own text, another `text`, or a `store`.

    An index that was interrupted goes on where it stopped, given the same again.
    part    of the text: all, train, or held-out (by the recipe's share)
    scores  also every feature's output score; without them a search computes those of its candidates
    """
    path = sae if isinstance(sae, str | Path) else None
    sae = sae_of(sae)
    if out is None:
        if path is None:
            raise UserError("index: an SAE object has no folder. Say where the index goes with out=.")
        out = Path(path) / "index"
    host = _own_host(sae, host)
    hook = host.hook(sae.cfg.metadata.hook_name)
    if sae.cfg.architecture == "abstopk":
        logger.warning("index: abstopk has activations below 0, which are left out: it shows where features are above")
    if store is not None:
        source, about, total = _of_store(str(store), host, hook, tokens)
    else:
        source, about, total = _of_text(sae, host, hook, text, part, tokens)
    bar, scored = Progress(total, 0, "tok", name="index", shown=progress), None

    def tell(n: int) -> None:
        nonlocal scored
        scored = scored or Progress(sae.cfg.d_sae, 0, "features", name="output scores", shown=progress)
        scored.update(n)

    strings = host.text_of(list(range(len(host.tokenizer))))
    try:
        kept = f"parts of {writing.PART_ROWS:,} tokens are kept"
        with ended_by_signal(f"interrupted; {kept}, and the same command goes on behind them."):
            return writing.write(
                sae, source, strings, Path(out), hook=hook, host=host, about=about, scores=scores,
                progress=bar.update, score_progress=tell,
            )  # fmt: skip
    finally:
        for one in (bar, scored):
            if one is not None:
                one.close()


def _of_store(path: str, host: Host, hook: str, tokens: int | None) -> tuple[writing.Source, Any, int]:
    opened = stores.Store.open(path)
    opened.check(host.fingerprint, hook, tokenizer=host.tokenizer_fingerprint, width=host.width(hook))
    source = opened.source(hook, host.fingerprint)
    total = opened.n_rows if tokens is None else min(tokens, opened.n_rows)

    def steps(state: Any) -> Iterator[writing.Step]:
        first, done = (state["slab"], state["rows"]) if state else (0, 0)
        documents = [] if state else opened.documents
        for slab in range(first, len(opened.slabs)):
            if done >= total:
                return
            block = opened.read([source], slab)
            done += len(block)
            yield writing.Step(block, documents, {"slab": slab + 1, "rows": done})
            documents = []

    about = {"store": opened.path, "tokens": tokens, "rows": opened.n_rows, "host": host.fingerprint}
    return steps, about, total


def _of_text(
    sae: SAE, host: Host, hook: str, text: str | None, part: str, tokens: int | None
) -> tuple[writing.Source, Any, int | None]:
    recipe = text_recipe(sae)
    if text is not None and text != recipe.source:
        recipe = dataclasses.replace(recipe, source=text, max_tokens=None)
    if tokens is not None:
        recipe = dataclasses.replace(recipe, max_tokens=tokens)
    limit = sae.cfg.metadata.outlier_norm
    limits = None if limit is None else {hook: limit}
    source = Text(recipe, host, part.replace("-", "_"))

    def steps(state: Any) -> Iterator[writing.Step]:
        read: list[Document] = []
        packer = source.rows(read.append, state)
        for block in stream(host, packer, [hook], outlier_norm=limits):
            new, read[:] = list(read), []
            yield writing.Step(block, new, packer.state)

    about = {"text": dataclasses.asdict(recipe), "part": part, "host": host.fingerprint, "dtype": str(host.dtype)}
    return steps, about, source.expected_tokens()


def find(
    sae: str | Path,
    concept: str | None = None,
    *,
    pos: Sequence[str] | None = None,
    neg: Sequence[str] | None = None,
    by_name: bool = False,
    text: str | None = None,
    token: str | None = None,
    words: str | None = None,
    like: str | int | None = None,
    effect: str | None = None,
    toward: str | None = None,
    goal: str = "detect",
    n: int = 10,
    index_path: str | Path | None = None,
    host: Host | str | None = None,
) -> FeatureList:
    """Features of the SAE in a folder, by one way: a concept (or own texts `pos` and `neg`), a text that they fire on,
    a token, full-text words, likeness to a feature ("1286", a label, or "OTHER_SAE:12"), the word that they make the
    model say (`effect`), or a set that leads toward a concept.

    A concept that at least 8 of the index's documents hold needs no host; otherwise texts are made from its name. Own
    texts and `text` are run through the host, and goal "steer" has it answer two questions with each candidate turned
    up. Raises UserError for no way or several.
    """
    given = {"a concept": concept or pos or neg, "--text": text, "--token": token, "--words": words, "--like": like,
             "--effect": effect, "--toward": toward}  # fmt: skip
    ways = [name for name, value in given.items() if value is not None]
    if len(ways) != 1:
        told = f"{' and '.join(ways)} given" if ways else "nothing to look for"
        raise UserError(
            f'find: {told}. Give one: a concept such as "golden gate bridge", texts with --pos, or --text, --token, '
            "--words, --like, --effect or --toward."
        )
    opened = open_index(sae, index_path)
    loaded = SAE.load(sae)
    if text is not None:
        found = features.by_text(opened, text, loaded, _own_host(loaded, host), n=n)
    elif token is not None:
        found = features.by_token(opened, token, sae=loaded, n=n)
    elif words is not None:
        found = features.by_words(opened, words, sae=loaded, n=n)
    elif effect is not None:
        found = features.by_effect(opened, effect, sae=loaded, n=n)
    elif like is not None:
        direction, own = _direction(str(like), loaded)
        found = features.by_likeness(opened, direction, loaded, n=n, leave=own)
    else:
        name = toward if toward is not None else concept
        few = name is not None and len(holding(opened, name)) < FEWEST
        run = _own_host(loaded, host) if pos is not None or by_name or goal == "steer" or few else None
        if toward is not None:
            found = features.toward(opened, toward, by_name=by_name, sae=loaded, host=run, n=min(n, 5))
        else:
            found = features.find(
                opened, concept, pos=pos, neg=neg, by_name=by_name, sae=loaded, host=run, goal=goal, n=n
            )
    return found if loaded.cfg.metadata.model_name else dataclasses.replace(found, host=opened.facts.host)


def _direction(like: str, sae: SAE) -> tuple[Tensor, int]:
    """The decoder row that is meant, and its number where it is this SAE's own."""
    folder, sign, name = like.rpartition(":")
    if sign and Path(folder).exists():
        other = SAE.load(folder)
        (feature,) = other.check_features([feature_of(name, other.labels)])
        return other.W_dec.detach()[feature], -1
    (feature,) = sae.check_features([feature_of(like, sae.labels)])
    return sae.W_dec.detach()[feature], feature


def show(
    sae: str | Path,
    feature: int | str,
    *,
    n: int = 10,
    index_path: str | Path | None = None,
    host: Host | str | None = None,
    ask: bool = False,
) -> Feature:
    """One feature (its number, or the user's label) of the SAE in a folder, whole. With `ask` its host answers a
    question at 0, 3 and 10 times its maximum."""
    loaded = SAE.load(sae)
    (number,) = loaded.check_features([feature_of(feature, loaded.labels)])
    opened = open_index(sae, index_path)
    opened.check(loaded)
    asked = _own_host(loaded, host) if ask else None
    return features.show(opened, number, loaded, asked, n=n)


def label(sae: str | Path, feature: int | str | None = None, name: str | None = None) -> dict[int, str]:
    """The user's labels of an SAE's folder, after `feature` was given this one (an empty one takes it away)."""
    if not (Path(sae) / "cfg.json").exists():
        raise UserError(f"{sae}: no SAE there. Check the path.")
    known = labels.read(sae)
    if feature is None:
        return known
    number = feature_of(feature, known)
    SAE.load(sae).check_features([number])
    if name is None:
        return {number: known[number]} if number in known else {}
    return labels.change(sae, number, name)


def diff(
    sae: str | Path,
    a: str,
    b: str,
    *,
    n: int = 10,
    fdr: float = 0.05,
    index_path: str | Path | None = None,
    host: Host | str | None = None,
    progress: bool = True,
) -> compare.Diff:
    """Which features tell the texts of two files apart; examples come from the SAE's index where there is one."""
    texts = labelled.of_files([a, b])
    indexed = index_path is not None or (Path(sae) / "index").exists()
    index = open_index(sae, index_path) if indexed else None
    loaded = SAE.load(sae)
    host = _own_host(loaded, host)
    bar = Progress(None, 0, "tok", name="read", shown=progress)
    try:
        return compare.diff(loaded, host, texts, index=index, n=n, fdr=fdr, progress=bar.update)
    finally:
        bar.close()


def classify(
    sae: str | Path,
    paths: Sequence[str],
    *,
    label: str | None = None,
    widths: Sequence[int] = probe.WIDTHS,
    host: Host | str | None = None,
    progress: bool = True,
) -> probe.Classification:
    """How well few features tell classes of texts apart: a class a file, or one file and the field that names them."""
    if label is not None and len(paths) != 1:
        raise UserError(f"a label field is looked up in one file, here are {len(paths)}. Give one, or no label.")
    texts = labelled.of_files(paths) if label is None else labelled.of_field(paths[0], label)
    loaded = SAE.load(sae)
    host = _own_host(loaded, host)
    reading = Progress(None, 0, "tok", name="read", shown=progress)
    try:
        texts, data = probe.pooled(loaded, host, texts, reading.update)
    finally:
        reading.close()
    total = len(texts.texts) * (len(texts.classes) if len(texts.classes) > 2 else 1)
    fitting = Progress(total, 0, "texts", name="fit", shown=progress)
    try:
        return probe.classify(texts, data, widths=widths, progress=fitting.update)
    finally:
        fitting.close()


@dataclasses.dataclass(frozen=True)
class LookedUp:
    """What one host's atlas says; None for what was not asked, or what a word of several pieces does not have."""

    host: str
    tied: bool | None
    """Whether embeddings and unembedding are one matrix; None where there is no unembedding."""
    atlas: embeddings.Atlas
    near: embeddings.Neighbours | None
    depths: Depths | None
    score: tuple[embeddings.KindScore, ...] | None


def atlas(
    word: str | None = None,
    *,
    host: Host | str = "smollm2",
    text: str = "bundled",
    n: int = 10,
    layers: bool = True,
    score: bool = False,
    progress: bool = True,
) -> LookedUp:
    """A word in a host's input embeddings and, with `layers`, in its residual stream; `score` measures the atlas on the
    shipped pairs. `text` counts tokens. Raises UserError for an empty word, and as the atlas' own pages say."""
    if word is not None:
        embeddings.check_word(word)
    lists = embeddings.shipped()
    name, host = (host, Host.load(host)) if isinstance(host, str) else (host.name, host)
    counted = Progress(None, 0, "tok", name=f"counting {text}", shown=progress)
    made = embeddings.of_host(host, text, progress=counted.update)
    counted.close()
    near = embeddings.neighbours(made, word, n) if word is not None and made.forms(word) else None
    followed = None
    if word is not None and layers:
        read = Progress(len(lists.words), 0, "words", name="layers", shown=progress)
        followed = depths(host, word, lists.words, lists.carrier, n, progress=read.update)
        read.close()
    scores = embeddings.score(made, lists.pairs, n) if score else None
    return LookedUp(name, embeddings.is_tied(host), made, near, followed, scores)


def open_index(sae_path: str | Path, index_path: str | Path | None = None) -> indexes.Index:
    """The index of an SAE folder; a UserError that says how to make one."""
    path = Path(index_path) if index_path else Path(sae_path) / "index"
    if not Path(sae_path).exists():
        raise UserError(f"{sae_path}: no such SAE. Check the path.")
    if not path.exists():
        where = f" --out {index_path}" if index_path else ""
        raise UserError(f"{path}: no index. Make it with `sae index {sae_path}{where}`.")
    return indexes.Index.open(path)


def sae_of(sae: SAE | str | Path) -> SAE:
    """An SAE, or the one in a folder."""
    return sae if isinstance(sae, SAE) else SAE.load(sae)


_OTHERWISE = "Pass --host NAME, or host=Host.load(...)."


def _own_host(sae: SAE, host: Host | str | None) -> Host:
    """`host_of`, which has to be the SAE's own or an adapter of it."""
    found = host_of(sae, host)
    check_host(sae, found)
    return found


def host_of(sae: SAE, host: Host | str | None = None) -> Host:
    """The host that is given, loaded where it is a name; without one that which the SAE was trained on."""
    if isinstance(host, Host):
        return host
    if host:
        return Host.load(host)
    if not (name := sae.cfg.metadata.model_name):
        raise UserError(f"this SAE does not say which model it was trained on. {_OTHERWISE}")
    try:
        return Host.load(name)
    except UserError as error:
        raise UserError(f"{error} That is the model which the SAE names; for another copy: {_OTHERWISE}") from error


def text_recipe(sae: SAE) -> TextRecipe:
    """The text part of the recipe that trained the SAE; the defaults where it is unknown."""
    known = sae.cfg.metadata.recipe.get("text")
    return TextRecipe(**known) if known else TextRecipe(context=sae.cfg.metadata.context_size or 128, held_out=0.0)
