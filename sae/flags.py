"""How verbs read their words: the standard library's parser with our own one-line errors.

Flags stand anywhere, _ and - are alike, an unknown flag is told its nearest, counts may be written as 20k.
Recipe fields are overridden as `sae.k=64` or `--sae.k 64`. argparse and not tyro: it starts in a third of
tyro's time, takes bare words such as 1286=5x, and leaves every error to us. Nothing here imports torch.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae import config
from sae.errors import UserError, nearest
from sae.recipe import Recipe

_RECIPES = (".yaml", ".yml", ".toml", ".json")


class Flags(argparse.ArgumentParser):
    """The words of one verb: declare them with the methods below, then `read` them, or `read_recipe`."""

    def __init__(self, verb: str, about: str, example: str):
        super().__init__(
            prog=f"sae {verb}",
            usage=f"sae {verb} {example}",
            description=about[0].upper() + about[1:] + ".",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
            allow_abbrev=False,
        )
        self.example = example
        self.takes_recipe = False

    def error(self, message: str):
        """Every complaint of the parser is a UserError of one line."""
        required = "the following arguments are required: "
        if message.startswith(required):
            missing = message.removeprefix(required).partition(",")[0]
            raise UserError(f"{missing} is missing. Write: {self.prog} {self.example}")
        raise UserError(f"{message.removeprefix('argument ')}. See `{self.prog} --help`.")

    # ---- declaring ----

    def sae(self) -> None:
        """The first word: an SAE's folder."""
        self.add_argument("sae", metavar="SAE", help="folder of an SAE, such as checkpoints/… or runs/…/sae")

    def count(self, flag: str, about: str, default: int | None = None, below: int = 10**15) -> None:
        """A flag with a whole number from 0 and `below` a limit, perhaps as 20k."""
        shown = "" if default is None else f" (default {default:,})"
        self.add_argument(flag, type=_whole(flag, below), default=default, metavar="N", help=about + shown)

    def feature(self) -> None:
        """A word: a feature by its number or its label."""
        self.add_argument("feature", metavar="FEATURE", help="its number, such as 1286, or its label")

    def number(self, flag: str, about: str, default: float, within: tuple[float, float] | None = None) -> None:
        """A flag with a number from 0; with `within`, 0 or a number between two bounds."""

        def number(text: str) -> float:
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not 0 <= value < float("inf"):
                raise UserError(f"{flag} is '{_short(text)}', expected a number from 0 up.")
            if within and value and not within[0] <= value <= within[1]:
                raise UserError(f"{flag} is '{_short(text)}', expected 0 or {within[0]:g} to {within[1]:g}.")
            return value

        self.add_argument(flag, type=number, default=default, metavar="X", help=f"{about} (default {default})")

    def index(self) -> None:
        """--index FOLDER."""
        self.add_argument("--index", metavar="FOLDER", help="the index; default: index/ inside the SAE's folder")

    def choice(self, flag: str, about: str, options: tuple[str, ...], dest: str | None = None) -> None:
        """A flag with one of some words; the first is the default."""

        def choice(text: str) -> str:
            if text not in options:
                close = nearest(text, options) or "."
                raise UserError(f"{flag} is '{text}', expected one of {', '.join(options)}{close}")
            return text

        told = f"{about}: {', '.join(options)} (default {options[0]})"
        more: dict[str, Any] = {"dest": dest} if dest else {}
        self.add_argument(flag, type=choice, default=options[0], metavar="WORD", help=told, **more)

    def json(self, what: str) -> None:
        """--json FILE."""

        def path(text: str) -> str:
            if not text.strip() or Path(text).is_dir():
                raise UserError(f"--json: '{text}' is no name for a file. Give a path such as out.json.")
            return text

        self.add_argument("--json", metavar="FILE", type=path, help=f"write {what} to a JSON file too")

    # ---- reading ----

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Read all words; one that is not known is a UserError with its nearest."""
        spelled = [_dashed(word) if word.startswith("--") else word for word in argv]
        args, unknown = self.parse_known_intermixed_args(spelled)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag.startswith("-"):
                raise UserError(f"{flag} is not a flag{self._nearest(flag)} See `{self.prog} --help`.")
            raise UserError(f"'{unknown[0]}' is one word too many. Write: {self.prog} {self.example}")
        return args

    def read_recipe(self, argv: list[str]) -> tuple[Recipe, argparse.Namespace]:
        """The recipe that a file (or a run's folder) and overrides make; and the other flags."""
        self.takes_recipe = True
        self.add_argument("recipe", metavar="RECIPE", help="a .yaml, .toml or .json file, or a run's folder")
        self.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="such as sae.k=64, or --sae.k 64")
        if "-h" in argv or "--help" in argv:
            print(self.format_help())
            _print_fields(next((word for word in argv if word.endswith(_RECIPES)), None))
            raise SystemExit(0)

        rest, overrides = _without_fields(argv)
        args = self.read(rest)
        args.overrides += overrides
        recipe = config.load(args.recipe, args.overrides)
        args.is_run = Path(args.recipe).is_dir()
        if args.is_run:  # it goes on where it lies, also when the folder was moved
            recipe = replace(recipe, out=args.recipe)
        return recipe, args

    def read_sweep(self, argv: list[str]) -> tuple[dict[str, Recipe], argparse.Namespace]:
        """As `read_recipe`, with --sweep: a recipe for each combination, by what it varies (`k=16,seed=0`), each with a
        folder of that name inside `out`. Without --sweep the recipe alone, under an empty name."""
        self.add_argument(
            "--sweep", action="append", default=[], metavar="FIELD=A,B",
            help="train an SAE for each value, all on one stream; several --sweep make all combinations",
        )  # fmt: skip
        recipe, args = self.read_recipe(argv)
        if not args.sweep:
            return {"": recipe}, args
        if args.is_run:
            raise UserError(f"--sweep: {args.recipe} is one run. Give the recipe file that the sweep began with.")
        axes = [_axis(text) for text in args.sweep]
        named = [field.rpartition(".")[2] for field, _ in axes]
        if doubled := [field for field, _ in axes if [name for name, _ in axes].count(field) > 1]:
            raise UserError(f"--sweep: {doubled[0]} is given twice. Write its values in one list.")
        for field, _ in axes:
            if field.startswith(("out", "log.")):
                raise UserError(
                    f"--sweep: {field} does not change an SAE. Give a field of sae or training, or host.hook."
                )
        if (Path(recipe.out) / "recipe.yaml").exists():
            raise UserError(f"{recipe.out}: holds a run, not a sweep. Choose another `out`.")
        short = len(set(named)) == len(named)
        recipes = {}
        for values in itertools.product(*(values for _, values in axes)):
            chosen = [f"{field}={value}" for (field, _), value in zip(axes, values, strict=True)]
            words = [f"{name}={value}" for name, value in zip(named, values, strict=True)] if short else chosen
            name = ",".join(words).replace("/", "-")
            one = config.load(args.recipe, [*args.overrides, *chosen])
            recipes[name] = replace(one, out=f"{recipe.out}/{name}")
        return recipes, args

    def _nearest(self, flag: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if self.takes_recipe:
            fields = list(config.fields())
            last = flag.lstrip("-").replace("-", "_")
            if same := [field for field in fields if field.rpartition(".")[2] == last]:
                return f"; did you mean --{same[0]}?"
            known += [f"--{field}" for field in fields]
        return nearest(flag, known) or "."


def _axis(text: str) -> tuple[str, list[str]]:
    """`sae.k=16,32` as the field and its values."""
    field, sign, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",")]
    if not sign or not all(values) or len(set(values)) < len(values):
        raise UserError(f"--sweep {_short(text)}: expected a field and different values, such as sae.k=16,32,64.")
    return field.strip().lstrip("-").replace("-", "_"), values


