"""Verbs that look at texts through features: diff, classify.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from typing import Any

from sae.errors import UserError
from sae.verbs.words import TEXTS, add_host, flags_of


def diff(argv: list[str]) -> None:
    flags = flags_of("diff", "SAE A.txt B.txt")
    flags.sae()
    flags.add_argument("a", metavar="A", help=f"texts of one side, at least 8; {TEXTS}")
    flags.add_argument("b", metavar="B", help="texts of the other")
    flags.number("--fdr", "share of false ones allowed among the features that are counted", 0.05, (1e-6, 0.5))
    flags.index()
    flags.count("-n", "features to show each way", default=10)
    add_host(flags)
    flags.json("counts and the features of both sides (shares, difference, auroc, p, q, examples)")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import diff

    found = diff(args.sae, args.a, args.b, n=args.n, fdr=args.fdr, index_path=args.index, host=args.host)
    print(_texts_line(found.texts))
    print(
        f"{found.discoveries:,} of {found.tested:,} features that fired pass a false-discovery rate of {args.fdr:g}; "
        f"with the sides shuffled {found.shuffled:,} do"
    )
    for name, features in zip(found.texts.classes, (found.more_in_a, found.more_in_b), strict=True):
        print(f"\nmore in {table.clean(name)}")
        print(table.text([_difference_row(feature) for feature in features]) or "none")
        for feature in features:
            print(f"\n{feature.feature}")
            print(f"  {table.number(feature.strongest.act):>6}  {table.clean(feature.strongest.marked())}")
            if feature.example is not None:
                print(f"  {table.number(feature.example.act):>6}  index: {table.clean(feature.example.marked())}")
    print(
        "\nin A, in B: share of texts in which it fires; difference: of means, in units of the feature's maximum; "
        "auroc: A over B; q: Benjamini and Hochberg"
    )
    if args.json:
        files.write_json(args.json, found.to_dict())


def classify(argv: list[str]) -> None:
    flags = flags_of("classify", "SAE A.txt B.txt [--k 1,2,5,20]   or   SAE FILE.jsonl --label FIELD")
    flags.sae()
    flags.add_argument("files", metavar="FILE", nargs="+", help=f"a file a class, at least 8 texts each; {TEXTS}")
    flags.add_argument("--label", metavar="FIELD", help="one .jsonl or .parquet instead, whose field names the class")
    flags.add_argument(
        "--k", type=_widths, metavar="N,N", default=None, help="features that a probe reads (default 1,2,5,20)"
    )
    add_host(flags)
    flags.json("scores with intervals, and the features of each probe with their weights")
    args = flags.read(argv)

    from sae import files, table
    from sae.features import probe
    from sae.run import classify

    found = classify(args.sae, args.files, label=args.label, widths=args.k or probe.WIDTHS, host=args.host)
    print(_texts_line(found.texts))
    unit = "texts" if found.units == len(found.texts.labels) else f"{found.units:,} groups of texts"
    print(f"{probe.FOLDS} folds over {unit}; what a probe is chosen by never holds the texts that it is measured on\n")
    print(table.text([_score_row(score) for score in found.scores]))
    for name, by_width in found.chosen.items():
        k = max((k for k in by_width if k <= 5), default=min(by_width))
        print(f"\nfor {table.clean(name)}, the probe on {probe.sparse(k)}, fitted on all texts")
        print(
            table.text(
                [
                    {"feature": str(one.feature), "weight": one.weight, "chosen in folds": one.folds}
                    for one in by_width[k]
                ]
            )
        )
    if args.json:
        files.write_json(args.json, found.to_dict())


def _widths(text: str) -> list[int]:
    from sae import config

    found = [config.count(word) for word in text.split(",")]
    if not all(found) or any(number is None or number < 1 for number in found):
        raise UserError(f"--k is '{text:.60}', expected numbers of features such as 1,2,5,20.")
    return [number for number in found if number is not None]


def _texts_line(texts: Any) -> str:
    """How many texts there are, and which were left out and why."""
    from sae import table

    counts = ", ".join(f"{texts.labels.count(i):,} {table.clean(name)}" for i, name in enumerate(texts.classes))
    notes = (
        (texts.repeats, "repeats left out"),
        (texts.contested, "in several classes left out"),
        (texts.unread, "without a token that counts left out"),
        (texts.sharing, "share their prompt or topic and form with another"),
    )
    return f"texts: {counts}" + "".join(f"; {count:,} {what}" for count, what in notes if count)


def _difference_row(found: Any) -> dict[str, Any]:
    return {
        "feature": str(found.feature),
        "in A": found.share_a,
        "in B": found.share_b,
        "difference": found.mean_difference,
        "auroc": found.auroc,
        "p": found.p,
        "q": found.q,
        "promotes": " ".join(token.strip() for token in found.promotes),
    }


def _score_row(score: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "probe": score.probe,
        "accuracy": asdict(score.accuracy),
        "balanced accuracy": asdict(score.balanced),
        "auroc": asdict(score.auroc),
    }
