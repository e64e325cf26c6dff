"""The other verbs: corpus, demo, info.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from typing import Any

from sae.verbs.words import flags_of


def corpus(argv: list[str]) -> None:
    flags = flags_of("corpus", "--out runs/corpus --tokens 200k")
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


def demo(argv: list[str]) -> None:
    flags = flags_of("demo", "[--out runs/demo] [--json FILE]")
    flags.add_argument("--out", default="runs/demo", help="folder of the run (default runs/demo)")
    flags.json("fvu, feature, strength, both answers, seconds a stage")
    args = flags.read(argv)

    from sae import files
    from sae.demo import demo

    result = demo(args.out)
    if args.json:
        files.write_json(args.json, result)


def info(argv: list[str]) -> None:
    flags = flags_of("info", "FOLDER")
    flags.add_argument("what", metavar="FOLDER", help="an SAE, an activation store, an index or a run")
    flags.json("the same facts")
    args = flags.read(argv)

    from sae import files, table
    from sae.run import info

    facts = info(args.what)
    table.emit(_flat(facts))
    if args.json:
        files.write_json(args.json, facts)


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts as one row each: recipe.sae.k."""
    flat = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