def _whole(flag: str, below: int = 10**15) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = config.count(text)
        if number is None or number < 0:
            raise UserError(f"{flag} is '{_short(text)}', expected a whole number such as 500 or 20k.")
        if number >= below:
            raise UserError(f"{flag} is '{_short(text)}', expected a whole number below {below:,}.")
        return number

    return whole


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def _dashed(flag: str) -> str:
    name, sign, value = flag.partition("=")
    return name.replace("_", "-") + sign + value


def _without_fields(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take `--sae.k 64`, `--sae.k=64` and `--out runs/a` out of the words, as `sae.k=64` and `out=runs/a`."""
    rest, overrides, words = [], [], iter(argv)
    plain = {name for name in config.fields() if "." not in name}
    for word in words:
        name, sign, value = word.partition("=")
        if not name.startswith("--") or ("." not in name and name[2:] not in plain):
            rest.append(word)
            continue
        if not sign:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name}: no value given. Write {name} VALUE or {name[2:]}=VALUE.")
        overrides.append(f"{name[2:]}={value}")
    return rest, overrides


def _print_fields(given: str | None) -> None:
    """Every field of a recipe with its value in the given file, or its default."""
    values = config.to_dict(config.load(given)) if given else None
    print(f"fields of a recipe, with {f'the values of {given}' if given else 'their defaults'}:")
    section = None
    for key, (kind, value, sentence) in config.fields().items():
        head, _, field = key.rpartition(".")
        if head != section:
            print()
            section = head
        if values is not None:
            value = (values[head] if head else values)[field]
        print(f"  --{key} {kind.upper()}  (now {_spelled(value, sentence)})\n        {sentence}")


def _spelled(value: Any, sentence: str) -> str:
    if value is None:
        return "auto" if "auto" in sentence else "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)
