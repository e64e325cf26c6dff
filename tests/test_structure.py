"""The house's rules: every knob has a reader, one page writes, starting is light, the README is true."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import sae
from sae import Recipe, cli, config

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "sae").rglob("*.py")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
MACHINERY = {Path("sae") / name for name in ("recipe.py", "config.py", "cli.py", "flags.py", "plan.py")}


def pages():
    return sorted(PAGES.items())


# ---- recipe ----------------------------------------------------------------------------------------------


def sections_read(tree):
    """Every (section, field) that a page reads: `recipe.sae.k`, or `recipe.k` of a SAERecipe argument."""
    sections = {
        hint.__name__: name for name, hint in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(hint)
    }
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            read.add((node.value.attr, node.attr))
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        typed = {}  # names in this function, or attributes of this class, that hold a section or the recipe
        for inner in ast.walk(node):
            arguments = [*inner.args.args, *inner.args.kwonlyargs] if isinstance(inner, ast.FunctionDef) else []
            for argument in arguments:
                named = {part.id for part in ast.walk(argument) if isinstance(part, ast.Name)}
                for kind in named & (set(sections) | {"Recipe"}):
                    typed[argument.arg] = sections.get(kind, "")
            if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Attribute):  # training = recipe.training
                for name in inner.targets:
                    if isinstance(name, ast.Name) and inner.value.attr in sections.values():
                        typed[name.id] = inner.value.attr
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name | ast.Attribute):
                owner = inner.value.id if isinstance(inner.value, ast.Name) else inner.value.attr
                if owner in typed:
                    read.add((typed[owner], inner.attr))
    return read


def test_every_field_of_the_recipe_has_a_reader():
    read = set()
    for path, tree in pages():
        if path not in MACHINERY:
            read |= sections_read(tree)
    unread = [key for key in config.fields() if (key.rpartition(".")[0], key.rpartition(".")[2]) not in read]
    assert unread == [], "settings that steer nothing"


# ---- files -----------------------------------------------------------------------------------------------

WRITERS = {"write_text", "write_bytes", "save_file", "to_parquet", "to_csv", "to_json", "tofile", "truncate"}
SAVERS = {("torch", "save"), ("np", "save"), ("np", "savez"), ("np", "savez_compressed"), ("numpy", "save"),
          ("pickle", "dump"), ("json", "dump"), ("yaml", "dump_all")}  # fmt: skip
OPENERS = {"gzip", "io", "bz2", "lzma", "codecs", "fsspec", "tarfile", "zipfile"}
MODE = re.compile(r"[rwaxbt+U]*[wax+][rwaxbt+U]*")


def writes(call):
    """Whether a call opens a file for writing."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if owner == "files":  # sae.files itself, which everybody should use
        return False
    if name in WRITERS or (owner, name) in SAVERS:
        return True
    if name in ("open", "fdopen") and owner != "os":
        modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        # open(file, mode) and gzip.open(file, mode), but path.open(mode)
        modes += call.args[1:2] if isinstance(function, ast.Name) or owner in OPENERS else call.args[:2]
        texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
        return any(isinstance(text, str) and MODE.fullmatch(text) for text in texts)
    return name in ("NamedTemporaryFile", "mkstemp", "TemporaryFile")


def test_only_files_py_opens_files_for_writing():
    found = [
        f"{path}:{node.lineno}"
        for path, tree in pages()
        if path != Path("sae/files.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and writes(node)
    ]
    assert found == []


def test_the_test_above_would_notice():
    lines = ["open('a', 'w')", "Path('a').open('ab')", "gzip.open('a', mode='wt')", "path.write_text('')",
             "torch.save(x, 'a')", "save_file(x, 'a')", "np.save('a', x)"]  # fmt: skip
    for line in lines:
        assert any(writes(node) for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)), line
    for line in ["open('a')", "open('a', 'rb')", "files.write_text('a', '')", "host.open('xyz')"]:
        assert not any(writes(node) for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)), line


# ---- starting --------------------------------------------------------------------------------------------

LOADED = """
import sys
from sae.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print("loaded:", *sorted({heavy!r} & set(sys.modules)))
"""


@pytest.mark.parametrize("argv", [[], ["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_loads_neither_torch_nor_transformers(argv):
    heavy = {"torch", "transformers", "transformer_lens", "numpy", "datasets", "wandb", "pydantic"}
    if len(argv) < 2:
        heavy |= {"argparse", "yaml", "dataclasses", "json", "sae.recipe", "importlib.metadata"}
    script = LOADED.format(argv=argv, heavy=heavy)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "loaded:"


def test_the_light_pages_import_nothing_heavy_at_their_top():
    for name in ("__init__", "__main__", "cli", "flags", "config", "recipe", "errors"):
        for node in PAGES[Path(f"sae/{name}.py")].body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"torch", "transformers", "numpy", "yaml"} & {name.partition(".")[0] for name in names}, name


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sae.__all__)
def test_every_public_name_resolves(name):
    assert getattr(sae, name).__module__.startswith("sae.")


def test_an_unknown_public_name_says_which_there_are():
    with pytest.raises(AttributeError, match=r"no attribute 'Hots' \(public names: .*Host"):
        _ = sae.Hots


def test_every_page_has_a_docstring_and_none_is_called_utils():
    for path, tree in pages():
        assert "utils" not in path.stem, path
        assert ast.get_docstring(tree) or not tree.body, path


def test_no_except_without_a_named_type():
    bare = [
        f"{path}:{node.lineno}"
        for path, tree in pages()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_every_verb_of_the_table_is_a_function():
    assert all(callable(cli.page(verb)) for verb in cli.VERBS)
    assert set(cli.ALIASES.values()) <= set(cli.VERBS)


def test_what_the_verbs_import_exists():
    """Heavy imports stand inside the verbs, where only a run would find a name that went away."""
    for node in ast.walk(PAGES[Path("sae/cli.py")]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                found = hasattr(module, alias.name) or (ROOT / "sae" / f"{alias.name}.py").exists()
                assert found, f"{node.module}.{alias.name}"


# ---- README ----------------------------------------------------------------------------------------------


def code_of(markdown):
    """The text of fenced blocks and of code spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", markdown, re.S | re.M)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M))
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()] + spans


def help_of(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    return capsys.readouterr().out


def test_every_verb_and_flag_that_the_readme_mentions_exists(capsys):
    known = {verb: help_of(verb, capsys) for verb in cli.VERBS}
    for line in code_of(README):
        if not (found := re.match(r"sae ([a-z]+)\b(.*)", line)):
            continue
        verb = cli.ALIASES.get(found[1], found[1])
        assert verb in cli.VERBS, line
        for flag in re.findall(r"(?<=\s)--?[a-z][\w.-]*", found[2]):
            assert re.search(rf"(?<!\S){re.escape(flag)}\b", known[verb]), f"{line}: {flag}"


def test_every_public_name_and_file_that_the_readme_mentions_exists():
    for line in code_of(README):
        if found := re.match(r"from (sae[\w.]*) import (.+)", line):
            module = importlib.import_module(found[1])
            for name in found[2].strip("()").split(","):
                assert hasattr(module, name.split(" as ")[0].strip()), line
        for path in re.findall(r"(?<![\w/])(?:configs|checkpoints|experiments|tests|sae)/[\w./-]*\w", line):
            assert (ROOT / path).exists(), path
