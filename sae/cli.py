"""The command `sae`: a verb is parse, one call, one print.

`sae --help` prints the table below and imports nothing else; `sae VERB --help` adds argparse and the recipe's
dataclasses, never torch. Heavy imports happen inside verbs. Results go to stdout, everything else to stderr.
Exit codes: 0 done · 1 our fault (with a traceback) · 2 the user's input (one line) · 130 Ctrl-C.
"""

import sys
from typing import TYPE_CHECKING, Any

from sae.errors import Stopped, UserError, nearest

if TYPE_CHECKING:
    from sae.flags import Flags

VERBS = {
    "harvest": "run the host over the recipe's text and keep its activations in a store",
    "verify": "check a store of activations byte for byte",
    "train": "train an SAE from a recipe; a run folder goes on where it stopped",
    "evaluate": "measure an SAE on held-out text: FVU, L0, cross-entropy, KL, with intervals",
    "index": "record where every feature fires, for find and show",
    "find": "which features stand for a concept",
    "show": "one feature: statistics, top examples, what it promotes",
    "steer": "answer a prompt plain and with features turned up or down",
    "corpus": "have the host write a corpus of its own",
    "demo": "the whole path on a small real model: harvest, train, evaluate, find, steer",
    "info": "what a folder is: an SAE, an activation store, an index, a run",
}
ALIASES = {"eval": "evaluate"}
_FILES = ".txt (split at empty lines), .jsonl or .parquet"


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader went away, as in `sae show … | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_table_of_verbs())
        return 0
    if words[0] in ("-V", "--version"):
        from sae import __version__

        print(f"goldengate-sae {__version__}")
        return 0
    verb = ALIASES.get(words[0], words[0])
    if verb not in VERBS:
        close = nearest(verb, VERBS) or "."
        _complain(f"sae: {words[0]} is not a verb{close} `sae --help` lists them.")
        return 2
    _quiet()
    try:
        globals()[f"_{verb}"](words[1:])
        return 0
    except UserError as error:
        _complain(f"sae {verb}: {str(error).removeprefix(f'{verb}: ')}")
        return 2
    except Stopped as stopped:
        _complain(f"sae {verb}: {stopped}")
        return stopped.code
    except KeyboardInterrupt:
        print(f"sae {verb}: interrupted", file=sys.stderr)
        return 130


def _complain(message: str) -> None:
    """One line on stderr, whatever a path or another library's message holds."""
    from sae import table

    print(table.clean(" ".join(line.strip() for line in message.splitlines() if line.strip())), file=sys.stderr)


def _table_of_verbs() -> str:
    from sae import __version__

    lines = [
        f"goldengate-sae {__version__}: harvest, learn, find and steer the features of a language model",
        "",
        "usage: sae VERB …        `sae VERB --help` says more",
        "",
        *(f"  {verb:<10}{about}" for verb, about in VERBS.items()),
        "",
        "first steps: sae demo    sae train configs/smollm2.yaml    sae info FOLDER",
    ]
    return "\n".join(lines)


def _quiet() -> None:
    """Our lines only: no advice of other libraries between them, and no crash on a terminal without UTF-8."""
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


# ---- verbs: a recipe in ------------------------------------------------------------------------------------


def _harvest(argv: list[str]) -> None:
    flags = _flags("harvest", "RECIPE [sae.k=64 | --text.source 'texts/*.txt' …]")
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


def _verify(argv: list[str]) -> None:
    flags = _flags("verify", "STORE [--host]")
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


def _train(argv: list[str]) -> None:
    flags = _flags("train", "RECIPE|RUN_FOLDER [sae.k=64 | --sae.k 64 …] [--sweep sae.k=16,32,64 …]")
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


# ---- verbs: an SAE in --------------------------------------------------------------------------------------


def _evaluate(argv: list[str]) -> None:
    flags = _flags("evaluate", "SAE [--text SOURCE]")
    flags.sae()
    flags.add_argument("--text", help="bundled, a datasets name, or files; default: the recipe's held-out text")
    flags.count("--tokens", "tokens for reconstruction and sparsity", default=20_000)
    flags.count("--ce-tokens", "tokens for cross-entropy and KL; 0 leaves these out", default=5_000)
    flags.json("the whole report, with SAEBench's names")
    args = flags.read(argv)

    from sae import files, table
    from sae.evaluation.core import headline
    from sae.run import evaluate

    report = evaluate(args.sae, text=args.text, tokens=args.tokens, ce_tokens=args.ce_tokens)
    print(table.text(_figures(headline(report))))
    if args.json:
        files.write_json(args.json, report)


def _index(argv: list[str]) -> None:
    flags = _flags("index", "SAE [--text SOURCE | --store FOLDER]")
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


def _find(argv: list[str]) -> None:
    flags = _flags("find", 'SAE "golden gate bridge" [--for steer]')
    flags.sae()
    flags.add_argument("concept", nargs="?", metavar="CONCEPT", help="a word or a phrase that the texts hold")
    flags.add_argument("--pos", metavar="FILE", help=f"texts that hold the concept; {_FILES}")
    flags.add_argument("--neg", metavar="FILE", help=f"texts that do not; default: from the index; {_FILES}")
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
        args.sae, args.concept, pos=_texts(args.pos), neg=_texts(args.neg), goal=args.goal, n=args.n,
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


def _show(argv: list[str]) -> None:
    flags = _flags("show", "SAE 1286")
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


def _steer(argv: list[str]) -> None:
    flags = _flags("steer", 'SAE 1286=5x [2000=0x …] "Who are you?"')
    flags.epilog = "Useful strengths are often 1x to 2x; try small first."
    flags.sae()
    flags.add_argument(
        "words", nargs="*", metavar='FEATURE=STRENGTH … "PROMPT"',
        help="5x is five times the feature's maximum, 12.5 raw units, 0x ablation, off the plain model",
    )  # fmt: skip
    flags.choice("--positions", "where it is steered", ("all", "prompt", "generated", "last"))
    flags.choice("--kind", "what is done to a feature", ("clamp", "add", "scale", "ablate"))
    flags.add_argument("--system", metavar="TEXT", help="system prompt; default: the model's own")
    flags.count("--max-new-tokens", "length of an answer in tokens", default=80)
    flags.number("--temperature", "0 is greedy", default=0.7, within=(0.01, 100))
    flags.number("--top-p", "sample from the likeliest tokens that make up this mass", default=1.0)
    flags.count("--top-k", "sample from so many likeliest tokens; 0 is all", default=0)
    flags.count("--seed", "one seed, one answer", default=0, below=2**31)
    flags.json("both answers")
    args = flags.read(argv)
    dials = [word for word in args.words if _is_dial(word)]
    prompts = [word for word in args.words if not _is_dial(word)]
    if not dials and len(prompts) == 2 and prompts[0] == "off":  # the plain model, twice
        dials = [prompts.pop(0)]
    if not dials:
        raise UserError('no feature given. Write FEATURE=STRENGTH before the prompt: sae steer SAE 1286=5x "Hello"')
    if len(prompts) != 1 or not prompts[0].strip():
        many = f"{len(prompts)} prompts ({', '.join(prompts)})" if prompts else "no prompt"
        raise UserError(f'{many} given, expected one. Put it in quotes: sae steer SAE {dials[0]} "Who are you?"')

    from functools import partial

    from sae import files
    from sae.run import steer_prompt

    side = _Side({"plain": "plain", "steered": " ".join(dials)})
    plain, steered = steer_prompt(
        args.sae, dials, prompts[0], positions=args.positions, kind=args.kind, system=args.system,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        seed=args.seed, stream_plain=partial(side, "plain"), stream_steered=partial(side, "steered"),
    )  # fmt: skip
    print()
    if args.json:
        answers = {"prompt": prompts[0], "dials": dials, "plain": plain, "steered": steered}
        files.write_json(args.json, {**answers, "settings": {k: v for k, v in vars(args).items() if k != "words"}})


# ---- verbs: the rest ---------------------------------------------------------------------------------------


def _corpus(argv: list[str]) -> None:
    flags = _flags("corpus", "--out runs/corpus --tokens 200k")
    flags.add_argument("--host", default="smollm2", help="the model that writes (default smollm2)")
    flags.add_argument("--out", default="runs/corpus", help="folder; an unfinished one goes on (default runs/corpus)")
    flags.add_argument("--prompts", metavar="FILE", help="topics and forms as JSON; default: the bundled ones")
    flags.count("--tokens", "stop after so many tokens", default=200_000)
    flags.count("--batch", "passages written at once", default=64)
    flags.count("--workers", "batches at once, each on a thread of its own", default=1)
    flags.count("--seed", "one seed, one corpus", default=0, below=2**31)
    flags.json("the recipe and counts")
    args = flags.read(argv)

    from sae import corpus, table
    from sae.host import Host

    host = Host.load(args.host)
    written = corpus.write(
        host, args.out, tokens=args.tokens, batch=args.batch, seed=args.seed, workers=args.workers,
        prompts_file=args.prompts,
    )  # fmt: skip
    table.emit({key: value for key, value in written.items() if not isinstance(value, dict | list)}, args.json)


def _demo(argv: list[str]) -> None:
    flags = _flags("demo", "[--out runs/demo] [--json FILE]")
    flags.add_argument("--out", default="runs/demo", help="folder of the run (default runs/demo)")
    flags.json("fvu, feature, strength, both answers, seconds a stage")
    args = flags.read(argv)

    from sae import files
    from sae.demo import demo

    result = demo(args.out)
    if args.json:
        files.write_json(args.json, result)


def _info(argv: list[str]) -> None:
    flags = _flags("info", "FOLDER")
    flags.add_argument("what", metavar="FOLDER", help="an SAE, an activation store, an index or a run")
    flags.json("the same facts")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import info

    facts = info(args.what)
    table.emit(_flat(facts))
    if args.json:
        files.write_json(args.json, facts)


# ---- words in, lines out -----------------------------------------------------------------------------------


def _flags(verb: str, example: str) -> "Flags":
    from sae.flags import Flags

    return Flags(verb, VERBS[verb], example)


def _is_dial(word: str) -> bool:
    """1286=5x; anything with '=' and no space: a slip such as golden=5x is explained, not answered."""
    return "=" in word and not any(character.isspace() for character in word.strip())


class _Side:
    """Prints two answers as they come, each under its heading: call it with ("plain" or "steered", text)."""

    def __init__(self, headings: dict[str, str]):
        self.headings = headings
        self.current = ""

    def __call__(self, which: str, text: str) -> None:
        from sae import table

        if which != self.current:
            print(f"{chr(10) * 2 if self.current else ''}── {self.headings[which]} ──")
            self.current = which
        # line by line, so that newlines stay and escapes go
        print("\n".join(table.clean(line) for line in text.split("\n")), end="", flush=True)


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


def _texts(path: str | None) -> list[str] | None:
    """The texts of a file, as everywhere: paragraphs of .txt, lines of .jsonl, rows of .parquet."""
    if path is None:
        return None
    from sae.text import documents

    return [document.text for document in documents(path)]


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts as one row each: recipe.sae.k."""
    flat = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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


if __name__ == "__main__":
    raise SystemExit(main())
