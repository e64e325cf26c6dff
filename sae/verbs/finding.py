"""Verbs that look for features in an SAE: index, find, show, label.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from sae.verbs.words import TEXTS, add_host, flags_of, texts


def index(argv: list[str]) -> None:
    flags = flags_of("index", "SAE [--text SOURCE | --store FOLDER]")
    flags.sae()
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--text", help="bundled, a datasets name, or files; default: the recipe's text")
    source.add_argument("--store", help="read activations from this store instead of running the host")
    flags.choice("--part", "which part of the text", ("all", "train", "held-out"))
    flags.add_argument("--out", help="folder of the index; default: index/ inside the SAE's folder")
    flags.count("--tokens", "stop after so many tokens; default: all of the text")
    flags.add_argument(
        "--no-scores", action="store_true", help="leave out the output scores: faster, and `find` shows none"
    )
    add_host(flags)
    flags.json("path and facts of the index")
    args = flags.read(argv)

    import dataclasses
    import shlex

    from sae import files
    from sae.run import index

    made = index(
        args.sae, text=args.text, store=args.store, out=args.out, part=args.part, tokens=args.tokens,
        scores=not args.no_scores, host=args.host,
    )  # fmt: skip
    print(f"{made.path}: {made.facts.n_features:,} features over {made.facts.n_tokens:,} tokens")
    where = f" --index {shlex.quote(args.out)}" if args.out else ""
    where += f" --host {shlex.quote(args.host)}" if args.host else ""
    print(f'next: sae find {shlex.quote(args.sae)} "golden gate bridge"{where}')
    if args.json:
        files.write_json(args.json, {"path": str(made.path), **dataclasses.asdict(made.facts)})


def find(argv: list[str]) -> None:
    flags = flags_of("find", 'SAE "golden gate bridge" [--for steer]')
    flags.sae()
    flags.add_argument("concept", nargs="?", metavar="CONCEPT", help="a word or a phrase that the texts hold")
    flags.add_argument("--by-name", action="store_true", help="make matched texts from the concept's name in any case")
    flags.add_argument("--pos", metavar="FILE", help=f"texts that hold the concept; {TEXTS}")
    flags.add_argument("--neg", metavar="FILE", help=f"texts that do not; default: from the index; {TEXTS}")
    flags.add_argument("--text", metavar="WORDS", help="features that fire on these words, and at which token")
    flags.add_argument("--token", metavar="TOKEN", help="features that fire on a token")
    flags.add_argument("--words", metavar="WORDS", help="full text: labels, tokens, contexts")
    flags.add_argument("--like", metavar="FEATURE", help="nearest decoder rows: 1286, a label, or OTHER_SAE:12")
    flags.add_argument("--effect", metavar="WORD", help="features that make the host say a word")
    flags.add_argument("--toward", metavar="CONCEPT", help="a few features with weights that together lead there")
    flags.choice("--for", "rank by what it detects, or by what it makes the host say", ("detect", "steer"), "goal")
    flags.index()
    add_host(flags)
    flags.count("-n", "features to show", default=10)
    flags.json("the features with all their scores, numbers of texts, examples, answers")
    args = flags.read(argv)

    import shlex

    from sae import files, table
    from sae.run import find

    found = find(
        args.sae, args.concept, pos=texts(args.pos), neg=texts(args.neg), by_name=args.by_name, text=args.text,
        token=args.token, words=args.words, like=args.like, effect=args.effect, toward=args.toward, goal=args.goal,
        n=args.n, index_path=args.index, host=args.host,
    )  # fmt: skip
    if len(found):
        print(table.text([one.row() for one in found]))
    print(found.legend())
    for one in found:
        print(f"\n{one.feature}{'  ' + one.label if one.label else ''}  (dial {one.dial})")
        for example in one.examples:
            print(f"  {table.number(example.act):>6}  {table.clean(example.marked(one.max_act))}")
        for answer in one.wrote:
            print(f"  wrote at {one.strength:g}x: {table.clean(answer)}")
    if len(found):
        dials = " ".join(one.dial for one in (found if args.toward else found[:1]))
        host = args.host or found.host
        by = f" --host {shlex.quote(host)}" if host else ""
        print(f'\nsteer: sae steer {shlex.quote(args.sae)} {dials} "Who are you?"{by}')
    if args.json:
        files.write_json(args.json, found.to_dict())


def show(argv: list[str]) -> None:
    flags = flags_of("show", "SAE 1286")
    flags.sae()
    flags.feature()
    flags.add_argument("--no-answers", action="store_true", help="do not load the host to ask it with the feature held")
    flags.index()
    add_host(flags)
    flags.count("-n", "strongest examples, neighbours and co-firing features to show", default=10)
    flags.json("everything")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import show

    feature = show(args.sae, args.feature, n=args.n, index_path=args.index, host=args.host, ask=not args.no_answers)
    rows = [{"": name, "value": value} for name, value in feature.facts().items()]
    print(table.text(rows, ["", "value"]))
    for title, lines in feature.sections():
        print(f"\n{table.clean(title)}")
        for line in lines:
            print(f"  {table.clean(line)}")
    if args.json:
        files.write_json(args.json, feature.to_dict())


def label(argv: list[str]) -> None:
    flags = flags_of("label", 'SAE [1286 ["the Golden Gate Bridge"]]')
    flags.sae()
    flags.add_argument("feature", nargs="?", metavar="FEATURE", help="its number, or its label; none: list all")
    flags.add_argument("label", nargs="?", metavar="LABEL", help="its new label; an empty one takes it away")
    flags.json("the labels")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import label

    known = label(args.sae, args.feature, args.label)
    print(table.text([{"feature": str(feature), "label": name} for feature, name in known.items()]) or "no labels")
    if args.json:
        files.write_json(args.json, {str(feature): name for feature, name in known.items()})
