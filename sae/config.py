"""Recipes from files: YAML, TOML or JSON, plus dotted overrides (`sae.k=64`), become a `Recipe`.

Whatever is wrong is one line that names the file, the field and the value, with the nearest name on a typo.
Values are read by the type of their field: counts as 4M or 20k (k = 1e3, M = 1e6, B = 1e9), several as a list or as
128,512,2k, `save_every` in seconds or as 60s, 5m, 2h; `auto`, `none` or null where a field may be empty; booleans are
true and false.
YAML is read without its surprises: off, no and on are words, 1e-3 is a number, a repeated key is an error.
Costs milliseconds, imports no torch; PyYAML only when a YAML file is read or written.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import UserError, nearest

if TYPE_CHECKING:
    from sae.recipe import Recipe

_SECONDS = {"save_every"}
_COUNT = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_TIME = {"s": 1, "m": 60, "h": 3600}
_EMPTY = {"auto", "none", "null", "~", ""}
_HUGE = 1e100  # no number of a recipe comes near it, and floats still hold it
_NUMBER = re.compile(r"[+-]?(\d[\d_,]*\.?\d*|\.\d+)([eE][+-]?\d+)?")

_SLICE = re.compile(r"\d*:\d*")

_CHOICES = {
    "activations.compile": ("auto", "on", "off"),
    "activations.dtype": ("bfloat16", "float32", "int8"),
    "host.dtype": ("auto", "float32", "bfloat16", "float16"),
    "sae.jumprelu_sparsity_loss_mode": ("tanh", "step", "quadratic"),
    "training.dtype": ("auto", "float32", "bfloat16"),
    "training.finetune": ("all", "threshold", "decoder"),
    "training.lr_scheduler_name": ("constant", "cosine", "linear"),
    "log.wandb": ("off", "offline", "online"),
}
# field: lowest, highest, and whether each end belongs to the range
_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "text.context": (2, math.inf, True, False),
    "text.held_out": (0, 0.9, True, False),
    "text.max_tokens": (1, math.inf, True, False),
    "activations.min_sequences": (1, math.inf, True, False),
    "activations.shard_rows": (1, math.inf, True, False),
    "sae.d_sae": (1, math.inf, True, False),
    "sae.k": (1, math.inf, True, False),
    "sae.target_l0": (0, math.inf, False, False),
    "sae.jumprelu_bandwidth": (0, math.inf, False, False),
    "sae.jumprelu_init_threshold": (0, math.inf, False, False),
    "sae.l0_coefficient": (0, math.inf, True, False),
    "sae.l0_warm_up": (0, 1, True, True),
    "sae.l1_coefficient": (0, math.inf, True, False),
    "sae.l1_warm_up": (0, 1, True, True),
    "training.tokens": (1, math.inf, True, False),
    "training.batch": (1, math.inf, True, False),
    "training.grad_acc_steps": (1, math.inf, True, False),
    "training.lr": (0, math.inf, False, False),
    "training.lr_warm_up_steps": (0, math.inf, True, False),
    "training.lr_decay_steps": (0, math.inf, True, False),
    "training.adam_beta1": (0, 1, True, False),
    "training.adam_beta2": (0, 1, True, False),
    "training.clip": (0, math.inf, True, False),
    "training.ema": (0, 1, True, False),
    "training.aux_coefficient": (0, math.inf, True, False),
    "training.dead_after": (1, math.inf, True, False),
    "training.resample_every": (1, math.inf, True, False),
    "training.seed": (0, 2**31, True, False),
    "training.save_every": (0, math.inf, False, False),
    "evaluation.tokens": (1, math.inf, True, False),
    "evaluation.ce_tokens": (0, math.inf, True, False),
    "evaluation.every": (0, 1, True, True),
    "log.every": (1, math.inf, True, False),
}
# fields that one architecture reads and the others would leave without effect
_ONLY_OF = {
    "matryoshka_widths": "matryoshka",
    "jumprelu_sparsity_loss_mode": "jumprelu",
    "jumprelu_bandwidth": "jumprelu",
    "jumprelu_init_threshold": "jumprelu",
    "l0_coefficient": "jumprelu",
    "l0_warm_up": "jumprelu",
    "l1_coefficient": "relu",
    "l1_warm_up": "relu",
}
_ARCHITECTURES = {"topk", "batchtopk", *_ONLY_OF.values()}


def load(path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
    """Read a recipe file, or the `recipe.yaml` of a run folder; overrides such as `sae.k=64` win."""
    path = Path(path)
    if path.is_dir():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path}: a folder without recipe.yaml, so not a run. Give a recipe file or a run folder.")
        path = path / "recipe.yaml"
    return build(read(path), str(path), overrides)


def build(mapping: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> "Recipe":
    """Check a nested mapping field by field and make a Recipe of it; `where` begins every complaint."""
    from sae import Recipe  # by its lazy public name: recipe.py stands above this page

    given, origin = _flat(mapping, where, Recipe), where
    for text in overrides:
        key, sign, value = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not sign:
            raise UserError(f"{text}: an override reads section.field=value, such as sae.k=64.")
        _field_type(Recipe, key, "command line")
        given[key] = (value.strip(), "command line")

    values = {key: _convert(value, _field_type(Recipe, key, at), key, at) for key, (value, at) in given.items()}
    for key, value in values.items():
        _check_range(key, value, given[key][1])
    recipe = _assemble(Recipe, values)
    check_together(recipe, origin)
    return recipe


def read(path: str | Path) -> dict[str, Any]:
    """A recipe file as a nested dict, values untouched."""
    path = Path(path)
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml, ".json": _read_json}
    if path.suffix not in readers and not path.exists():
        raise UserError(f"{path}: no such recipe file or run folder{_nearest_file(path)}. Check the path.")
    if path.suffix not in readers:
        raise UserError(f"{path}: not a recipe (ends in '{path.suffix}'). Recipes are .yaml, .toml or .json files.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file{_nearest_file(path)}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    try:
        value = readers[path.suffix](text, path)
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{path}: holds a value that cannot be read ({str(error)[:80]}). Mend it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {_kind(value)}, expected sections such as `sae: {{k: 32}}`.")
    return value


def to_dict(recipe: "Recipe") -> dict[str, Any]:
    """The recipe as plain nested dicts and lists, every field written out: as it comes back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def to_yaml(recipe: "Recipe") -> str:
    """The recipe as YAML, every field written out, in the order of flow; `load` reads it back unchanged."""
    return dict_to_yaml(to_dict(recipe))


