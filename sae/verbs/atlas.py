"""The verb that looks up a word in the input embeddings and in the layers: atlas.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from dataclasses import asdict
from typing import Any

from sae.errors import UserError
from sae.verbs.words import flags_of

_IN_A_LINE = 5  # words of a depth, and forms of a word, on one line


def atlas(argv: list[str]) -> None:
    flags = flags_of("atlas", "London [--host HOST [OTHER]] | --score")
    flags.add_argument("word", nargs="?", metavar="WORD", help="looked up with its forms, such as london and LONDON")
    flags.add_argument(
        "--host", nargs="+", default=["smollm2"], help="the model (default smollm2); of two, vocabularies are compared"
    )
    flags.add_argument(
        "--text", default="bundled", help="counts tokens (the first 10M): bundled (default), a datasets name, or files"
    )
    flags.add_argument("--score", action="store_true", help="share of the shipped pairs of words that are neighbours")
    flags.count("-n", "words to show, and how near a pair must be", default=10)
    flags.json("everything")
    args = flags.read(argv)
    if len(args.host) > 2:
        taken = ", ".join(args.host)
        raise UserError(f"--host takes one or two, here are {len(args.host)} ({taken}). Put the word before --host.")
    if args.word is None and not args.score and len(args.host) < 2:
        raise UserError("nothing to look up. Give a word such as London before --host, or --score.")
    if args.n < 1:
        raise UserError(f"-n is {args.n}, expected 1 or more.")

    from sae import files
    from sae.features.atlas import shipped
    from sae.run import atlas

    lists = shipped()
    alone = len(args.host) == 1  # beside another one a host is not run: their vocabularies alone are compared
    answers = [
        atlas(args.word, host=name, text=args.text, n=args.n, layers=alone, score=args.score) for name in args.host
    ]
    for answer in answers:
        print("\n\n".join(_told(answer, args, lists)))
        print()
    if len(answers) == 2:
        print("\n".join(_compared(answers[0], answers[1], lists)))
    if args.json:
        files.write_json(args.json, _everything(answers, args.text, lists))


# ---- printing ----------------------------------------------------------------------------------------------


def _told(answer: Any, args: Any, lists: Any) -> list[str]:
    """What one host says, in paragraphs."""
    from sae import table

    paragraphs = [_facts(answer, args.text)]
    if answer.near is not None:
        titles = {"raw": "raw", "centred": "centred", "abtt": f"abtt (D={answer.atlas.removed})"}
        views = [_view(title, answer.near.words[view]) for view, title in titles.items()]
        paragraphs += [_forms(answer.near), table.beside(views)]
    elif args.word is not None:
        paragraphs.append(
            f"{table.clean(args.word)}: no form of it is one token, so no row of the embeddings stands for it"
        )
    if answer.depths is not None:
        paragraphs += [_depths(answer.depths, lists.carrier), *_joins(answer.depths)]
    if answer.score is not None:
        paragraphs.append(_scores(answer.score, args.n))
    return paragraphs


def _facts(answer: Any, text: str) -> str:
    from sae.features.atlas import anisotropy

    atlas = answer.atlas
    tied = {True: "tied to the unembedding", False: "not tied to the unembedding", None: "no unembedding here"}
    cosines = {view: anisotropy(unit[atlas.kept]) for view, unit in atlas.units.items()}
    told = ", ".join(f"{view} {round(cosine, 3) + 0.0:.3f}" for view, cosine in cosines.items())
    kept = int(atlas.kept.sum())
    return (
        f"{answer.host}: {len(atlas.texts):,} tokens, {len(atlas.ids):,} seen in {text}, {kept:,} kept; input "
        f"embeddings {tied[answer.tied]}\nmean cosine of random pairs: {told}"
    )


def _shown(text: str) -> str:
    """A token with its leading space made visible."""
    from sae import table

    return "·" + table.clean(text[1:]) if text.startswith(" ") else table.clean(text)


def _forms(near: Any) -> str:
    """The query and its other forms on one line."""
    query = near.query
    parts = [f"{_shown(query.text)} (‖e‖ {query.norm:.2f}, seen {query.count:,})"]
    by_view = [{form.token: form for form in forms} for forms in near.forms.values()]
    for token, form in by_view[0].items():
        cosines = " ".join(f"{forms[token].cosine:.2f}" for forms in by_view)
        parts.append(f"{_shown(form.text)} {cosines} (‖e‖ {form.norm:.2f}, seen {form.count:,})")
    return "forms (· is a space; cosines raw, centred, abtt): " + "  ".join(parts)


def _view(title: str, words: Any) -> str:
    """The nearest words in one view; norm and count are the nearest form's."""
    from sae import table

    rows = [
        {title: " ".join(_shown(form.text) for form in forms[:_IN_A_LINE]), "cos": forms[0].cosine,
         "‖e‖": forms[0].norm, "seen": forms[0].count}
        for forms in words
    ]  # fmt: skip
    return table.text(rows)


