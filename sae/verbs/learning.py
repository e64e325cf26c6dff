"""Verbs that take a recipe, and the evaluation of what it made: harvest, verify, train, evaluate.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from typing import Any

from sae.errors import UserError
from sae.verbs.words import add_host, flags_of


def harvest(argv: list[str]) -> None:
    flags = flags_of("harvest", "RECIPE [sae.k=64 | --text.source 'texts/*.txt' …]")
    flags.add_argument("--dry-run", action="store_true", help="read and count the text, say what it will take, stop")
    flags.add_argument(
        "--repair", action="store_true", help="check every shard that is there and make those anew that are damaged"
    )
    flags.add_argument(
        "--hooks", metavar="A,B", help="several hooks, read in one forward into one store; default: the recipe's"
    )
    flags.json("rows, hooks and path of the store")
    recipe, args = flags.read_recipe(argv)
    hooks = None if args.hooks is None else [hook.strip() for hook in args.hooks.split(",") if hook.strip()]

    import shlex

    from sae import files, table
    from sae.run import forecast, harvest

    if args.dry_run:
        table.emit(forecast(recipe, hooks=hooks), args.json)
        return
    store = harvest(recipe, hooks=hooks, repair=args.repair)
    print(f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hooks)}")
    print(f"next: sae train {shlex.join([args.recipe, *args.overrides])}")
    if args.json:
        files.write_json(args.json, {"path": store.path, "rows": store.n_rows, "hooks": list(store.hooks)})


def verify(argv: list[str]) -> None:
    flags = flags_of("verify", "STORE [--host]")
    flags.add_argument("store", metavar="STORE", help="an activation store: a folder, or s3://bucket/folder")
    flags.add_argument("--host", action="store_true", help="also load its host, compare it, and run a few rows again")
    flags.json("what was checked, and every fault")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import verify

    found = verify(args.store, with_host=args.host)
    print(table.text(found["readings"]))
    for fault in found["faults"]:
        print(table.clean(fault))
    if args.json:
        files.write_json(args.json, found)
    if found["faults"]:
        n = len(found["faults"])
        raise UserError(
            f"{args.store}: {n:,} file{'s are' if n > 1 else ' is'} not what was written, first {found['faults'][0]}. "
            + ("Mend it with `sae harvest RECIPE --repair`." if found["can be mended"] else
               "Token rows and documents cannot be mended alone: delete the store and harvest again.")
        )  # fmt: skip
    if found["unfinished"]:
        raise UserError(
            f"{args.store}: what is there is as it was written, but the harvest is not finished. Run it again."
        )
    print(f"{args.store}: {found['rows']:,} rows, all as they were written")


def train(argv: list[str]) -> None:
    flags = flags_of("train", "RECIPE|RUN_FOLDER [sae.k=64 | --sae.k 64 …] [--sweep sae.k=16,32,64 …]")
    flags.add_argument("--resume", action="store_true", help="go on where the recipe's run folder stopped")
    flags.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what it will take, then stop"
    )
    flags.add_argument("--print-config", action="store_true", help="print the whole recipe as YAML, then stop")
    flags.json("the figures of the evaluation")
    recipes, args = flags.read_sweep(argv)
    if args.print_config:
        from sae import config

        print("---\n".join(config.to_yaml(recipe) for recipe in recipes.values()), end="")
        return
    if args.dry_run:
        from sae import config, files, table
        from sae.plan import plan

        planned = plan(list(recipes.values()))
        print("---\n".join(config.dict_to_yaml(one) for one in planned["resolved"]))
        for name, value in planned["facts"].items():  # as comments: what is printed is a recipe
            print(f"# {name}: {table.clean(table.number(value) if isinstance(value, int | float) else str(value))}")
        if args.json:
            files.write_json(args.json, planned["facts"] | {"resolved": planned["resolved"]})
        return

    from sae import files, table
    from sae.run import train_many

    made = train_many(list(recipes.values()), resume=args.resume or args.is_run)
    found = [sae.cfg.metadata.evaluation for sae in made]
    if not args.sweep:
        out = recipes[""].out
        print(table.text(_figures(found[0])))
        print(f"saved: {out}/sae\nnext: sae index {out}/sae")
    else:
        print(table.text([_sweep_row(name, recipes[name].out, one) for name, one in zip(recipes, found, strict=True)]))
    if args.json:
        swept = [{"name": n, "out": r.out, **one} for (n, r), one in zip(recipes.items(), found, strict=True)]
        files.write_json(args.json, swept if args.sweep else found[0])


def evaluate(argv: list[str]) -> None:
    flags = flags_of("evaluate", "SAE [--text SOURCE]")
    flags.sae()
    flags.add_argument("--text", help="bundled, a datasets name, or files; default: the recipe's held-out text")
    flags.count("--tokens", "tokens for reconstruction and sparsity", default=20_000)
    flags.count("--ce-tokens", "tokens for cross-entropy and KL; 0 leaves these out", default=5_000)
    add_host(flags)
    flags.json("the whole report, with SAEBench's names")
    args = flags.read(argv)

    from sae import files, table
    from sae.evaluation.core import headline
    from sae.run import evaluate

    report = evaluate(args.sae, host=args.host, text=args.text, tokens=args.tokens, ce_tokens=args.ce_tokens)
    print(table.text(_figures(headline(report))))
    if args.json:
        files.write_json(args.json, report)


def _sweep_row(name: str, out: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One SAE of a sweep: what it varies, its first figures, where it is."""
    varied = {part.partition("=")[0]: part.partition("=")[2] for part in name.split(",")}
    shown = {"FVU": "fvu", "L0": "l0", "dead": "dead_frac", "KL": "kl"}
    found = {title: figures[key] for title, key in shown.items() if key in figures}
    return {**varied, **found, "folder": f"{out}/sae"}


def _figures(headline: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures one looks at first, a row each."""
    return [
        {"metric": name, "value [95% interval]": figure, "tokens": figure.get("n")} for name, figure in headline.items()
    ]
