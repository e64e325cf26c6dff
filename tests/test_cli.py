"""The command line: what it prints, its one-line errors, and what each verb calls."""

import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sae import UserError, cli, config
from sae.errors import Stopped
from sae.recipe import SAERecipe

RECIPE = "configs/smollm2.yaml"

WAYS = (
    'Give one: a concept such as "golden gate bridge", texts with --pos, or --text, --token, --words, --like, '
    "--effect or --toward."
)


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("goldengate-sae 0.")


@pytest.mark.parametrize("verb", [*cli.VERBS, *cli.ALIASES])
def test_every_verb_has_a_help_page(capsys, verb):
    code, out, err = run(capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: sae {cli.ALIASES.get(verb, verb)}")
    assert err == ""


def test_train_help_shows_every_field_with_its_sentence_and_the_values_of_a_given_file(capsys):
    _, out, _ = run(capsys, "train", "--help")
    for key, (_, _, sentence) in config.fields().items():
        assert f"--{key} " in out
        assert sentence in out
    assert "--sae.d_sae INT  (now 8,192)" in out
    assert "--out STR  (now runs/sae)" in out
    assert "--out STR  (now runs/smollm2)" in run(capsys, "train", RECIPE, "--help")[1]


def test_print_config_merges_file_and_overrides_in_every_spelling(capsys, tmp_path):
    words = ["sae.k=64", "--text.held-out", "0.2", "--training.save_every=5m", "--out", "runs/b"]
    code, out, _ = run(capsys, "train", RECIPE, *words, "--print-config")
    assert code == 0
    (tmp_path / "a.yaml").write_text(out)
    recipe = config.load(tmp_path / "a.yaml")
    assert (recipe.sae.k, recipe.text.held_out, recipe.training.save_every, recipe.out) == (
        64,
        0.2,
        300,
        "runs/b",
    )
    assert recipe.sae.d_sae == config.load(RECIPE).sae.d_sae


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("trian", "sae: trian is not a verb; did you mean train? `sae --help` lists them."),
        ("train", "RECIPE is missing. "
         "Write: sae train RECIPE|RUN_FOLDER [sae.k=64 | --sae.k 64 …] [--sweep sae.k=16,32,64 …]"),
        ("train x.yaml", "x.yaml: no such file. Check the path."),
        (f"train {RECIPE} --lr 3", "--lr is not a flag; did you mean --training.lr? See `sae train --help`."),
        (f"train {RECIPE} --sae.kk=3", "command line: sae.kk is not a field of sae (fields: "
         f"{', '.join(vars(SAERecipe()))}); did you mean k?"),
        (f"train {RECIPE} --sae.k", "--sae.k: no value given. Write --sae.k VALUE or sae.k=VALUE."),
        (f"train {RECIPE} --prnt-config", "--prnt-config is not a flag; did you mean --print-config? "
         "See `sae train --help`."),
        ("find", 'SAE is missing. Write: sae find SAE "golden gate bridge" [--for steer]'),
        ("find a", f"nothing to look for. {WAYS}"),
        ("find a b --token c", f"a concept and --token given. {WAYS}"),
        ("find a b c", "'c' is one word too many. "
         'Write: sae find SAE "golden gate bridge" [--for steer]'),
        ("find a b --for stee", "--for is 'stee', expected one of detect, steer; did you mean steer?"),
        ("find a b -n ten", "-n is 'ten', expected a whole number such as 500 or 20k."),
        ("find a b -n", "-n: expected one argument. See `sae find --help`."),
        ("steer a 3=5x", 'no prompt given, expected one. Put it in quotes: sae steer SAE 3=5x '
         '"Who are you?"'),
        ("steer a hello", 'no feature given. Write FEATURE=STRENGTH before the prompt: '
         'sae steer SAE 1286=5x "Hello"'),
        ("steer a 3=5x b c", '2 prompts (b, c) given, expected one. Put it in quotes: '
         'sae steer SAE 3=5x "Who are you?"'),
        ("steer a 3=5x b --top-p x", "--top-p is 'x', expected a number from 0 up."),
        ("steer a 3=5x b --temperature 1e-40", "--temperature is '1e-40', expected 0 or 0.01 to 100."),
        ("steer a 3=5x b --seed 1e25", "--seed is '1e25', expected a whole number below 2,147,483,648."),
        (f"train {RECIPE} sae.k={'9' * 5000}", f"command line: sae.k is '{'9' * 59}… (5,002 characters), "
         "expected a whole number such as 4096, 20k or 4M."),
        (f"train {RECIPE} training.seed={2**62}", f"command line: training.seed is {2**62:,}, "
         "expected at least 0 and below 2.14748e+09."),
        ("show a 3 --json .", "--json: '.' is no name for a file. Give a path such as out.json."),
        ("index a --text b --store c", "--store: not allowed with argument --text. See `sae index --help`."),
        ("push a", "REPO is missing. Write: sae push SAE user/repo [--path NAME]"),
        ("push no/where u/r", "no/where: no such SAE. Check the path."),
        ("info no/where", "no/where: no such file or folder. Check the path."),
    ],
)  # fmt: skip
def test_bad_words_are_one_line_and_exit_2(capsys, command, line):
    code, out, err = run(capsys, *command.split())
    assert (code, out) == (2, "")
    assert err == (line if line.startswith("sae: ") else f"sae {command.split()[0]}: {line}") + "\n"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("a: is b. Do c."), 2, "sae info: a: is b. Do c.\n"),
        (Stopped("stopped and saved. Go on with: x"), 130, "sae info: stopped and saved. Go on with: x\n"),
        (UserError("info: is b. Do c."), 2, "sae info: is b. Do c.\n"),
        (UserError("a\n b\x1b[31m: is\tb.\r\nDo c."), 2, "sae info: a b: is b. Do c.\n"),
        (KeyboardInterrupt(), 130, "sae info: interrupted\n"),
    ],
)
def test_what_ends_a_verb_early_has_its_exit_code(capsys, monkeypatch, raised, code, line):
    def fails(what):
        raise raised

    monkeypatch.setattr("sae.run.info", fails)
    assert run(capsys, "info", "x") == (code, "", line)


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("sae.run.info", lambda what: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "x"])


