"""Recipes from files and overrides: what is read, and the one line that every mistake gets."""

import dataclasses
import json
from pathlib import Path

import pytest

from sae import Recipe, UserError, config
from sae.architectures import ARCHITECTURES

FIELDS = ", ".join(field.name for field in dataclasses.fields(Recipe().sae))


def written(tmp_path, text, name="a.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_shipped_recipe_reads_as_it_stands():
    recipe = config.load("configs/smollm2.yaml")
    assert (recipe.sae.d_sae, recipe.sae.k, recipe.training.tokens) == (4096, 16, 4_000_000)
    assert recipe.training.lr is None
    assert recipe.training.save_every == 60.0
    assert recipe.log.wandb == "off"
    assert recipe.evaluation.tokens == 20_000


CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_shares_one_store_but_no_folder(path):
    recipe, shipped = config.load(path), config.load("configs/smollm2.yaml")
    assert (recipe.host, recipe.text, recipe.activations) == (shipped.host, shipped.text, shipped.activations)
    assert recipe.out == f"runs/{path.stem}"
    if path.stem != "smollm2":
        assert recipe.sae.architecture == path.stem


def test_there_is_a_recipe_for_every_architecture():
    assert {config.load(path).sae.architecture for path in CONFIGS} == set(ARCHITECTURES)


def test_yaml_toml_and_json_give_the_same_recipe(tmp_path):
    yaml = written(tmp_path, "sae: {d_sae: 1k, k: 8}\ntraining: {lr: 1e-3, tokens: 0.3M}\n")
    toml = written(tmp_path, '[sae]\nd_sae = "1k"\nk = 8\n[training]\nlr = 1e-3\ntokens = 300_000\n', "a.toml")
    mapping = {"sae": {"d_sae": 1000, "k": "8"}, "training": {"lr": 0.001, "tokens": "300k"}}
    as_json = written(tmp_path, json.dumps(mapping), "a.json")
    recipes = [config.load(path) for path in (yaml, toml, as_json)]
    assert recipes[0] == recipes[1] == recipes[2]
    assert recipes[0].training.lr == 1e-3
    assert recipes[0].training.tokens == 300_000


def test_an_empty_file_is_the_default_recipe(tmp_path):
    assert config.load(written(tmp_path, "")) == Recipe()
    assert config.load(written(tmp_path, "sae:\n")) == Recipe()


def changed_everywhere(but):
    """A recipe with no field at its default but one."""
    values = {}
    for key, (kind, default, _) in config.fields().items():
        if key == but:
            continue
        if key in ("host.dtype", "training.dtype", "activations.dtype"):
            values[key] = "float32"
        elif key == "activations.compile":
            values[key] = "off"
        elif key == "text.source":
            values[key] = "{bundled: 2, a/*.txt: 0.5}"
        elif key == "text.positions":
            values[key] = "4:30"
        elif key == "log.wandb":
            values[key] = "offline"
        elif key == "sae.jumprelu_sparsity_loss_mode":
            values[key] = "step"
        elif key == "training.lr_scheduler_name":
            values[key] = "cosine"
        elif key == "training.finetune":
            values[key] = "decoder"
        elif key == "training.tokens":
            values[key] = 10**9
        elif kind == "counts":
            values[key] = "20,3k,7000"
        elif kind == "bool":
            values[key] = not default
        elif kind == "str":
            values[key] = "1e5: off"
        elif kind == "float":
            values[key] = 0.25
        else:
            values[key] = 9 if key == "sae.k" or key.endswith("_steps") else 7000
    return config.build({}, "test", [f"{key}={str(value).lower()}" for key, value in values.items()])


@pytest.mark.parametrize("but", ["training.finetune", "training.resample_every"])  # which exclude each other
def test_every_field_round_trips_through_yaml_and_json(tmp_path, but):
    recipe = changed_everywhere(but)
    default = config.to_dict(Recipe())
    for section, value in config.to_dict(recipe).items():
        for key, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            same = inner == (default[section][key] if key else default[section])
            assert same == (f"{section}.{key}" == but), (section, key)
    assert config.load(written(tmp_path, config.to_yaml(recipe))) == recipe
    assert config.load(written(tmp_path, json.dumps(config.to_dict(recipe)), "a.json")) == recipe
    assert config.load(written(tmp_path, config.to_yaml(Recipe()))) == Recipe()


def test_a_mixture_of_sources_is_a_mapping_in_a_file_and_on_the_command_line(tmp_path):
    path = written(tmp_path, "text:\n  source: {bundled: 0.7, texts/*.jsonl: 3e-1}\n")
    assert config.load(path).text.source == {"bundled": 0.7, "texts/*.jsonl": 0.3}
    assert config.load(path, ["text.source=a.txt"]).text.source == "a.txt"
    assert config.load(path, ["text.source={a.txt: 1, b: 2}"]).text.source == {"a.txt": 1.0, "b": 2.0}
    for wrong in ("{a.txt: 0}", "{a.txt: x}", "{}", "{a.txt: -1, b: 1}"):
        with pytest.raises(UserError, match="text.source is .*expected sources with shares above 0"):
            config.load(path, [f"text.source={wrong}"])
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(path, ["text.source={a.txt: 1"])


@pytest.mark.parametrize("wrong", ["4", "a:b", "4:-1", "1:2:3"])
def test_positions_are_a_slice(wrong):
    with pytest.raises(UserError, match="text.positions is .*expected a slice such as 4: or 0:64"):
        config.build({}, "test", [f"text.positions={wrong}"])


def test_every_field_has_a_sentence():
    assert [key for key, (_, _, sentence) in config.fields().items() if not sentence.endswith(".")] == []


def test_overrides_win_over_the_file_and_dashes_are_underscores(tmp_path):
    path = written(tmp_path, "sae: {k: 8}\n")
    recipe = config.load(path, ["sae.k=64", "sae.d-sae=20k", "out=runs/b", "training.save_every=5m"])
    assert (recipe.sae.k, recipe.sae.d_sae, recipe.out, recipe.training.save_every) == (
        64,
        20_000,
        "runs/b",
        300,
    )


def test_counts_are_a_list_in_a_file_and_commas_on_the_command_line(tmp_path):
    path = written(tmp_path, "sae: {architecture: matryoshka, d_sae: 2k, matryoshka_widths: [128, 0.5k, 2000]}\n")
    assert config.load(path).sae.matryoshka_widths == (128, 500, 2000)
    assert config.to_dict(config.load(path))["sae"]["matryoshka_widths"] == [128, 500, 2000], "as a resume reads it"
    assert config.load(path, ["sae.matryoshka_widths=64, 256,2k"]).sae.matryoshka_widths == (64, 256, 2000)
    assert config.load(path, ["sae.matryoshka_widths=auto"]).sae.matryoshka_widths is None


def test_auto_none_and_null_empty_a_field_that_may_be_empty():
    for word in ("auto", "none", "null", None):
        recipe = config.build({"training": {"lr": word}, "text": {"max_tokens": word}}, "a")
        assert recipe.training.lr is None
        assert recipe.text.max_tokens is None
    assert "sae.k is 'auto'" in complaint(config.build, {"sae": {"k": "auto"}}, "a.yaml")
    assert config.build({"host": {"dtype": "auto"}}, "a").host.dtype == "auto"


def test_a_run_folder_is_read_by_its_recipe(tmp_path):
    written(tmp_path, "sae: {k: 5}\n", "recipe.yaml")
    assert config.load(tmp_path).sae.k == 5
    empty = tmp_path / "empty"
    empty.mkdir()
    assert complaint(config.load, empty).endswith(
        "a folder without recipe.yaml, so not a run. Give a recipe file or a run folder."
    )


def test_an_unknown_field_names_its_neighbours():
    assert complaint(config.build, {"sae": {"kk": 3}}, "configs/a.yaml") == (
        f"configs/a.yaml: sae.kk is not a field of sae (fields: {FIELDS}); did you mean k?"
    )
    assert complaint(config.build, {"saee": {}}, "a.yaml").endswith("did you mean sae?")
    assert complaint(config.build, {"k": 3}, "a.yaml").endswith("did you mean sae.k?")
    assert complaint(config.build, {}, "a.yaml", ["sae.kk=3"]).startswith("command line: sae.kk is not a field of sae")


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"sae": {"k": "x"}}, "sae.k is 'x', expected a whole number such as 4096, 20k or 4M."),
        ({"sae": {"k": 2.5}}, "sae.k is 2.5, expected a whole number such as 4096, 20k or 4M."),
        ({"sae": {"k": True}}, "sae.k is true, expected a whole number such as 4096, 20k or 4M."),
        ({"sae": {"k": [3]}}, "sae.k is a list of 1, expected a whole number such as 4096, 20k or 4M."),
        ({"sae": {"k": None}}, "sae.k is empty, expected a whole number such as 4096, 20k or 4M."),
        ({"sae": 3}, f"sae is 3, expected its fields ({FIELDS})."),
        ({"sae": {"k": 0}}, "sae.k is 0, expected at least 1."),
        ({"sae": {"d_sae": 8, "k": 9}}, "sae.k is 9, more than sae.d_sae (8). Lower k or raise d_sae."),
        (
            {"sae": {"matryoshka_widths": "128,x"}},
            "sae.matryoshka_widths is '128,x', expected counts such as 128,512,2k.",
        ),
        (
            {"sae": {"matryoshka_widths": []}},
            "sae.matryoshka_widths is a list of 0, expected counts such as 128,512,2k.",
        ),
        (
            {"sae": {"architecture": "matryoshka", "d_sae": 512, "matryoshka_widths": [128, 256]}},
            "sae.matryoshka_widths is 128,256, expected ascending counts, the last one "
            "sae.d_sae (512); auto makes them.",
        ),
        (
            {"sae": {"architecture": "matryoshka", "d_sae": 512, "matryoshka_widths": [256, 128, 512]}},
            "sae.matryoshka_widths is 256,128,512, expected ascending counts, the last one "
            "sae.d_sae (512); auto makes them.",
        ),
        (
            {"sae": {"architecture": "matryoshka", "d_sae": 512, "matryoshka_widths": [0, 512]}},
            "sae.matryoshka_widths is 0,512, expected ascending counts, the last one sae.d_sae (512); auto makes them.",
        ),
        (
            {"sae": {"architecture": "topk", "l1_coefficient": 4}},
            "sae.l1_coefficient is for relu, and sae.architecture is topk. Leave it out or choose relu.",
        ),
        (
            {"sae": {"architecture": "relu", "jumprelu_sparsity_loss_mode": "step"}},
            "sae.jumprelu_sparsity_loss_mode is for jumprelu, and sae.architecture is relu. "
            "Leave it out or choose jumprelu.",
        ),
        (
            {"sae": {"jumprelu_sparsity_loss_mode": "tahn"}},
            "sae.jumprelu_sparsity_loss_mode is tahn, expected one of tanh, step, quadratic; did you mean tanh?",
        ),
        ({"sae": {"l0_warm_up": 1.5}}, "sae.l0_warm_up is 1.5, expected at least 0 and at most 1."),
        ({"sae": {"jumprelu_bandwidth": 0}}, "sae.jumprelu_bandwidth is 0.0, expected above 0."),
        ({"text": {"held_out": 0.9}}, "text.held_out is 0.9, expected at least 0 and below 0.9."),
        ({"text": {"isolate_documents": "no"}}, "text.isolate_documents is 'no', expected true or false."),
        ({"text": {"isolate_documents": 1}}, "text.isolate_documents is 1, expected true or false."),
        ({"training": {"lr": 0}}, "training.lr is 0.0, expected above 0."),
        ({"training": {"lr": "nan"}}, "training.lr is 'nan', expected a number such as 0.1 or 1e-3."),
        ({"training": {"lr": float("inf")}}, "training.lr is inf, expected a number such as 0.1 or 1e-3."),
        (
            {"training": {"save_every": "1d"}},
            "training.save_every is '1d', expected seconds such as 60, 60s or 5m.",
        ),
        ({"evaluation": {"every": 2}}, "evaluation.every is 2.0, expected at least 0 and at most 1."),
        (
            {"log": {"wandb": "on"}},
            "log.wandb is on, expected one of off, offline, online; did you mean online?",
        ),
    ],
)
def test_a_wrong_value_names_file_field_and_value(mapping, text):
    assert complaint(config.build, mapping, "a.yaml") == f"a.yaml: {text}"


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    written(tmp_path, "", "smollm2.yaml")
    assert "did you mean smollm2.yaml?" in complaint(config.load, tmp_path / "smolm2.yaml")
    assert "there is no folder" in complaint(config.load, tmp_path / "no" / "a.yaml")
    assert "Recipes are .yaml, .toml or .json" in complaint(config.load, written(tmp_path, "", "a.txt"))
    assert "line 2: not valid YAML" in complaint(config.load, written(tmp_path, "sae: {k: 3}\n  : [\n"))
    assert "not valid TOML" in complaint(config.load, written(tmp_path, "[sae\n", "a.toml"))
    assert "not valid JSON" in complaint(config.load, written(tmp_path, "{", "a.json"))
    assert "holds a list of 2" in complaint(config.load, written(tmp_path, "[1, 2]", "a.json"))
    assert "line 2: k is given twice" in complaint(config.load, written(tmp_path, "sae: {k: 3,\n  k: 4}\n"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in complaint(config.load, tmp_path / "b.yaml")


def test_an_override_must_set_a_field():
    assert complaint(config.build, {}, "a", ["sae.k"]).startswith("sae.k: an override reads section.field=value")
    assert complaint(config.build, {}, "a", ["sae=3"]).startswith("command line: sae is a section")


def test_ranges_and_choices_name_fields_that_exist():
    known = set(config.fields())
    assert set(config._RANGES) | set(config._CHOICES) <= known
    assert {key.rpartition(".")[2] for key in known} >= config._SECONDS
    assert dataclasses.is_dataclass(Recipe)


def test_a_schedule_longer_than_its_run_is_refused():
    with pytest.raises(UserError, match="lr_decay_steps is 1,000,000, the run has 976 updates"):
        config.build({}, "r.yaml", ["training.lr_decay_steps=1M"])


def test_widths_may_be_written_as_a_list_on_the_command_line():
    made = config.build(
        {}, "r.yaml", ["sae.architecture=matryoshka", "sae.d_sae=512", "sae.matryoshka_widths=[64,512]"]
    )
    assert made.sae.matryoshka_widths == (64, 512)