def dict_to_yaml(recipe: Mapping[str, Any]) -> str:
    """A recipe's nested dict as YAML."""
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, default_flow_style=False)


def count(text: str) -> int | None:
    """A whole number as recipes write it: 500, 20k, 4M; None for anything else."""
    number = _number(text.strip(), _COUNT)
    return int(number) if number is not None and number == int(number) else None


def fields() -> dict[str, tuple[str, Any, str]]:
    """Every dotted field with its type, its default and the sentence under it (what `--help` shows)."""
    import ast
    import inspect

    from sae import Recipe

    tree = ast.parse(Path(inspect.getfile(Recipe)).read_text(encoding="utf-8"))
    sentences: dict[tuple[str, str], str] = {}
    for page in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for line, below in zip(page.body, page.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant):
                    sentences[page.name, line.target.id] = " ".join(str(text.value).split())

    found: dict[str, tuple[str, Any, str]] = {}

    def walk(kind: type, prefix: str, default: Any) -> None:
        for name, hint in typing.get_type_hints(kind).items():
            value = getattr(default, name)
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                walk(hint, f"{prefix}{name}.", value)
            else:
                spelled = hint.__name__ if isinstance(hint, type) else str(hint).replace(" | None", "")
                spelled = spelled.replace("tuple[int, ...]", "counts")
                found[prefix + name] = (spelled, value, sentences.get((kind.__name__, name), ""))

    walk(Recipe, "", Recipe())
    return found


