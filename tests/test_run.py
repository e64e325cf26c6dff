"""The whole path on a tiny host with real text, and what happens on bad input: one line, exit code 2, nothing
half-written. The real host is in tests/test_demo.py (slow)."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sae import cli, config, files
from sae.activations import store as stores
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.evaluation.core import headline
from sae.host import Host
from sae.run import evaluate, find, index, info, show, steer_prompt, train, train_many
from tests.conftest import make_sae

RECIPE = {
    "host": {"name": "tiny", "hook": "blocks.2.hook_resid_post"},
    "text": {"context": 64, "max_tokens": 16_000, "held_out": 0.2},
    "activations": {"min_sequences": 40},
    "sae": {"d_sae": 128, "k": 8},
    "training": {"tokens": 40_000, "batch": 512, "dtype": "float32"},
    "evaluation": {"tokens": 1_000, "ce_tokens": 300, "every": 0.5},
    "log": {},
}


@pytest.fixture
def tiny(tiny_host, monkeypatch):
    monkeypatch.setattr(Host, "load", classmethod(lambda cls, name="tiny", **kwargs: tiny_host))
    return tiny_host


def recipe(folder, store=None, **sections):
    made = json.loads(json.dumps(RECIPE)) | {"out": str(folder / "run")}
    made["activations"]["store"] = store
    for section, values in sections.items():
        made[section] |= values
    return config.build(made, "test")


@pytest.fixture(scope="module")
def trained(tiny_host, tmp_path_factory):
    """A finished run over a store, with its index; read only."""
    folder = tmp_path_factory.mktemp("trained")
    made = recipe(folder, store=str(folder / "acts"))
    train(made, host=tiny_host, progress=False)
    index(folder / "run" / "sae", host=tiny_host, progress=False)
    return folder


def test_training_from_a_store_gives_an_sae_with_statistics_and_evaluation(trained, tiny_host):
    sae = SAE.load(trained / "run" / "sae")
    report = files.read_json(trained / "run" / "sae" / "evaluation.json")
    figures = headline(report)
    assert 0 < figures["fvu"]["value"] < 1
    assert figures["fvu"]["low"] < figures["fvu"]["value"] < figures["fvu"]["high"]
    assert sae.cfg.metadata.evaluation["fvu"]["value"] == pytest.approx(figures["fvu"]["value"])
    assert sae.cfg.metadata.host_fingerprint == tiny_host.fingerprint
    assert sae.stats is not None and sae.stats.n_tokens > 5_000
    assert (torch.as_tensor(sae.threshold) > 0).all()
    held_out = [line for line in files.read_lines(trained / "run" / "metrics.jsonl") if "held_out/fvu" in line]
    assert len(held_out) == 2


def test_evaluating_the_saved_sae_again_gives_the_same_figures(trained, tiny_host):
    report = evaluate(trained / "run" / "sae", host=tiny_host, tokens=1_000, ce_tokens=300, progress=False)
    saved = headline(files.read_json(trained / "run" / "sae" / "evaluation.json"))
    assert headline(report)["fvu"]["value"] == pytest.approx(saved["fvu"]["value"], rel=1e-5)


def test_evaluation_and_the_progress_line_see_held_out_documents_only(trained, tiny_host, monkeypatch, tmp_path):
    """Also when the SAE's own source is named: what training saw is never called held out."""
    from sae import trainer
    from sae.token_rows import Text

    parts = []
    made = Text.__init__

    def noted(self, recipe, host, part):
        parts.append((part, recipe.held_out))
        made(self, recipe, host, part)

    monkeypatch.setattr(Text, "__init__", noted)
    report = evaluate(trained / "run" / "sae", host=tiny_host, text="bundled", tokens=500, ce_tokens=0, progress=False)
    assert parts == [("held_out", 0.2)] and report["eval_config"]["documents"] == "held-out documents"
    given = recipe(trained)
    channels = {"blocks.2.hook_resid_post": SimpleNamespace(outlier_norm=None, scale=1.0)}
    trainer._held_out_samples(given, tiny_host, SimpleNamespace(channels=channels), tmp_path)
    assert parts[-1] == ("held_out", 0.2)


def test_the_store_holds_training_documents_only(trained):
    from sae.text import part_of

    store = stores.Store.open(trained / "acts")
    assert store.documents and all(part_of(document, 0.2) == "train" for document in store.documents)


def test_training_live_reaches_about_what_training_from_a_store_does(trained, tiny, tmp_path):
    sae = train(recipe(tmp_path, training={"tokens": 40_000}), progress=False)
    from_store = SAE.load(trained / "run" / "sae").cfg.metadata.evaluation["fvu"]["value"]
    assert sae.cfg.metadata.evaluation["fvu"]["value"] < 1.3 * from_store


