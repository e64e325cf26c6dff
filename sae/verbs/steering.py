"""The verb that turns features up and down: steer.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

import re

from sae import labels
from sae.errors import UserError
from sae.verbs.words import flags_of


def steer(argv: list[str]) -> None:
    flags = flags_of("steer", 'SAE 1286=5x [2000=0x …] "Who are you?"')
    flags.epilog = "Useful strengths are often 0.5x to 1.5x; try small first."
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
        args.sae, dials, prompts[0], positions=args.positions, kind=args.kind, system=args.system,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        seed=args.seed, stream_plain=partial(side, "plain"), stream_steered=partial(side, "steered"),
    )  # fmt: skip
    print()
    if args.json:
        answers = {"prompt": prompts[0], "dials": dials, "plain": plain, "steered": steered}
        files.write_json(args.json, {**answers, "settings": {k: v for k, v in vars(args).items() if k != "words"}})


def _is_dial(word: str, known: dict[int, str]) -> bool:
    """1286=5x; anything with '=' and no space: a slip such as golden=5x is explained, not answered. With spaces, where
    all before '=' is (in) a label, or what follows is a multiple or off."""
    name, sign, _ = word.rpartition("=")
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
        # line by line, so that newlines stay and escapes go
        print("\n".join(table.clean(line) for line in text.split("\n")), end="", flush=True)
