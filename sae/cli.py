"""The command `sae`: a verb is parse, one call, one print.

`sae --help` prints the table below and imports nothing else; `sae VERB --help` adds argparse and the recipe's
dataclasses, never torch. Heavy imports happen inside verbs. Results go to stdout, everything else to stderr.
Exit codes: 0 done · 1 our fault (with a traceback) · 2 the user's input (one line) · 130 Ctrl-C.
The parser is the standard library's, with our own one-line errors: it starts in a third of tyro's time and
takes bare words such as 1286=5x.
"""

import sys
from typing import TYPE_CHECKING, Any

from sae.errors import UserError, nearest

if TYPE_CHECKING:
    import argparse

    from sae.recipe import Recipe

VERBS = {
    "harvest": "run the host over the recipe's text and keep its activations in a store",
    "train": "train an SAE from a recipe; a run folder goes on where it stopped",
    "evaluate": "measure an SAE on held-out text: FVU, L0, cross-entropy, KL, with intervals",
    "index": "record where every feature fires, for find and show",
    "find": "which features stand for a concept",
    "show": "one feature: statistics, top examples, what it promotes",
    "steer": "answer a prompt plain and with features turned up or down",
    "corpus": "have the host write a corpus of its own",
    "demo": "the whole path on a small real model: harvest, train, evaluate, find, steer",
    "info": "what a folder is: an SAE, an activation store, an index, a run; or what a host offers",
}
ALIASES = {"eval": "evaluate"}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_table_of_verbs())
        return 0
    if argv[0] in ("-V", "--version"):
        from sae import __version__

        print(f"goldengate-sae {__version__}")
        return 0
    verb = ALIASES.get(argv[0], argv[0])
    if verb not in VERBS:
        print(
            f"sae: {argv[0]} is not a verb{nearest(verb, VERBS) or '.'} `sae --help` lists them.",
            file=sys.stderr,
        )
        return 2
    _quiet()
    try:
        globals()[f"_{verb}"](argv[1:])
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"sae {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sae {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in `sae show … | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    parser = _parser("harvest", "RECIPE [sae.k=64 | --text.source 'texts/*.txt' …]", recipe=True)
    recipe, _ = _recipe(parser, argv)

    from sae.run import harvest

    store = harvest(recipe)
    print(f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hooks)}")
    print(f"next: sae train RECIPE activations.store={store.path}")


def _train(argv: list[str]) -> None:
    parser = _parser("train", "RECIPE|RUN_FOLDER [sae.k=64 | --sae.k 64 …]", recipe=True)
    parser.add_argument("--resume", action="store_true", help="go on where the recipe's run folder stopped")
    parser.add_argument("--dry-run", action="store_true", help="say what it will take, then stop")
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe as YAML, then stop"
    )
    _json(parser, "the evaluation")
    recipe, args = _recipe(parser, argv)
    if args.print_config:
        from sae import config

        print(config.to_yaml(recipe), end="")
        return
    if args.dry_run:
        from sae import table
        from sae.plan import plan

        table.emit(plan(recipe), args.json)
        return

    from sae import files, table
    from sae.run import train

    path = train(recipe, resume=args.resume)
    report = files.read_json(f"{path}/goldengate.json").get("evaluation") or {}
    table.emit(_headline(report))
    print(f"saved: {path}\nnext: sae index {path}")
    if args.json:
        files.write_json(args.json, report)


# ---- verbs: an SAE in --------------------------------------------------------------------------------------


def _evaluate(argv: list[str]) -> None:
    parser = _parser("evaluate", "SAE [--text SOURCE]")
    _sae(parser)
    parser.add_argument(
        "--text", help="bundled, a datasets name, or files; default: the recipe's held-out text"
    )
    _count(parser, "--tokens", "held-out tokens for reconstruction and sparsity; default: the recipe's")
    _count(
        parser, "--ce-tokens", "tokens for cross-entropy and KL; 0 leaves these out; default: the recipe's"
    )
    _json(parser, "the whole report, with SAEBench's names")
    args = _parse(parser, argv)

    from sae import files, table
    from sae.run import evaluate

    report = evaluate(args.sae, text=args.text, tokens=args.tokens, ce_tokens=args.ce_tokens)
    table.emit(_headline(report))
    if args.json:
        files.write_json(args.json, report)


def _index(argv: list[str]) -> None:
    parser = _parser("index", "SAE [--text SOURCE | --store FOLDER]")
    _sae(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="bundled, a datasets name, or files; default: the recipe's text")
    source.add_argument("--store", help="read activations from this store instead of running the host")
    parser.add_argument("--out", help="folder of the index; default: index/ inside the SAE's folder")
    _count(parser, "--tokens", "stop after so many tokens; default: all of the text")
    args = _parse(parser, argv)

    from sae.run import index

    print(index(args.sae, text=args.text, store=args.store, out=args.out, tokens=args.tokens))