@pytest.mark.parametrize("stored", [True, False], ids=["store", "live"])
def test_layers_are_harvested_in_one_forward_and_trained_together(tiny_host, tmp_path, monkeypatch, stored):
    hooks = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    small = {"training": {"tokens": 4_000}, "evaluation": {"tokens": 500, "ce_tokens": 0, "every": 0}}
    text = {"max_tokens": 4_000}
    made = []
    for i, hook in enumerate(hooks):
        one = recipe(tmp_path, str(tmp_path / "acts") if stored else None, host={"hook": hook}, text=text, **small)
        made.append(replace(one, out=str(tmp_path / f"run{i}")))
    asked = []
    activations = Host.activations

    def counted(self, tokens, names, **options):
        asked.append(tuple(names))
        return activations(self, tokens, names, **options)

    monkeypatch.setattr(Host, "activations", counted)
    first, second = train_many(made, host=tiny_host, progress=False)
    assert asked[0] == tuple(hooks) and asked.count(tuple(hooks)) >= 4
    assert (first.cfg.metadata.hook_name, second.cfg.metadata.hook_name) == tuple(hooks)
    assert not torch.equal(first.W_dec, second.W_dec)
    assert all(0 < sae.cfg.metadata.evaluation["fvu"]["value"] < 1.5 for sae in (first, second))
    (tmp_path / "run1" / "sae" / "evaluation.json").unlink()  # killed while it was evaluated
    when = (tmp_path / "run0" / "sae" / "cfg.json").stat().st_mtime_ns
    again = train_many(made, host=tiny_host, progress=False, resume=True)
    assert again[1].cfg.metadata.evaluation == second.cfg.metadata.evaluation
    assert (tmp_path / "run1" / "sae" / "evaluation.json").exists()
    assert (tmp_path / "run0" / "sae" / "cfg.json").stat().st_mtime_ns == when
    if stored:
        assert list(stores.Store.open(tmp_path / "acts").hooks) == hooks
        train(replace(made[1], out=str(tmp_path / "later")), host=tiny_host, progress=False)  # from the same store


def test_find_and_show_need_no_host(trained, monkeypatch):
    def never(cls, *args, **kwargs):
        raise AssertionError("a host was loaded")

    monkeypatch.setattr(Host, "load", classmethod(never))
    found = find(trained / "run" / "sae", "bridge", n=3)
    assert len(found) == 3 and all(0 <= one.auroc <= 1 and one.examples for one in found)
    assert "«" in found[0].examples[0].marked()
    page = show(trained / "run" / "sae", found[0].feature)
    assert page.max_act == pytest.approx(found[0].max_act) and page.neighbours


def test_own_texts_are_run_through_the_host(trained, tiny):
    pos = [f"The bridge number {i} is red and long." for i in range(10)]
    neg = [f"The kitchen number {i} is warm and small." for i in range(10)]
    assert len(find(trained / "run" / "sae", pos=pos, neg=neg, n=2)) == 2


def test_an_index_over_a_store_equals_one_over_its_text(trained, tiny_host, tmp_path):
    options = {"store": trained / "acts", "out": tmp_path / "i", "scores": False, "progress": False}
    from_store = index(trained / "run" / "sae", host=tiny_host, **options)
    assert from_store.facts.n_documents == len(stores.Store.open(trained / "acts").documents)
    assert from_store.stats["max_act"].shape == (128,)
    some = index(trained / "run" / "sae", host=tiny_host, tokens=1000, **(options | {"out": tmp_path / "some"}))
    assert 1000 <= some.facts.n_tokens + 300 < from_store.facts.n_tokens


def test_steering_a_prompt_answers_twice_and_off_changes_nothing(trained, tiny):
    stats = SAE.load(trained / "run" / "sae").stats
    assert stats is not None
    dial = f"{int(stats.max_act.argmax())}=30x"
    plain, steered = steer_prompt(trained / "run" / "sae", [dial], "Who are you?", temperature=0, max_new_tokens=8)
    assert plain != steered
    plain, steered = steer_prompt(trained / "run" / "sae", ["3=off"], "Who are you?", temperature=0, max_new_tokens=8)
    assert plain == steered


def test_info_says_what_a_folder_is(trained):
    assert info(trained / "run")["what"] == "training run" and info(trained / "run")["finished"]
    assert info(trained / "run" / "sae")["what"] == "SAE"
    assert info(trained / "acts")["what"] == "activation store"
    assert info(trained / "run" / "sae" / "index")["what"] == "feature index"