def _depths(depths: Any, carrier: str) -> str:
    from sae import table

    rows = []
    for i, words in enumerate(depths.near):
        nearest = ", ".join(f"{word} {cosine:.2f}" for word, cosine in words[:_IN_A_LINE])
        row: dict[str, Any] = {"after layer": i - 1 if i else None, "nearest": nearest}
        for join in depths.joins:
            row |= {f"{join.form} rank": int(join.rank[i]), f"{join.form} cos": float(join.cosine[i])}
        rows.append(row)
    sentence = f"{carrier} {depths.word}"
    among = f"last token, nearest of {depths.listed:,} other words at each depth (–: what enters block 0)"
    return f'"{table.clean(sentence)}", {among}\n{table.text(rows)}'


def _joins(depths: Any) -> list[str]:
    """How the word splits, and where each form that splits joins the whole one."""
    from sae import table

    def split(pieces: Any) -> str:
        return " + ".join(_shown(piece) for piece in pieces)

    if depths.whole is None:
        return [f"{table.clean(depths.word)} = {split(depths.pieces)}: no form of it is one token that it could join"]
    if not depths.joins:
        return [f"{table.clean(depths.word)}: every form of it is one token"]
    whole = table.clean(depths.whole)
    lines = []
    for join in depths.joins:
        first = (join.rank == 1).nonzero().flatten().tolist()
        if join.depth is not None:
            where = f"joins {whole} {_after(join.depth)} and stays"
        elif first:
            where = (
                f"never joins {whole} for good: rank 1 at {len(first)} of {len(join.rank)} depths, first "
                f"{_after(first[0])}, last {_after(first[-1])}; rank {int(join.rank[-1])} at the end"
            )
        else:
            best = int(join.rank.argmin())
            where = f"never joins {whole}: its best rank is {int(join.rank[best])}, {_after(best)}"
        lines.append(f"{table.clean(join.form)} = {split(join.pieces)}: {where}")
    return ["\n".join(lines)]


def _after(depth: int) -> str:
    return f"after layer {depth - 1}" if depth else "at the embedding"


def _scores(scores: Any, n: int) -> str:
    from sae import table

    rows = [
        {"pairs": one.kind, "queries": one.queries, "left out": one.left_out,
         **{view: asdict(interval) for view, interval in one.precision.items()},
         **{f"{view} − raw": asdict(interval) for view, interval in one.gain.items()}}
        for one in scores
    ]  # fmt: skip
    return f"precision@{n}: share of queries whose partner is among their {n} nearest tokens\n{table.text(rows)}"


def _compared(a: Any, b: Any, lists: Any) -> list[str]:
    """Two vocabularies, and the neighbours of one word in both."""
    from sae import table
    from sae.features.atlas import shared_words

    facts = _vocabularies(a, b, lists)
    n, both, first, second = len(lists.words), *(len(facts[where]) for where in ("both", "first", "second"))
    lines = [
        f"{facts['shared']:,} tokens read the same in both; of {n:,} listed words {both:,} are one token in both, "
        f"{first:,} in {a.host} alone, {second:,} in {b.host} alone"
    ]
    for name, only in ((a.host, facts["first"]), (b.host, facts["second"])):
        if only:
            lines.append(f"in {name} alone: {', '.join(only[:20])}{' …' if len(only) > 20 else ''}")
    if a.near is not None and b.near is not None:
        sides = [_view(f"{one.host}, centred", one.near.words["centred"]) for one in (a, b)]
        lines += ["", table.beside(sides), ""]
        for view, words in shared_words(a.near, b.near).items():
            named = f": {', '.join(map(table.clean, words))}" if words else ""
            lines.append(f"near in both, {view}: {len(words)} of {len(a.near.words[view])}{named}")
    return lines


def _vocabularies(a: Any, b: Any, lists: Any) -> dict[str, Any]:
    single = [{word for word in lists.words if " " + word in one.atlas.token} for one in (a, b)]
    return {
        "shared": len(set(a.atlas.texts) & set(b.atlas.texts)),
        "both": sorted(single[0] & single[1]),
        "first": sorted(single[0] - single[1]),
        "second": sorted(single[1] - single[0]),
    }


def _everything(answers: list[Any], text: str, lists: Any) -> dict[str, Any]:
    from sae.features.atlas import anisotropy, shared_words

    hosts = [
        {"host": one.host, "text": text, "tokens": len(one.atlas.texts), "seen": len(one.atlas.ids),
         "kept": int(one.atlas.kept.sum()), "removed_components": one.atlas.removed, "tied": one.tied,
         "anisotropy": {view: anisotropy(unit[one.atlas.kept]) for view, unit in one.atlas.units.items()},
         "neighbours": None if one.near is None else asdict(one.near),
         "depths": None if one.depths is None else one.depths.to_dict(),
         "score": None if one.score is None else [asdict(kind) for kind in one.score]}
        for one in answers
    ]  # fmt: skip
    if len(answers) == 1:
        return {"hosts": hosts}
    a, b = answers
    near = None if a.near is None or b.near is None else shared_words(a.near, b.near)
    return {"hosts": hosts, "comparison": {**_vocabularies(a, b, lists), "near_in_both": near}}