# ---- reading files ---------------------------------------------------------------------------------------


def _read_yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict = {}

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                if not isinstance(key_node.value, str):
                    continue  # a list as a key: the parent refuses it with its line
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"{path}: line {line}: {key_node.value} is given twice. Keep one of the two.")
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""])
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
    try:
        return yaml.load(text, Loader) or {}  # noqa: S506 - a SafeLoader with fewer resolvers
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {line}not valid YAML ({problem or error}). Mend that line.") from error


def _read_toml(text: str, path: Path) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error}). Mend that line.") from error


def _read_json(text: str, path: Path) -> Any:
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Mend that line.") from error


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    return nearest(
        path.name, [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml", ".toml", ".json")]
    )


# ---- fields and values -----------------------------------------------------------------------------------


def _flat(mapping: Mapping[str, Any], where: str, kind: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """{dotted field: (value, where)}; unknown names and sections that are no sections are errors."""
    found: dict[str, tuple[Any, str]] = {}
    for name, value in mapping.items():
        hint = _field_type(kind, str(name), where, prefix, sections=True)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{where}: {prefix}{name} is {_kind(value)}, expected its fields "
                    f"({', '.join(typing.get_type_hints(hint))})."
                )
            found.update(_flat(value, where, hint, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = (value, where)
    return found


def _field_type(kind: type, dotted: str, where: str, prefix: str = "", sections: bool = False) -> Any:
    """The type of a dotted field; a UserError with the nearest name when there is none."""
    head, _, rest = dotted.partition(".")
    hints = typing.get_type_hints(kind)
    is_section = dataclasses.is_dataclass(hints.get(head))
    if head not in hints or (rest and not is_section):
        of = f"a field of {prefix[:-1]} (fields" if prefix else "a section of the recipe (sections"
        raise UserError(f"{where}: {prefix}{dotted} is not {of}: {', '.join(hints)}){_or_elsewhere(head, hints, kind)}")
    if rest:
        return _field_type(hints[head], rest, where, f"{prefix}{head}.")
    if is_section and not sections:
        inner = next(iter(typing.get_type_hints(hints[head])))
        raise UserError(f"{where}: {head} is a section; set one of its fields, such as {head}.{inner}=…")
    return hints[head]


def _or_elsewhere(word: str, hints: Mapping[str, Any], kind: type) -> str:
    """The nearest name, or the section that has a field of this name: `k=64` at the top means sae.k."""
    for section, hint in hints.items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and word in typing.get_type_hints(hint):
            return f"; did you mean {section}.{word}?"
    return nearest(word, hints) or "."


def _convert(value: Any, hint: Any, key: str, where: str) -> Any:
    """A value as its field's type, or a UserError that names file, field and value."""
    if hint == str | dict[str, float]:
        return _mixture(value, key, where)
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    word = value.strip() if isinstance(value, str) else value

    if typing.get_origin(hint) is tuple:
        parts = (
            word.strip("[]").split(",") if isinstance(word, str) else word if isinstance(word, list | tuple) else [word]
        )
        numbers = [_number(part.strip() if isinstance(part, str) else part, _COUNT) for part in parts]
        if not numbers or any(number is None or number != int(number) for number in numbers):
            raise _wrong(value, key, where, "counts such as 128,512,2k")
        return tuple(int(number) for number in numbers if number is not None)
    if hint is bool:
        if word in (True, False) and isinstance(word, bool):
            return word
        if word in ("true", "false"):
            return word == "true"
        raise _wrong(value, key, where, "true or false")
    if hint is str:
        if isinstance(word, str) and word:
            return word
        if isinstance(word, int | float) and not isinstance(word, bool):
            return str(word)
        raise _wrong(value, key, where, "a word or a path")

    number = _number(word, _TIME if key.rpartition(".")[2] in _SECONDS else _COUNT)
    if hint is int:
        if number is None or number != int(number):
            raise _wrong(value, key, where, "a whole number such as 4096, 20k or 4M")
        return int(number)
    if number is None:
        like = "seconds such as 60, 60s or 5m" if key.rpartition(".")[2] in _SECONDS else "a number such as 0.1 or 1e-3"
        raise _wrong(value, key, where, like)
    return float(number)


def _mixture(value: Any, key: str, where: str) -> str | dict[str, float]:
    """One source, or several with their shares: a mapping, also as YAML on the command line."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = _read_yaml(value, Path(where))
    if not isinstance(value, Mapping):
        return _convert(value, str, key, where)
    shares = {str(name): _number(share, {}) for name, share in value.items()}
    if not shares or any(share is None or share <= 0 for share in shares.values()):
        told = ", ".join(f"{name}: {share}" for name, share in value.items())
        raise UserError(
            f"{where}: {key} is {{{told[:100]}}}, expected sources with shares above 0, such as "
            "{bundled: 0.7, texts/*.txt: 0.3}."
        )
    return {name: float(share) for name, share in shares.items() if share is not None}


def _number(word: Any, units: Mapping[str, int]) -> int | float | None:
    """20k → 20000, 1e-3 → 0.001, 5m → 300; None for anything that is not a finite number below 1e100."""
    if isinstance(word, bool):
        return None
    if isinstance(word, int | float):
        return word if abs(word) < _HUGE else None
    if not isinstance(word, str):
        return None
    unit = 1
    if word and word[-1] in units:
        word, unit = word[:-1].rstrip(), units[word[-1]]
    if len(word) > 100 or not _NUMBER.fullmatch(word):
        return None
    plain = word.replace("_", "").replace(",", "")
    number = float(plain) if any(c in plain for c in ".eE") else int(plain)
    scaled = number * unit
    if not abs(scaled) < _HUGE:
        return None
    # 0.3M is 300000, though 0.3 * 1e6 need not be exactly
    return round(scaled) if unit > 1 and math.isclose(scaled, round(scaled), rel_tol=1e-12) else scaled


def _check_range(key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if key == "text.positions" and not _SLICE.fullmatch(value):
        raise UserError(f"{where}: {key} is {value!r}, expected a slice such as 4: or 0:64.")
    if key in _CHOICES and value not in _CHOICES[key]:
        close = nearest(value, _CHOICES[key]) or "."
        raise UserError(f"{where}: {key} is {value}, expected one of {', '.join(_CHOICES[key])}{close}")
    if key in _RANGES:
        low, high, with_low, with_high = _RANGES[key]
        above = value >= low if with_low else value > low
        below = value <= high if with_high else value < high
        if not (above and below):
            expected = f"{'at least' if with_low else 'above'} {low:g}"
            if math.isfinite(high):
                expected += f" and {'at most' if with_high else 'below'} {high:g}"
            raise UserError(f"{where}: {key} is {value:,}, expected {expected}.")


def check_together(recipe: "Recipe", where: str) -> None:
    """Refuse fields that contradict each other; `where` begins the complaint. For recipes made in Python too."""
    if recipe.sae.k > recipe.sae.d_sae:
        raise UserError(
            f"{where}: sae.k is {recipe.sae.k:,}, more than sae.d_sae ({recipe.sae.d_sae:,}). Lower k or raise d_sae."
        )
    for name, reader in _ONLY_OF.items():
        told, default = getattr(recipe.sae, name), type(recipe.sae).__dataclass_fields__[name].default
        if told != default and recipe.sae.architecture in _ARCHITECTURES - {reader}:
            raise UserError(
                f"{where}: sae.{name} is for {reader}, and sae.architecture is {recipe.sae.architecture}. "
                f"Leave it out or choose {reader}."
            )
    if recipe.sae.target_l0 is not None and recipe.sae.architecture in ("topk", "batchtopk", "matryoshka"):
        raise UserError(
            f"{where}: sae.target_l0 is for jumprelu and relu, and sae.architecture is {recipe.sae.architecture}. "
            "Its L0 is sae.k; set that."
        )
    for weight, warm_up in (("l0_coefficient", "l0_warm_up"), ("l1_coefficient", "l1_warm_up")):
        given = getattr(recipe.sae, weight)
        if recipe.sae.target_l0 is not None and given == 0:
            raise UserError(
                f"{where}: sae.{weight} is 0 and sae.target_l0 {recipe.sae.target_l0:g}: a weight of 0 holds nothing. "
                "Leave one of the two out."
            )
        if (getattr(recipe.sae, warm_up) or 0) > 0.5 and (given is None or recipe.sae.target_l0 is not None):
            raise UserError(
                f"{where}: sae.{warm_up} is {getattr(recipe.sae, warm_up):g}: L0 is held after that share of the run, "
                f"which must leave half of it. Lower it, or fix the weight with sae.{weight} and no target."
            )
    if (recipe.sae.target_l0 or 0) > recipe.sae.d_sae:
        raise UserError(
            f"{where}: sae.target_l0 is {recipe.sae.target_l0:g}, more than sae.d_sae ({recipe.sae.d_sae:,}). Lower it."
        )
    widths = recipe.sae.matryoshka_widths
    if widths is not None and (widths != tuple(sorted({*widths})) or widths[0] < 1 or widths[-1] != recipe.sae.d_sae):
        raise UserError(
            f"{where}: sae.matryoshka_widths is {','.join(map(str, widths))}, expected ascending counts, the last one "
            f"sae.d_sae ({recipe.sae.d_sae}); auto makes them."
        )
    start = int((recipe.text.positions or ":").partition(":")[0] or 0)
    if start >= recipe.text.context:
        raise UserError(
            f"{where}: text.positions is {recipe.text.positions}, and text.context is {recipe.text.context}: no "
            "position is left. Begin before the context ends."
        )
    training = recipe.training
    if training.finetune == "threshold" and recipe.sae.architecture in _ARCHITECTURES - {"jumprelu"}:
        raise UserError(
            f"{where}: training.finetune is threshold, and {recipe.sae.architecture} trains no threshold. "
            "Choose decoder, or begin jumprelu from that SAE."
        )
    if training.finetune != "all" and training.resample_every is not None:
        raise UserError(
            f"{where}: training.resample_every replaces encoder rows, and training.finetune is {training.finetune}. "
            "Leave one of the two out."
        )
    if training.finetune != "all" and training.init_from is None:
        raise UserError(
            f"{where}: training.finetune is {training.finetune}, and no SAE is given to begin from. "
            "Set training.init_from."
        )
    updates = max(1, training.tokens // (training.batch * training.grad_acc_steps))
    for name in ("lr_warm_up_steps", "lr_decay_steps"):
        if (getattr(training, name) or 0) > updates:
            raise UserError(
                f"{where}: training.{name} is {getattr(training, name):,}, the run has {updates:,} updates. "
                "Lower it or leave it to auto."
            )
    if training.batch * training.grad_acc_steps > training.tokens:
        times = f" times training.grad_acc_steps ({training.grad_acc_steps:,})" if training.grad_acc_steps > 1 else ""
        raise UserError(
            f"{where}: training.batch is {training.batch:,}{times}, more than training.tokens "
            f"({training.tokens:,}). Lower the batch or raise the tokens."
        )


def _assemble(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = _assemble(hint, values, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return kind(**arguments)


def _wrong(value: Any, key: str, where: str, expected: str) -> UserError:
    return UserError(f"{where}: {key} is {_kind(value)}, expected {expected}.")


def _kind(value: Any) -> str:
    """A value for a message: what it is where that helps, else itself."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "empty"
    if isinstance(value, int) and abs(value) >= _HUGE:
        return "a number too large to use"
    told = str(value).lower() if isinstance(value, bool) else repr(value)
    return told if len(told) <= 100 else f"{told[:60]}… ({len(told):,} characters)"
