"""Verbs that look for features in an SAE: index, find, show.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from typing import Any

from sae.errors import UserError
from sae.verbs.words import TEXTS, flags_of, texts


def index(argv: list[str]) -> None:
    flags = flags_of("index", "SAE [--text SOURCE | --store FOLDER]")
    flags.sae()
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--text", help="bundled, a datasets name, or files; default: the recipe's text")
    source.add_argument("--store", help="read activations from this store instead of running the host")
    flags.add_argument("--out", help="folder of the index; default: index/ inside the SAE's folder")
    flags.count("--tokens", "stop after so many tokens; default: all of the text")
    flags.add_argument(
        "--no-scores", action="store_true", help="leave out the output scores: faster, and `find` shows none"
    )
    flags.json("path and facts of the index")
    args = flags.read(argv)

    import dataclasses
    import shlex

    from sae import files
    from sae.run import index

    made = index(
        args.sae, text=args.text, store=args.store, out=args.out, tokens=args.tokens, scores=not args.no_scores
    )
    print(f"{made.path}: {made.facts.n_features:,} features over {made.facts.n_tokens:,} tokens")
    where = f" --index {shlex.quote(args.out)}" if args.out else ""
    print(f'next: sae find {shlex.quote(args.sae)} "golden gate bridge"{where}')
    if args.json:
        files.write_json(args.json, {"path": str(made.path), **dataclasses.asdict(made.facts)})


def find(argv: list[str]) -> None:
    flags = flags_of("find", 'SAE "golden gate bridge" [--for steer]')
    flags.sae()
    flags.add_argument("concept", nargs="?", metavar="CONCEPT", help="a word or a phrase that the texts hold")
    flags.add_argument("--pos", metavar="FILE", help=f"texts that hold the concept; {TEXTS}")
    flags.add_argument("--neg", metavar="FILE", help=f"texts that do not; default: from the index; {TEXTS}")
    flags.choice("--for", "rank by what it detects, or by what it makes the host say", ("detect", "steer"), "goal")
    flags.index()
    flags.count("-n", "features to show", default=10)
    flags.json("a list of the features (auroc of both halves, numbers of texts, scores, examples, answers)")
    args = flags.read(argv)
    if args.concept is None and args.pos is None:
        raise UserError('nothing to look for. Give a concept such as "golden gate bridge", or texts with --pos.')

    from sae import files, table
    from sae.run import find

    found = find(
        args.sae, args.concept, pos=texts(args.pos), neg=texts(args.neg), goal=args.goal, n=args.n,
        index_path=args.index,
    )  # fmt: skip
    print(table.text([_found_row(feature) for feature in found]))
    print(_found_legend(found))
    for feature in found:
        print(f"\n{feature.feature}")
        for example in feature.examples:
            print(f"  {table.number(example.act):>6}  {table.clean(example.marked())}")
        for answer in feature.wrote:
            print(f"  wrote at {feature.strength:g}x: {table.clean(answer)}")
    if args.json:
        files.write_json(args.json, [feature.to_dict() for feature in found])


def show(argv: list[str]) -> None:
    flags = flags_of("show", "SAE 1286")
    flags.sae()
    flags.feature()
    flags.index()
    flags.count("-n", "examples to show", default=10)
    flags.json("everything")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import show

    feature = show(args.sae, args.feature, n=args.n, index_path=args.index)
    print(_feature_page(feature))
    for example in feature.examples:
        print(f"  {table.number(example.act):>6}  {table.clean(example.marked())}")
    if args.json:
        files.write_json(args.json, feature.to_dict())


def _found_row(found: Any) -> dict[str, Any]:
    trial = {} if found.tried is None else {"wrote": found.tried, "at": f"{found.strength:g}x"}
    return {
        "feature": str(found.feature),
        "auroc": found.auroc,
        **trial,
        **({} if found.output_score is None else {"output score": found.output_score}),
        "density": found.density,
        "max": found.max_act,
        "promotes": " ".join(token.strip() for token in found.top_tokens[:5]),
    }


def _found_legend(found: list[Any]) -> str:
    """What the columns mean, of those shown."""
    parts = []
    if found:
        counts = f"{found[0].positives:,} with the concept, {found[0].negatives:,} without"
        parts.append(f"auroc: on texts not used for choosing ({counts})")
    if any(feature.tried is not None for feature in found):
        parts.append("wrote/at: concept written in a trial, and the strength there")
    if any(feature.output_score is not None for feature in found):
        parts.append("output score: how surely it makes the model say its own top tokens")
    return "; ".join(parts)


def _feature_page(feature: Any) -> str:
    from sae import table

    def words(pairs: list[tuple[str, float]]) -> str:
        return " ".join(token.strip() for token, _ in pairs[:10])

    near = ", ".join(f"{other} ({cosine:.2f})" for other, cosine in feature.neighbours[:5])
    rows = {
        "feature": str(feature.feature),
        "density": feature.density,
        "share of documents": feature.document_density,
        "max": feature.max_act,
        "99.9th percentile": feature.p999,
        "firing by tenth of max": " ".join(f"{count:,}" for count in feature.bands),
        "output score": feature.output_score,
        "promotes": words(feature.top_tokens),
        "suppresses": words(feature.bottom_tokens),
        "makes it say": words(feature.says),
        "neighbours (cosine)": near,
    }
    return table.text([{"": name, "value": value} for name, value in rows.items() if value != ""], ["", "value"])
