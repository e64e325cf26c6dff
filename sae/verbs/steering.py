"""The verbs that turn features up and down: steer, chat.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

import argparse
import re
import shlex
from typing import Any

from sae import labels
from sae.errors import UserError
from sae.flags import Flags
from sae.verbs.words import add_host, flags_of


def steer(argv: list[str]) -> None:
    flags = flags_of("steer", 'SAE 1286=5x [2000=0x …] "Who are you?"')
    flags.epilog = "Useful strengths are often 0.5x to 1.5x; try small first."
    flags.sae()
    flags.add_argument(
        "words", nargs="*", metavar='FEATURE=STRENGTH … "PROMPT"',
        help="5x is five times the feature's maximum, 12.5 raw units, 0x ablation, off the plain model",
    )  # fmt: skip
    _add_flags(flags, length=80)
    flags.json("both answers")
    args = flags.read(argv)
    known = labels.read(args.sae)
    dials = [word for word in args.words if _is_dial(word, known)]
    prompts = [word for word in args.words if word not in dials]
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
        args.sae, dials, prompts[0], host=args.host, how=_how(args), system=args.system, seed=args.seed,
        **_sampling(args), stream_plain=partial(side, "plain"), stream_steered=partial(side, "steered"),
    )  # fmt: skip
    print()
    if args.json:
        answers = {"prompt": prompts[0], "dials": dials, "plain": plain, "steered": steered}
        files.write_json(args.json, {**answers, "settings": {k: v for k, v in vars(args).items() if k != "words"}})


def chat(argv: list[str]) -> None:
    flags = flags_of("chat", "SAE [1286=5x …]")
    flags.sae()
    flags.add_argument("dials", nargs="*", metavar="FEATURE=STRENGTH", help="dials to begin with; /feature sets others")
    _add_flags(flags, length=200)
    args = flags.read(argv)

    import sys

    from sae import table
    from sae.chat import COMMANDS, Chat

    talk = Chat(
        args.sae,
        args.dials,
        host=args.host,
        system=args.system,
        how=_how(args),
        seed=args.seed,
        sampling=_sampling(args),
    )
    asked = "> " if sys.stdin.isatty() else ""
    print(f"{talk.told()}\n{COMMANDS}")
    while True:
        try:
            line = input(asked)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            if line.strip().startswith("/"):
                print(talk.command(line))
            elif line.strip():
                talk.say(line, lambda text: print(table.clean_text(text), end="", flush=True))
                print()
        except UserError as error:
            print(table.clean(str(error)))
        except KeyboardInterrupt:
            print(" [stopped]")


def calibrate(argv: list[str]) -> None:
    flags = flags_of("calibrate", 'SAE FEATURE [--names "golden gate,bridge"]')
    flags.epilog = "An answer is about the concept when it has one of its names in a hundred words and is fluent."
    flags.sae()
    flags.add_argument("feature", metavar="FEATURE", help="a number or a label")
    flags.add_argument("--names", default="", metavar="WORDS", help="what counts as the concept; default: the label")
    flags.add_argument("--parts", default="", metavar="WORDS", help='what it has: "my towers" counts as speaking as it')
    flags.count("--max-new-tokens", "length of an answer in tokens", default=64)
    flags.count("--samples", "answers to each question where the chosen strength is reported", default=3)
    flags.count("--random-features", "controls of the same length", default=5)
    flags.choice("--goal", "what decides: overall keeps to the question, about need not, as speaks as the concept",
                 ("overall", "about", "as"))  # fmt: skip
    add_host(flags)
    flags.add_argument("--html", metavar="FILE", help="write one page with the curves too")
    flags.json("all cells with their answers; the same command goes on where it stopped,")
    args = flags.read(argv)

    import sys

    from sae import table
    from sae.run import calibrate
    from sae.steering.calibrate import Effort, shown

    feature = int(args.feature) if args.feature.lstrip("+-").isdigit() else args.feature
    effort = Effort(reporting=args.samples, tokens=args.max_new_tokens, random_features=args.random_features)
    cells = calibrate(
        args.sae, feature, _words(args.names), _words(args.parts), effort=effort, keep=args.json,
        goal=args.goal, host=args.host, html=args.html, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(table.text(shown(cells)))
    best = next(cell for cell in cells if cell["half"] == "reporting" and cell["arm"] == "chosen")
    print(
        f'\nsteer: sae steer {shlex.quote(args.sae)} {next(iter(best["features"]))}={best["times"]:.2f}x "Who are you?"'
    )


def effects(argv: list[str]) -> None:
    flags = flags_of("effects", "SAE 1286=5x [--json FILE]")
    flags.epilog = "Random features of the same length are measured too: what counts is the difference to them."
    flags.sae()
    flags.add_argument("dials", nargs="+", metavar="FEATURE=STRENGTH", help="5x is five times the feature's maximum")
    flags.add_argument("--names", default="", metavar="WORDS", help="what counts as the concept; default: the label")
    flags.add_argument("--parts", default="", metavar="WORDS", help='what it has: "my towers" counts as speaking as it')
    flags.count("--max-new-tokens", "length of an answer in tokens", default=64)
    flags.count("--random-features", "controls of the same length", default=2)
    flags.json("all settings; the same command goes on where it stopped,")
    flags.add_argument("--html", metavar="FILE", help="write one page with plots too")
    flags.choice("--pairs", "requests that are asked, held-out where the host was trained on the others",
                 ("all", "held-out"))  # fmt: skip
    add_host(flags)
    args = flags.read(argv)

    import sys

    from sae import table
    from sae.run import effects
    from sae.steering.calibrate import Effort
    from sae.steering.effects import moved, shown

    effort = Effort(reporting=1, tokens=args.max_new_tokens, random_features=args.random_features)
    rows = effects(
        args.sae, args.dials, _words(args.names), _words(args.parts), effort=effort, keep=args.json,
        html=args.html, host=args.host, pairs=args.pairs, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    for heading, lines in shown(rows):
        print(f"{heading}\n\n{table.text(lines)}\n")
    print(f"Other features in the answers, share of tokens before and after\n\n{table.text(moved(rows))}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _add_flags(flags: Flags, *, length: int) -> None:
    flags.add_argument("--positions", default="all", metavar="WHERE",
                       help="all, prompt, generated, last, or from a token on: 4: (all)")  # fmt: skip
    flags.choice("--kind", "what = does to a feature", ("clamp", "add", "scale", "ablate", "floor", "ceil"))
    flags.add_argument("--when", action="append", default=[], metavar="77>0.5x",
                       help="only where this feature is above (or below) a strength; several: all of them")  # fmt: skip
    flags.add_argument("--plan", metavar="ramp:20", help="over the generated tokens: ramp:20, fade:20 or first:20")
    flags.add_argument("--abort-when", action="append", default=[], metavar="77>0.5x",
                       help="end the answer where this holds at a generated token")  # fmt: skip
    flags.choice("--select", "how activations are read", ("own", "topk", "threshold"))
    flags.add_argument("--system", metavar="TEXT", help="system prompt; default: the model's own")
    flags.count("--max-new-tokens", "length of an answer in tokens", default=length)
    flags.number("--temperature", "0 is greedy", default=0.7, within=(0.01, 100))
    flags.number("--top-p", "sample from the likeliest tokens that make up this mass", default=1.0)
    flags.count("--top-k", "sample from so many likeliest tokens; 0 is all", default=0)
    flags.count("--seed", "one seed, one answer", default=0, below=2**31)
    add_host(flags)


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """Flags as keywords of `sae.steer`."""
    names = ("positions", "kind", "when", "plan", "abort_when")
    return {name: getattr(args, name) for name in names} | {"select": None if args.select == "own" else args.select}


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k")
    return {name: getattr(args, name) for name in names}


def _is_dial(word: str, known: dict[int, str]) -> bool:
    """1286=5x; anything with '=' and no space: a slip such as golden=5x is explained, not answered. With spaces, where
    all before '=' is (in) a label, or what follows is a multiple or off."""
    name, sign, _ = word.rpartition("=")
    name = name.rstrip("+*<>")
    if not sign or not any(character.isspace() for character in word.strip()):
        return bool(sign)
    wanted = " ".join(name.split()).casefold()
    labelled = bool(wanted) and any(wanted in label.casefold() for label in known.values())
    return labelled or re.fullmatch(r"[^=]+=\s*([-+]?[\d.]+[x×]|off)\s*", word) is not None


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
        print(table.clean_text(text), end="", flush=True)