def _find(argv: list[str]) -> None:
    parser = _parser("find", 'SAE "golden gate bridge" [--for steer]')
    _sae(parser)
    parser.add_argument(
        "concept", nargs="?", metavar="CONCEPT", help="a word or a phrase that the texts hold"
    )
    parser.add_argument("--pos", metavar="FILE", help="texts that hold the concept (.txt, .jsonl, .parquet)")
    parser.add_argument("--neg", metavar="FILE", help="texts that do not; default: from the index")
    _choice(parser, "--for", ("detect", "steer"), "rank by what it detects, or by what it makes the host say",
            default="detect", dest="goal")  # fmt: skip
    _count(parser, "-n", "features to show", default=10)
    _json(parser, "all that is shown, and the halves it was measured on")
    args = _parse(parser, argv)
    if args.concept is None and args.pos is None:
        raise UserError(
            'nothing to look for. Give a concept such as "golden gate bridge", or texts with --pos.'
        )

    from sae import files, table
    from sae.run import find

    found = find(args.sae, args.concept, pos=args.pos, neg=args.neg, goal=args.goal, n=args.n)
    print(table.text([_found_row(feature) for feature in found]))
    for feature in found:
        print(f"\n{feature.feature}")
        for example in feature.examples:
            print(f"  {table.number(example.act):>6}  {table.clean(example.marked())}")
    if args.json:
        files.write_json(args.json, [feature.to_dict() for feature in found])


def _show(argv: list[str]) -> None:
    parser = _parser("show", "SAE 1286")
    _sae(parser)
    _feature(parser)
    _count(parser, "-n", "examples to show", default=10)
    _json(parser, "everything")
    args = _parse(parser, argv)

    from sae import files, table
    from sae.run import show

    feature = show(args.sae, args.feature, n=args.n)
    print(_feature_page(feature))
    for example in feature.examples:
        print(f"  {table.number(example.act):>6}  {table.clean(example.marked())}")
    if args.json:
        files.write_json(args.json, feature.to_dict())


