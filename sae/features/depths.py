"""A word on its way through the layers: its nearest words in the residual stream, and where its pieces become one.

All words stand at the end of one carrier sentence and are read at their last token, at every depth: what enters block
0, then what each block leaves. Cosines are between residuals less the mean of the listed words at that depth; never
against E, whose basis the stream leaves. A form that splits has joined its whole form (one token) at the depth from
which on the whole one is the nearest of all listed words. Units: the host's. Cost: one forward over some five tokens
a word (SmolLM2, 411 words, one core in bfloat16: some 4 to 7 s); memory [depths, words, d] in float32.
Limits: one carrier, one position; another sentence may give other depths. What the last block leaves tells of the
next token, so that forms may part again there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.atlas import check_word, word_of
from sae.text import begin_id

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.host import Host

_BATCH = 64  # sentences in one forward


@dataclass(frozen=True)
class Join:
    """A form that splits, against its whole form, at S depths.

    rank     place of the whole form among it and the listed words, by cosine to the split form; 1 is nearest
    cosine   of the whole form to the split one
    """

    form: str
    pieces: tuple[str, ...]
    rank: Int[Tensor, " S"]
    cosine: Float[Tensor, " S"]

    @property
    def depth(self) -> int | None:
        """The first depth from which on the rank is 1 up to the last; None: never."""
        return joined(self.rank)


@dataclass(frozen=True)
class Depths:
    """A word at S depths (`sites`, hook names): its pieces, and the n nearest of `listed` other words, with cosines.

    whole    the form that is one token, None where every form splits; `joins` are the forms that split
    """

    word: str
    pieces: tuple[str, ...]
    sites: tuple[str, ...]
    listed: int
    near: tuple[tuple[tuple[str, float], ...], ...]
    whole: str | None
    joins: tuple[Join, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        joins = [
            {"form": join.form, "pieces": join.pieces, "rank": join.rank.tolist(), "cosine": join.cosine.tolist(),
             "joins_at": None if join.depth is None else self.sites[join.depth]}
            for join in self.joins
        ]  # fmt: skip
        near = [[{"word": word, "cosine": cosine} for word, cosine in words] for words in self.near]
        facts = {"word": self.word, "pieces": self.pieces, "sites": self.sites, "whole": self.whole}
        return {**facts, "near": near, "joins": joins}


def forms_of(word: str) -> list[str]:
    """A word as written, in lower case, capitalised and in capitals, each once."""
    written = word.strip()
    return list(dict.fromkeys([written, written.lower(), written.capitalize(), written.upper()]))


def pieces_in(host: Host, carrier: str, word: str) -> tuple[list[int], int]:
    """Token ids of "carrier word", and how many of the last of them are the word's.

    raises   UserError: the word is empty, or the tokenizer makes nothing of it
    """
    check_word(word)

    def read(text: str) -> list[int]:
        return list(host.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    alone, whole = read(carrier), read(f"{carrier} {word.strip()}")
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    if same == len(whole):
        raise UserError(f"{word!r}: {host.name}'s tokenizer makes no token of it. Give a word that it can read.")
    begin = begin_id(host.tokenizer)
    return ([] if begin is None else [begin]) + whole, len(whole) - same


def residuals(
    host: Host, words: Sequence[str], carrier: str, *, progress: Callable[[int], object] | None = None
) -> tuple[tuple[str, ...], Float[Tensor, "S W d"]]:
    """The S residual sites, and at each the residual of every word's last token at the end of the carrier, float32.

    progress   called with the number of words just read
    """
    sites = ("blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(host.n_layers)))
    rows = [pieces_in(host, carrier, word)[0] for word in words]
    by_length = defaultdict(list)  # sentences of one length need no padding
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    x = torch.empty(len(sites), len(words), host.d_model)
    for alike in by_length.values():
        for start in range(0, len(alike), _BATCH):
            at = alike[start : start + _BATCH]
            acts = host.activations(torch.tensor([rows[i] for i in at]), sites)
            x[:, at] = torch.stack([acts[site][:, -1].float().cpu() for site in sites])
            if progress is not None:
                progress(len(at))
    return sites, x


def cosines(x: Float[Tensor, "S d"], others: Float[Tensor, "S W d"], mean: Float[Tensor, "S d"]) -> Tensor:
    """Cosine of x to each of the others at each depth, all less the mean there: [S, W]."""
    return torch.cosine_similarity((x - mean)[:, None], others - mean[:, None], dim=-1)


def place(
    split: Float[Tensor, "S d"], whole: Float[Tensor, "S d"], listed: Float[Tensor, "S W d"], mean: Float[Tensor, "S d"]
) -> tuple[Int[Tensor, " S"], Float[Tensor, " S"]]:
    """Rank (from 1; listed words that tie come first) and cosine of the whole form, seen from the split one."""
    cosine = cosines(split, whole[:, None], mean)[:, 0]
    return 1 + (cosines(split, listed, mean) >= cosine[:, None]).sum(1), cosine


def joined(rank: Int[Tensor, " S"]) -> int | None:
    """The first depth from which on every rank is 1; None where the last one is not."""
    apart = (rank != 1).nonzero().flatten()
    first = int(apart[-1]) + 1 if len(apart) else 0
    return first if first < len(rank) else None


def depths(
    host: Host,
    word: str,
    words: Sequence[str],
    carrier: str,
    n: int = 10,
    *,
    progress: Callable[[int], object] | None = None,
) -> Depths:
    """Follow a word through the layers among a list of words in one carrier.

    words      the list; forms of the word itself are left out, and words that split where two others do not
    progress   called with the number of words just read
    raises     UserError: the word is empty or of no token; fewer than two other words in the list
    """
    check_word(word)
    others = [other for other in words if word_of(other) != word_of(word)]
    # That a word was split shows in its residual: one such word in the list is the neighbour of all that split.
    one_token = [other for other in others if pieces_in(host, carrier, other)[1] == 1]
    listed = one_token if len(one_token) > 1 else others
    if len(listed) < 2:
        raise UserError(f"{word}: the list has {len(listed)} other words, expected 2 or more. Give a longer list.")
    forms = forms_of(word)
    pieces = {form: _pieces(host, carrier, form) for form in forms}
    sites, x = residuals(host, [*listed, *forms], carrier, progress=progress)
    around, own = x[:, : len(listed)], dict(zip(forms, x[:, len(listed) :].unbind(1), strict=True))
    mean = around.mean(1)
    top = cosines(own[forms[0]], around, mean).topk(min(n, len(listed)), dim=1)
    near = tuple(
        tuple((listed[i], cosine) for i, cosine in zip(which, values, strict=True))
        for which, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
    whole = next((form for form in forms if len(pieces[form]) == 1), None)
    joins = []
    for form in forms:
        if whole is not None and len(pieces[form]) > 1:
            joins.append(Join(form, pieces[form], *place(own[form], own[whole], around, mean)))
    return Depths(forms[0], pieces[forms[0]], sites, len(listed), near, whole, tuple(joins))


def _pieces(host: Host, carrier: str, word: str) -> tuple[str, ...]:
    row, n = pieces_in(host, carrier, word)
    return tuple(host.text_of(row[-n:]))