def test_train_passes_the_recipe_and_prints_the_figures(capsys, monkeypatch, tmp_path):
    figures = {"fvu": {"value": 0.16, "low": 0.15, "high": 0.17, "n": 20_000}}
    seen = {}

    def train_many(recipes, resume):
        seen.update(recipe=recipes[0], resume=resume)
        return [SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(evaluation=figures)))]

    monkeypatch.setattr("sae.run.train_many", train_many)
    code, out, _ = run(capsys, "train", RECIPE, "sae.k=7", "--json", str(tmp_path / "out.json"))
    assert code == 0
    assert (seen["recipe"].sae.k, seen["resume"]) == (7, False)
    assert "0.160 [0.150, 0.170]" in out
    assert "runs/smollm2/sae" in out
    assert json.loads((tmp_path / "out.json").read_text()) == figures

    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(config.to_yaml(seen["recipe"]))
    assert run(capsys, "train", str(folder))[0] == 0
    assert (seen["recipe"].out, seen["recipe"].sae.k, seen["resume"]) == (str(folder), 7, True)


def test_a_sweep_is_every_combination_in_a_folder_of_its_name(capsys, monkeypatch, tmp_path):
    seen = {}

    def train_many(recipes, resume):
        seen.update(recipes=recipes, resume=resume)
        figures = [{"fvu": {"value": 0.1 * (i + 1)}, "l0": {"value": recipe.sae.k}} for i, recipe in enumerate(recipes)]
        return [SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(evaluation=one))) for one in figures]

    monkeypatch.setattr("sae.run.train_many", train_many)
    words = ["--sweep", "sae.k=16,32", "--sweep=training.seed=0,1", "sae.d_sae=1k", "--out", "runs/x", "--resume"]
    code, out, _ = run(capsys, "train", RECIPE, *words, "--json", str(tmp_path / "o.json"))
    assert code == 0 and seen["resume"]
    assert [(one.sae.k, one.training.seed, one.sae.d_sae) for one in seen["recipes"]] == [
        (16, 0, 1000), (16, 1, 1000), (32, 0, 1000), (32, 1, 1000)
    ]  # fmt: skip
    assert seen["recipes"][2].out == "runs/x/k=32,seed=0"
    assert out.splitlines()[0].split() == ["k", "seed", "FVU", "L0", "folder"]
    assert out.splitlines()[4].split() == ["32", "0", "0.300", "32", "runs/x/k=32,seed=0/sae"]
    written = json.loads((tmp_path / "o.json").read_text())
    assert written[3]["name"] == "k=32,seed=1" and written[3]["fvu"]["value"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--sweep", "sae.k"], "--sweep sae.k: expected a field and different values, such as sae.k=16,32,64."),
        (["--sweep", "sae.k=3,3"], "expected a field and different values"),
        (["--sweep", "sae.kk=3,4"], "sae.kk is not a field of sae"),
        (["--sweep", "sae.k=3,x"], "sae.k is 'x', expected a whole number"),
        (["--sweep", "sae.k=3", "--sweep", "sae.k=4"], "--sweep: sae.k is given twice"),
        (["--sweep", "training.tokens=1M,2M"], "training.tokens: is 1000000 and 2000000 for SAEs on one stream"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(capsys, tmp_path, words, said):
    code, _, err = run(capsys, "train", RECIPE, *words, "--out", str(tmp_path / "run"))
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_steer_passes_its_dials_and_prints_both_answers_as_they_come(capsys, monkeypatch, tmp_path):
    def steer_prompt(sae, dials, prompt, *, stream_plain, stream_steered, **settings):
        assert (sae, dials, prompt) == ("a", ["3=5x", "7=off"], "Who are you?")
        assert settings == {
            "host": None,
            "how": {
                "positions": "generated", "kind": "clamp", "when": [], "plan": None, "abort_when": [], "select": None,
            },
            "system": None, "max_new_tokens": 9,
            "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 2,
        }  # fmt: skip
        for piece in ("I am", " a model.\n", "Yes."):
            stream_plain(piece)
        for piece in ("I am \x1b[31m", "the bridge."):
            stream_steered(piece)
        return "I am a model.\nYes.", "I am the bridge."

    monkeypatch.setattr("sae.run.steer_prompt", steer_prompt)
    command = "steer a 3=5x --positions generated --max_new_tokens 9 7=off --temperature 0 --seed 2 --json"
    code, out, _ = run(capsys, *command.split(), str(tmp_path / "o.json"), "Who are you?")
    assert code == 0
    assert out == "── plain ──\nI am a model.\nYes.\n\n── 3=5x 7=off ──\nI am the bridge.\n"
    written = json.loads((tmp_path / "o.json").read_text())
    assert (written["plain"], written["steered"]) == ("I am a model.\nYes.", "I am the bridge.")


def test_find_prints_a_table_and_contexts_with_the_firing_token_marked(capsys, monkeypatch, tmp_path):
    from sae.features.index import ContextToken
    from sae.features.rows import FeatureList, Found, Shown

    tokens = [ContextToken("the", False, 0.0), ContextToken(" Golden", True, 12.5), ContextToken(" Gate", False, 3.0)]
    found = Found(
        feature=1286, score=0.98, density=0.001, max_act=40.25, auroc=0.987, sensitivity=0.95, specificity=0.9,
        top_tokens=[" Bridge", " bridge"], examples=[Shown(12.5, 0, "", tokens)], tried=0.4, strength=1.5,
        wrote=["I am a bridge."], positives=20, negatives=75, label="the bridge",
    )  # fmt: skip
    texts = tmp_path / "pos.txt"
    texts.write_text("one\n\ntwo\n")

    def find(sae, concept, *, pos, neg, goal, n, index_path, **others):
        assert (sae, concept, pos, neg, goal, n) == ("a", "gate", ["one", "two"], None, "steer", 3)
        assert index_path == "i"
        assert not any(others.values())
        return FeatureList([found], "trial", noise=0.8)

    monkeypatch.setattr("sae.run.find", find)
    words = ["find", "a", "gate", "--pos", str(texts), "--for", "steer", "-n", "3", "--index", "i"]
    code, out, _ = run(capsys, *words, "--json", str(tmp_path / "o.json"))
    assert code == 0
    assert "1286" in out
    assert "the bridge" in out
    assert "Bridge bridge" in out
    assert "«Golden»⁴ Gate¹" in out
    assert "wrote at 1.5x: I am a bridge." in out
    assert "(20 with the concept, 75 without)" in out
    assert "noise reaches 0.80" in out
    assert "out: not known" in out
    assert out.endswith('steer: sae steer a 1286=1.5x "Who are you?"\n')
    kept = json.loads((tmp_path / "o.json").read_text())
    assert kept["features"][0]["feature"] == 1286 and kept["noise"] == 0.8


def test_index_names_itself_in_the_next_step_and_writes_its_facts(capsys, monkeypatch, tmp_path):
    @dataclass
    class Facts:
        n_features: int = 8
        n_tokens: int = 500

    def index(sae, *, text, store, out, part, tokens, scores, host):
        assert (sae, out, part, scores) == ("a", "my index", "all", False)
        assert host in (None, "my model")
        return SimpleNamespace(path=tmp_path, facts=Facts())

    monkeypatch.setattr("sae.run.index", index)
    code, out, _ = run(capsys, "index", "a", "--out", "my index", "--no-scores", "--json", str(tmp_path / "o.json"))
    assert code == 0
    assert out.endswith("next: sae find a \"golden gate bridge\" --index 'my index'\n")
    code, out, _ = run(capsys, "index", "a", "--out", "my index", "--no-scores", "--host", "my model")
    assert out.endswith("next: sae find a \"golden gate bridge\" --index 'my index' --host 'my model'\n")
    assert json.loads((tmp_path / "o.json").read_text()) == {"path": str(tmp_path), "n_features": 8, "n_tokens": 500}


def test_harvest_writes_what_it_made(capsys, monkeypatch, tmp_path):
    store = SimpleNamespace(path=str(tmp_path), n_rows=7, hooks=["h"])
    monkeypatch.setattr("sae.run.harvest", lambda recipe, **_: store)
    assert run(capsys, "harvest", RECIPE, "--json", str(tmp_path / "o.json"))[0] == 0
    assert json.loads((tmp_path / "o.json").read_text()) == {"path": str(tmp_path), "rows": 7, "hooks": ["h"]}


def test_off_alone_is_the_plain_model_twice(capsys, monkeypatch):
    monkeypatch.setattr("sae.run.steer_prompt", lambda sae, dials, prompt, **_: (str(dials), prompt))
    assert run(capsys, "steer", "a", "off", "Who are you?")[0] == 0


def test_the_installed_command_and_the_module_say_the_same():
    said = subprocess.run([sys.executable, "-m", "sae", "trian"], capture_output=True, text=True)
    assert said.returncode == 2
    assert said.stderr == "sae: trian is not a verb; did you mean train? `sae --help` lists them.\n"