def _steer(argv: list[str]) -> None:
    parser = _parser("steer", 'SAE 1286=5x [2000=0x …] "Who are you?"')
    _sae(parser)
    parser.add_argument(
        "words", nargs="*", metavar='FEATURE=STRENGTH … "PROMPT"',
        help="5x is five times the feature's recorded maximum, 12.5 raw units, 0x ablation, off the plain model",
    )  # fmt: skip
    _choice(
        parser, "--positions", ("all", "prompt", "generated", "last"), "where it is steered", default="all"
    )
    _choice(
        parser, "--kind", ("clamp", "add", "scale", "ablate"), "what is done to a feature", default="clamp"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default: the model's own")
    _count(parser, "--max-new-tokens", "length of an answer in tokens", default=80)
    _number(parser, "--temperature", "0 is greedy", default=0.7)
    _number(parser, "--top-p", "sample from the likeliest tokens that make up this mass", default=1.0)
    _count(parser, "--top-k", "sample from so many likeliest tokens; 0 is all", default=0)
    _count(parser, "--seed", "one seed, one answer", default=0)
    _json(parser, "both answers")
    args = _parse(parser, argv)
    dials = [word for word in args.words if _is_dial(word)]
    prompts = [word for word in args.words if not _is_dial(word)]
    if not dials:
        raise UserError(
            'no feature given. Write FEATURE=STRENGTH before the prompt: sae steer SAE 1286=5x "Hello"'
        )
    if len(prompts) != 1 or not prompts[0].strip():
        many = f"{len(prompts)} prompts ({', '.join(prompts)})" if prompts else "no prompt"
        raise UserError(
            f'{many} given, expected one. Put it in quotes: sae steer SAE {dials[0]} "Who are you?"'
        )

    from sae import files
    from sae.run import steer_prompt

    answers = steer_prompt(
        args.sae, dials, prompts[0], positions=args.positions, kind=args.kind, system=args.system,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        seed=args.seed, stream=_Side({"plain": "plain", "steered": " ".join(dials)}),
    )  # fmt: skip
    print()
    if args.json:
        files.write_json(args.json, answers)


# ---- verbs: the rest ---------------------------------------------------------------------------------------


def _corpus(argv: list[str]) -> None:
    parser = _parser("corpus", "--out runs/corpus --tokens 200k")
    parser.add_argument("--host", default="smollm2", help="the model that writes (default smollm2)")
    parser.add_argument(
        "--out", default="runs/corpus", help="folder; an unfinished one goes on (default runs/corpus)"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="topics and forms as JSON; default: the bundled ones"
    )
    _count(parser, "--tokens", "stop after so many tokens", default=200_000)
    _count(parser, "--batch", "passages written at once", default=64)
    _count(parser, "--workers", "batches at once, each on a thread of its own", default=1)
    _count(parser, "--seed", "one seed, one corpus", default=0)
    _json(parser, "the recipe and counts")
    args = _parse(parser, argv)

    from sae import corpus, table
    from sae.host import Host

    host = Host.load(args.host)
    written = corpus.write(
        host, args.out, tokens=args.tokens, batch=args.batch, seed=args.seed, workers=args.workers,
        prompts_file=args.prompts,
    )  # fmt: skip
    table.emit(
        {key: value for key, value in written.items() if not isinstance(value, dict | list)}, args.json
    )


def _demo(argv: list[str]) -> None:
    parser = _parser("demo", "[--out runs/demo] [--json FILE]")
    parser.add_argument("--out", default="runs/demo", help="folder of the run (default runs/demo)")
    _json(parser, "fvu, feature, strength, both answers, seconds a stage")
    args = _parse(parser, argv)

    from sae import files
    from sae.demo import demo

    result = demo(args.out)
    if args.json:
        files.write_json(args.json, result)


def _info(argv: list[str]) -> None:
    parser = _parser("info", "FOLDER | HOST")
    parser.add_argument(
        "what", metavar="FOLDER|HOST", help="an SAE, a store, an index, a run; or a model's name"
    )
    _json(parser, "the same facts")
    args = _parse(parser, argv)

    from sae import table
    from sae.run import info

    table.emit(info(args.what), args.json)


# ---- printing ----------------------------------------------------------------------------------------------


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


def _headline(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures one looks at first, a row each; a report of another shape shows its plain numbers."""
    if "eval_result_unstructured" not in report:
        return [
            {"metric": name, "value": value} for name, value in report.items() if not isinstance(value, list)
        ]
    from sae.evaluation.core import headline

    rows = headline(report).items()
    return [{"metric": name, "value [95% interval]": value, "tokens": value.get("n")} for name, value in rows]


def _found_row(found: Any) -> dict[str, Any]:
    return {
        "feature": str(found.feature),
        "auroc": found.auroc,
        "output score": found.output_score,
        "writes": found.writes,
        "density": found.density,
        "max": found.max_act,
        "promotes": " ".join(token.strip() for token in found.top_tokens[:5]),
    }


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
    return table.text(
        [{"": name, "value": value} for name, value in rows.items() if value != ""], ["", "value"]
    )


# ---- parsing -----------------------------------------------------------------------------------------------


def _parser(verb: str, example: str, recipe: bool = False) -> "argparse.ArgumentParser":
    import argparse

    class Parser(argparse.ArgumentParser):
        takes_recipe = recipe

        def error(self, message: str):
            required = "the following arguments are required: "
            if message.startswith(required):
                message = f"{message.removeprefix(required)} is missing, as in: sae {verb} {example}"
            elif found := message.removeprefix("argument "):
                message = found
            raise UserError(f"{message}. See `sae {verb} --help`.")

    about = VERBS[verb]
    parser = Parser(
        prog=f"sae {verb}",
        usage=f"sae {verb} {example}",
        description=about[0].upper() + about[1:] + ".",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    if recipe:
        parser.add_argument(
            "recipe", metavar="RECIPE", help="a .yaml, .toml or .json file, or a run's folder"
        )
        parser.add_argument(
            "overrides", nargs="*", metavar="FIELD=VALUE", help="such as sae.k=64 (or --sae.k 64)"
        )
    return parser


def _parse(parser: "argparse.ArgumentParser", argv: list[str]) -> Any:
    """Flags anywhere, _ and - alike, an unknown one with its nearest."""
    spelled = [_dashed(word) if word.startswith("--") else word for word in argv]
    args, unknown = parser.parse_known_intermixed_args(spelled)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        if flag.startswith("-"):
            raise UserError(
                f"{flag} is not a flag{_nearest_flag(flag, flags, parser)} See `{parser.prog} --help`."
            )
        raise UserError(f"{flag}: one word too many. See `{parser.prog} --help`.")
    return args


def _dashed(flag: str) -> str:
    name, sign, value = flag.partition("=")
    return name.replace("_", "-") + sign + value


def _nearest_flag(flag: str, flags: list[str], parser: Any) -> str:
    if getattr(parser, "takes_recipe", False):
        from sae import config

        dotted = list(config.fields())
        word = flag.lstrip("-").replace("-", "_")
        for field in dotted:
            if field.rpartition(".")[2] == word:
                return f"; did you mean --{field}?"
        flags = flags + [f"--{field}" for field in dotted]
    return nearest(flag, flags) or "."


def _recipe(parser: "argparse.ArgumentParser", argv: list[str]) -> tuple["Recipe", Any]:
    """The recipe that a file, or a run's folder, and overrides in either spelling make; and the other flags."""
    from dataclasses import replace
    from pathlib import Path

    from sae import config

    if "-h" in argv or "--help" in argv:
        _recipe_help(parser, argv)
        raise SystemExit(0)
    rest, overrides, i = [], [], 0
    top = {name for name in config.fields() if "." not in name}
    while i < len(argv):
        name, sign, value = argv[i].partition("=")
        if name.startswith("--") and ("." in name or name[2:] in top):
            if not sign:
                i += 1
                if i == len(argv):
                    raise UserError(f"{name}: no value given. Write {name} VALUE or {name[2:]}=VALUE.")
                value = argv[i]
            overrides.append(f"{name[2:]}={value}")
        else:
            rest.append(argv[i])
        i += 1
    args = _parse(parser, rest)
    recipe = config.load(args.recipe, [*args.overrides, *overrides])
    if Path(args.recipe).is_dir():  # a run: it goes on where it lies, also when the folder was moved
        recipe = replace(recipe, out=args.recipe)
        args.resume = True
    return recipe, args


def _recipe_help(parser: "argparse.ArgumentParser", argv: list[str]) -> None:
    """The flags, then every field of the recipe with its value in the given file, or its default."""
    from sae import config

    given = next((word for word in argv if word.endswith((".yaml", ".yml", ".toml", ".json"))), None)
    values = config.to_dict(config.load(given)) if given else None
    print(parser.format_help())
    print(f"fields of a recipe, with {f'the values of {given}' if given else 'their defaults'}:")
    section = ""
    for key, (kind, default, sentence) in config.fields().items():
        head, _, field = key.partition(".")
        if head != section:
            print(f"\n  {head}" if field else "")
            section = head
        value: Any = default
        if values is not None:
            value = values[head][field] if field else values[head]
        shown = "auto" if value is None and "auto" in sentence else "none" if value is None else value
        shown = (
            str(shown).lower()
            if isinstance(shown, bool)
            else f"{shown:,}"
            if isinstance(shown, int)
            else shown
        )
        print(f"    --{key} {kind.upper()}  (now {shown})\n        {sentence}" if field
              else f"  --{key} {kind.upper()}  (now {shown})\n        {sentence}")  # fmt: skip


def _is_dial(word: str) -> bool:
    """1286=5x; whatever holds '=' and no space, so that a slip such as golden=5x is explained, not prompted."""
    return "=" in word and not any(character.isspace() for character in word.strip())


def _sae(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("sae", metavar="SAE", help="folder of an SAE, such as checkpoints/… or runs/…/sae")


def _feature(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("feature", metavar="FEATURE", type=_whole("FEATURE", "its number, such as 1286"))


def _json(parser: "argparse.ArgumentParser", what: str) -> None:
    def path(text: str) -> str:
        from pathlib import Path

        if Path(text).is_dir() or not text.strip():
            raise UserError(f"--json: '{text}' is no name for a file. Give a path such as out.json.")
        return text

    parser.add_argument("--json", metavar="FILE", type=path, help=f"write {what} to a JSON file too")


def _count(parser: "argparse.ArgumentParser", flag: str, about: str, default: int | None = None) -> None:
    shown = "" if default is None else f" (default {default:,})"
    expected = "a whole number such as 500 or 20k"
    parser.add_argument(flag, type=_whole(flag, expected), default=default, metavar="N", help=about + shown)


def _whole(flag: str, expected: str) -> Any:
    def whole(text: str) -> int:
        from sae import config

        number = config.count(text)
        if number is None or number < 0:
            raise UserError(f"{flag} is '{text}', expected {expected}.")
        return number

    return whole


def _number(parser: "argparse.ArgumentParser", flag: str, about: str, default: float) -> None:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UserError(f"{flag} is '{text}', expected a number from 0.")
        return value

    parser.add_argument(flag, type=number, default=default, metavar="X", help=f"{about} (default {default})")


def _choice(
    parser: "argparse.ArgumentParser",
    flag: str,
    options: tuple[str, ...],
    about: str,
    default: str,
    dest: str = "",
) -> None:
    def choice(text: str) -> str:
        if text not in options:
            close = nearest(text, options) or "."
            raise UserError(f"{flag} is '{text}', expected one of {', '.join(options)}{close}")
        return text

    parser.add_argument(
        flag, type=choice, default=default, metavar="WORD", dest=dest or flag.lstrip("-").replace("-", "_"),
        help=f"{about}: {', '.join(options)} (default {default})",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