# ---- bad input ---------------------------------------------------------------------------------------------


def complaint(capsys, *argv):
    """What `sae …` says on stderr; it must be one line with exit code 2."""
    code = cli.main([str(word) for word in argv])
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if line.startswith("sae ")]
    assert code == 2 and len(said) == 1, (code, said)
    return said[0]


def write_recipe(folder, **sections):
    path = folder / "recipe.yaml"
    path.write_text(config.to_yaml(recipe(folder, **sections)))
    return path


@pytest.mark.parametrize(
    "sections,words",
    [
        ({"host": {"hook": "blocks.2.hook_resid_pots"}}, "hook_resid_pots"),
        ({"host": {"hook": "blocks.77.hook_resid_post"}}, "77"),
        ({"text": {"source": "nothing/*.txt"}}, "nothing/*.txt"),
        ({"text": {"source": "broken.parquet"}}, "broken.parquet"),
        ({"text": {"source": "empty.txt"}}, "empty.txt"),
    ],
)
def test_a_bad_recipe_is_one_line_and_leaves_no_store(capsys, tmp_path, monkeypatch, tiny, sections, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty.txt").write_text("\n\n")
    path = write_recipe(tmp_path, store=str(tmp_path / "acts"), **sections)
    assert words in complaint(capsys, "harvest", path)
    assert words in complaint(capsys, "train", path)
    assert not (tmp_path / "acts").exists()
    assert not (tmp_path / "run" / "sae").exists()


@pytest.mark.parametrize(
    "words,said",
    [
        (["999=5x", "hello"], "feature 999 does not exist: this SAE has 128"),
        (["3=5y", "hello"], "'5y'"),
        (["3=5x"], "no prompt"),
    ],
)
def test_a_bad_dial_is_one_line(capsys, trained, tiny, words, said):
    assert said in complaint(capsys, "steer", trained / "run" / "sae", *words)


def test_a_missing_checkpoint_is_one_line(capsys, tmp_path):
    for verb in (["evaluate"], ["index"], ["find", "bridge"], ["show", "3"], ["steer", "3=5x", "hello"], ["info"]):
        assert "nowhere" in complaint(capsys, verb[0], tmp_path / "nowhere", *verb[1:])


def test_a_feature_out_of_range_and_a_missing_index_are_one_line(capsys, trained, tmp_path):
    assert "feature 128 does not exist" in complaint(capsys, "show", trained / "run" / "sae", 128)
    make_sae().save(tmp_path / "bare")
    assert "Make it with `sae index" in complaint(capsys, "find", tmp_path / "bare", "bridge")


def test_a_concept_that_no_text_holds_is_looked_for_by_its_name(trained, tiny):
    found = find(trained / "run" / "sae", "zyzzyva", n=2)
    assert len(found) == 2 and found[0].positives >= 8
    assert find(trained / "run" / "sae", "zyzzyva", by_name=True, n=2)[0] == found[0]


def test_a_checkpoint_of_another_model_or_width_is_refused_with_both_values(capsys, trained, tiny, tmp_path):
    other = SAE.load(trained / "run" / "sae")
    other.cfg = replace(other.cfg, metadata=replace(other.cfg.metadata, host_fingerprint="beef", model_name="gpt2"))
    other.save(tmp_path / "other")
    for words in (["evaluate"], ["index"], ["steer", "3=5x", "hello"]):
        said = complaint(capsys, words[0], tmp_path / "other", *words[1:])
        assert "beef" in said and tiny.fingerprint in said
    make_sae(d_in=24, hook_name="blocks.2.hook_resid_post", model_name="tiny").save(tmp_path / "narrow")
    said = complaint(capsys, "steer", tmp_path / "narrow", "3=5x", "hello")
    assert "24" in said and "32" in said


def test_a_full_disk_during_harvest_is_one_line_and_the_next_call_goes_on(capsys, tmp_path, monkeypatch, tiny):
    import errno

    path = write_recipe(tmp_path, store=str(tmp_path / "acts"))
    real = files.write_blocks

    def full(target, blocks):
        with files.atomic_file(target) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_blocks", full)
    assert "no space left" in complaint(capsys, "harvest", path)
    assert not (tmp_path / "acts").exists()
    monkeypatch.setattr(files, "write_blocks", real)
    assert cli.main(["harvest", str(path)]) == 0
    assert stores.Store.open(tmp_path / "acts").n_rows > 0


# ---- an SAE that names no model


@pytest.fixture
def nameless(tmp_path):
    """An SAE in SAELens's files alone, which say nothing of a model."""
    folder = make_sae(hook_name="blocks.2.hook_resid_post").save(tmp_path / "sae")
    for name in ("goldengate.json", "feature_stats.safetensors"):
        (folder / name).unlink()
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    def written(name, word):
        (tmp_path / name).write_text("\n\n".join(f"{word} {number} on the bridge" for number in range(12)))
        return str(tmp_path / name)

    return written("a.txt", "red"), written("b.txt", "blue")


def test_every_verb_that_runs_text_says_how_to_give_the_host_and_takes_its_name(
    nameless, texts, tiny, tmp_path, capsys
):
    a, b = texts
    made = str(tmp_path / "made")
    ways = (
        ("index", nameless, "--text", a, "--no-scores", "--out", made),
        ("evaluate", nameless, "--text", a, "--tokens", "100", "--ce-tokens", "50"),
        ("find", nameless, "--text", "the bridge", "--index", made),
        ("show", nameless, "3", "--index", made),
        ("diff", nameless, a, b),
        ("classify", nameless, a, b, "--k", "1"),
    )
    for words in ways:
        assert "Pass --host NAME, or host=Host.load(...)" in complaint(capsys, *words), words
        assert cli.main([*words, "--host", "tiny-llama"]) == 0, words
        out = capsys.readouterr().out
        if words[0] in ("index", "find"):
            assert out.strip().endswith("--host tiny-llama")


def test_a_host_is_taken_by_name_and_an_index_of_the_folder_is_remembered(nameless, texts, tiny, tmp_path, capsys):
    index(nameless, host="tiny-llama", text=texts[0], scores=False, progress=False)
    about = SAE.load(nameless).cfg.metadata
    assert (about.model_name, about.host_fingerprint) == ("tiny-llama", tiny.fingerprint)
    assert cli.main(["find", nameless, "--token", " bridge"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("steer: sae steer ") and said.endswith('"Who are you?"')
    assert cli.main(["steer", nameless, said.split()[4], "Who are you?", "--max-new-tokens", "2"]) == 0
    assert "fvu" in headline(evaluate(nameless, host="x", text=texts[0], tokens=100, ce_tokens=50, progress=False))


def test_an_index_elsewhere_puts_its_host_into_the_line_that_steers(nameless, texts, tiny, tmp_path, capsys):
    index(nameless, host="tiny-llama", text=texts[0], out=tmp_path / "i", scores=False, progress=False)
    assert SAE.load(nameless).cfg.metadata.model_name == ""
    assert cli.main(["find", nameless, "--token", " bridge", "--index", str(tmp_path / "i")]) == 0
    assert capsys.readouterr().out.endswith('"Who are you?" --host tiny-llama\n')


def test_a_model_that_cannot_be_reached_and_another_than_the_indexs_are_one_line(nameless, texts, tiny_host, tmp_path):
    saved = make_sae(hook_name="blocks.2.hook_resid_post", model_name="nobody/nothing").save(tmp_path / "named")
    with pytest.raises(UserError, match=r"nobody/nothing cannot be loaded.*Pass --host NAME, or host=Host.load"):
        evaluate(saved, text=texts[0], progress=False)
    index(nameless, host=tiny_host, text=texts[0], scores=False, progress=False)
    other = Host.from_model(copy.deepcopy(tiny_host.model), tiny_host.tokenizer, "other")
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.add_(1)
    with pytest.raises(UserError, match="delete the SAE's index/"):
        index(nameless, host=other, text=texts[0], progress=False)


def test_info_of_a_folder_of_several_saes_names_one(nameless, tmp_path, capsys):
    said = complaint(capsys, "info", str(tmp_path))
    assert f"there are some in it. Give one, for example {nameless}." in said


def test_an_mlps_transcoder_is_evaluated_and_indexed(tiny_host, texts, tmp_path):
    plain = make_sae(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out")
    cfg = replace(plain.cfg, d_out=32, apply_b_dec_to_input=False)
    sae = SAE.of(cfg, {name: getattr(plain, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    assert "fvu" in headline(evaluate(sae, host=tiny_host, text=texts[0], tokens=100, ce_tokens=50, progress=False))
    made = index(sae, host=tiny_host, text=texts[0], out=tmp_path / "i", progress=False)
    assert made.facts.hook == "blocks.1.mlp.hook_in" and "output_score" in made.lens


def test_an_sae_is_loaded_in_a_number_format_by_name(nameless):
    assert SAE.load(nameless, dtype="bfloat16").dtype == torch.bfloat16
    assert SAE.from_pretrained(nameless, dtype="torch.float16").dtype == torch.float16
    with pytest.raises(UserError, match="dtype: 'float31' is not one of"):
        SAE.load(nameless, dtype="float31")
