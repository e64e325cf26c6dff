"""The Hub: what is downloaded and pushed, and that every way to fail is one line (against a loopback Hub)."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae import SAE, UserError, cli, files, hub, releases
from sae.formats import saelens
from tests.conftest import make_sae
from tests.loopback_hub import environment, point_at, running
from tests.peers.agree import BAR, FIXTURES, differences

REPO = "user/saes"


@pytest.fixture
def loopback(monkeypatch, tmp_path):
    with running() as there:
        point_at(there, monkeypatch, tmp_path / "cache")
        yield there


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of an SAE's folder by name."""
    folder = make_sae(hook_name="blocks.2.hook_resid_post").save(tmp_path_factory.mktemp("sae") / "sae")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def under(folder, content):
    return {f"{folder}/{name}": data for name, data in content.items()}


def fails(*args, **options):
    """The one line of a download that is refused."""
    with pytest.raises(UserError) as error:
        SAE.from_pretrained(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(tmp_path):
    """Names of the files that the cache shows."""
    return sorted(path.name for path in (tmp_path / "cache").glob("models--*/snapshots/**/*") if path.is_file())


# ---- down ----


def test_only_the_folder_asked_for_is_downloaded_also_a_nested_one(loopback, written, tmp_path):
    nested = "layer_20/width_16k/average_l0_71"
    others = {**under("layer_20/width_16k/average_l0_7", written), **under("layer_20/width_65k/average_l0_71", written)}
    loopback.add(REPO, {"README.md": b"# SAEs", "big.safetensors": b"0" * 1000, **others, **under(nested, written)})
    assert torch.equal(SAE.from_pretrained(REPO, nested).W_dec, make_sae().W_dec)
    assert sorted(loopback.downloads()) == sorted(f"{nested}/{name}" for name in written)
    loopback.asked.clear()
    SAE.from_pretrained(REPO, f"/{nested}/")
    assert loopback.downloads() == [] and len(loopback.asked) == 2  # which commit it is, and the cache's note of it


def test_an_sae_at_the_top_comes_without_its_repository(loopback, written):
    loopback.add(REPO, {**written, "README.md": b"", "other/sae_weights.safetensors": b"0", "optimizer.pt": b"0"})
    SAE.from_pretrained(REPO)
    assert sorted(loopback.downloads()) == sorted(written)


@pytest.mark.parametrize("seed", ["", "/seed1"])
def test_a_run_of_sparsify_comes_with_its_config_and_its_place(loopback, seed):
    case = FIXTURES / "sparsify-topk"
    run = {"run/config.json": b'{"model": "toy", "dataset": "texts", "ctx_len": 64}', "run/state.pt": b"0"}
    for place in ("layers.3", "layers.4"):
        run |= {f"run/{place}{seed}/{one.name}": one.read_bytes() for one in (case / "sae").iterdir()}
    loopback.add(REPO, run)
    sae, folder = SAE.from_pretrained(REPO, f"run/layers.3{seed}"), f"run/layers.3{seed}"
    assert sorted(loopback.downloads()) == ["run/config.json", f"{folder}/cfg.json", f"{folder}/sae.safetensors"]
    about = sae.cfg.metadata
    assert (about.layout, about.hook_name) == ("sparsify", "blocks.3.hook_resid_post")
    assert (about.model_name, about.dataset, about.context_size) == ("toy", "texts", 64)
    assert max(differences(case, sae).values()) <= BAR


@pytest.mark.parametrize(
    ("case", "repo", "folder", "hook"),
    [
        ("dictionary_learning-AutoEncoder", REPO, "a/trainer_0", None),
        ("gemma_scope-res", "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71",
         "blocks.20.hook_resid_post"),
        ("gemma_scope_2-resid_post", "google/gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_small", None),
        ("openmoss-llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x", None),
        ("openmoss-jumprelu-pickle", REPO, "L3", None),
    ],
)  # fmt: skip
def test_every_layout_comes_alone_and_reads_as_its_peer_does(loopback, case, repo, folder, hook):
    own = {f"{folder}/{path.relative_to(FIXTURES / case / 'sae')}": path.read_bytes()
           for path in (FIXTURES / case / "sae").rglob("*") if path.is_file()}  # fmt: skip
    others = {f"{folder}_2/params.npz": b"0", f"{folder}/checkpoints/ae_10.pt": b"0", f"{folder}/plot.png": b"0"}
    loopback.add(repo, own | others)
    sae = SAE.from_pretrained(repo, folder)
    assert max(differences(FIXTURES / case, sae).values()) <= BAR
    assert sorted(loopback.downloads()) == sorted(own)
    assert hook in (None, sae.cfg.metadata.hook_name)


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("scope", ["scope/checkpoints/final.safetensors", "scope/hyperparams.json", "config.json"]),
        ("trainer_0", ["trainer_0/ae.pt", "trainer_0/config.json", "config.json"]),
        ("trainer_0/checkpoints/ae_10.pt", ["trainer_0/checkpoints/ae_10.pt", "trainer_0/config.json", "config.json"]),
        ("layer_0.safetensors", ["layer_0.safetensors", "config.json"]),
        ("params", ["params/params.npz", "config.json"]),
        ("nothing", []),
    ],
)
def test_what_belongs_to_an_sae_is_told_from_names_alone(folder, wanted):
    names = [
        "config.json", "layer_0.safetensors", "layer_1.safetensors", "README.md", "scope/hyperparams.json",
        "scope/checkpoints/final.safetensors", "scope/checkpoints/first.safetensors", "trainer_0/ae.pt",
        "trainer_0/config.json", "trainer_0/checkpoints/ae_10.pt", "params/params.npz", "params/old.pt", "nothing/a.md",
    ]  # fmt: skip
    assert hub._files_of(names, folder) == wanted


def test_a_revision_is_a_branch_or_a_commit(loopback, written, tmp_path):
    first = loopback.add(REPO, under("a", written))
    other = make_sae(d_in=16).save(tmp_path / "other")
    loopback.add(REPO, {f"a/{file.name}": file.read_bytes() for file in other.iterdir()})
    loopback.add(REPO, under("a", written), branch="next")
    assert SAE.from_pretrained(REPO, "a").cfg.d_in == 16
    assert SAE.from_pretrained(REPO, "a", revision=first).cfg.d_in == 32
    assert SAE.from_pretrained(REPO, "a", revision="next").cfg.d_in == 32
    assert "has no revision 'nxt'" in fails(REPO, "a", revision="nxt")


@pytest.mark.parametrize("fault", ["hang", "reset", 500, 503, 429])
def test_a_silent_hub_gives_the_copy_in_the_cache_with_one_notice(loopback, written, fault, monkeypatch, caplog, capfd):
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    loopback.add(REPO, under("a", written))
    codes = SAE.from_pretrained(REPO, "a").encode(torch.ones(1, 32))
    loopback.faults.append(("GET", "", fault))
    loopback.asked.clear()
    with caplog.at_level(logging.WARNING, "sae"):
        assert torch.equal(SAE.from_pretrained(REPO, "a").encode(torch.ones(1, 32)), codes)
    assert len(caplog.records) == len(loopback.asked) == 1
    assert "does not answer" in caplog.text and "cache is taken" in caplog.text and capfd.readouterr().err == ""
    said = fails(REPO, "b")
    assert said.startswith(f"{REPO}/b: ") and "does not answer" in said and "Give a folder of this machine" in said


def test_offline_and_local_files_only_ask_nobody_and_give_no_notice(loopback, written, monkeypatch, caplog):
    loopback.add(REPO, under("a", written))
    SAE.from_pretrained(REPO, "a")
    loopback.asked.clear()
    SAE.from_pretrained(REPO, "a", local_files_only=True)
    assert "only local files" in fails(REPO, "b", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    SAE.from_pretrained(REPO, "a")
    assert "HF_HUB_OFFLINE is set" in fails(REPO, "b")
    assert "HF_HUB_OFFLINE is set" in fails("user/other")
    assert loopback.asked == [] and caplog.text == ""


def test_a_broken_download_leaves_the_older_copy_for_the_time_without_a_hub(loopback, written, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.2)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    loopback.add(REPO, under("a", written))
    SAE.from_pretrained(REPO, "a")
    loopback.add(REPO, under("a", {**written, "goldengate.json": b"{ }"}))
    loopback.faults.append(("GET", "goldengate.json", "cut"))
    assert "broke off" in fails(REPO, "a")
    assert SAE.from_pretrained(REPO, "a", local_files_only=True).cfg.d_in == 32
    loopback.faults.clear()
    assert "has no 'metadata'" in fails(REPO, "a")  # the newer commit's, whole now


@pytest.mark.parametrize("fault", ["cut", 500, "reset", 404, 403])
def test_a_download_that_breaks_off_is_one_line_and_shows_no_half_file(loopback, written, fault, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    loopback.add(REPO, under("a", written))
    loopback.faults.append(("GET", "sae_weights.safetensors", fault))
    said = fails(REPO, "a")
    assert said.startswith(f"{REPO}: ")
    assert "broke off" in said or "refuses (status" in said or "no repository" in said
    assert "sae_weights.safetensors" not in cached(tmp_path)
    loopback.faults.clear()
    SAE.from_pretrained(REPO, "a")


def test_each_refusal_says_what_is_wrong(loopback, written):
    loopback.add(REPO, {**under("layer_1/small", written), **under("layer_2/small", written), "x.md": b""})
    loopback.add("user/texts", {"README.md": b""})
    near = " Give one of its 2 as sae_id, such as layer_1/small, layer_2/small."
    assert fails(REPO, "layer_1/smal") == f"{REPO}: has no SAE 'layer_1/smal'; did you mean layer_1/small?{near}"
    assert "Give one of its 1 as sae_id, such as layer_2/small." in fails(REPO, "layer_2")
    assert fails(REPO) == f"{REPO}: has no SAE at its top.{near}"
    assert fails("user/texts") == "user/texts: holds no weights of an SAE. Give another repository."
    assert "user/missing: no folder here, and no repository of the Hub" in fails("user/missing", "a")
    assert "no name of a repository (user/repo)" in fails("runs/no/sae")
    loopback.faults.append(("HEAD", "/resolve/", "gated"))
    assert fails(REPO, "layer_1/small").startswith(f"{REPO}: is gated. Ask for access")
    loopback.faults[:] = [("GET", "/api/models", 403)]
    assert fails(REPO, "layer_1/small").startswith(f"{REPO}: the Hub refuses (status 403")


NO_ANSWERS = [{}, [], None, 3, {"id": REPO, "siblings": [1]}, {"id": REPO, "siblings": [{}]}, 
              {"id": REPO, "siblings": 7}, {"id": REPO, "siblings": ["a\x1b[2J\n" * 500]}]  # fmt: skip


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=str)
def test_an_answer_that_is_none_of_a_hub_is_one_line(loopback, tiny_sae, answer):
    loopback.add(REPO, {"x.md": b""})
    loopback.faults.append(("GET", "/api/models", lambda: answer))
    assert "the Hub's answer is not understood" in fails(REPO, "a")
    with pytest.raises(UserError, match="the Hub's answer is not understood") as error:
        tiny_sae.push_to_hub(REPO, "a")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_names_in_a_repository_are_told_printable_and_short(loopback):
    loopback.add(REPO, {"a\x1b[2J\n" * 500 + "/sae_weights.safetensors": b""})
    for said in (fails(REPO, "b"), fails(REPO, "x" * 3000), fails("x" * 3000 + "/y", "a")):
        assert said.isprintable() and len(said) < 450


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("status", "do"),
    [(400, "Try again later"), (404, "Check that the file is there"), (410, "Check that the file is there"),
     (418, "Try again later"), (451, "choose another SAE")],
)  # fmt: skip
def test_a_file_that_the_hub_refuses_is_told_by_its_status(loopback, written, method, status, do):
    loopback.add(REPO, under("a", written))
    loopback.faults.append((method, "sae_weights.safetensors", status))
    said = fails(REPO, "a")
    assert f"refuses (status {status}" in said and do in said and "http" not in said


def test_a_file_of_weights_in_a_repository_is_its_folder(loopback, written):
    loopback.add(REPO, under("a", written))
    assert SAE.from_pretrained(REPO, "a/sae_weights.safetensors").stats is not None


@pytest.mark.parametrize("name", ["../a", "a/../../b", "a//b", "a/./b", "a\\b", "a\0b", "/", "."])
def test_names_that_lead_out_are_refused_unasked(loopback, name, tiny_sae):
    assert "is no folder in a repository" in fails(REPO, name)
    with pytest.raises(UserError, match="is no folder in a repository"):
        tiny_sae.push_to_hub(REPO, name)
    assert loopback.asked == []


@pytest.mark.parametrize(
    "name", ["a/../../../out.json", "a/..", "/etc/out.json", "../out.json", "a/sub/../../../out.json"]
)
def test_a_file_whose_name_leads_out_of_the_folder_is_not_fetched(loopback, written, name, tmp_path):
    loopback.add(REPO, {name: b"{}", **under("a", written)})
    SAE.from_pretrained(REPO, "a")
    assert name not in loopback.downloads()
    assert not list(tmp_path.rglob("out.json"))


def test_a_commit_that_is_no_hash_is_refused(loopback, written, monkeypatch, tmp_path):
    monkeypatch.setattr("tests.loopback_hub.Commit.sha", "../../out")
    loopback.add(REPO, under("a", written))
    assert "names no commit" in fails(REPO, "a")


def test_force_download_fetches_again(loopback, written):
    loopback.add(REPO, under("a", written))
    SAE.from_pretrained(REPO, "a")
    loopback.asked.clear()
    SAE.from_pretrained(REPO, "a", force_download=True)
    assert sorted(loopback.downloads()) == sorted(f"a/{name}" for name in written)


def test_a_local_folder_is_no_matter_of_the_hub(loopback, written, tmp_path):
    for name, data in under("saes/a", written).items():
        files.write_bytes(tmp_path / name, data)
    SAE.from_pretrained(tmp_path / "saes" / "a")
    SAE.from_pretrained(str(tmp_path / "saes"), "a")
    assert loopback.asked == []


# ---- up ----


def test_what_is_pushed_comes_back_the_same(loopback, tiny_sae, tmp_path):
    tiny_sae.labels = {3: "the Golden Gate Bridge"}
    url = tiny_sae.push_to_hub(REPO, "layer_2/small", commit_message="A small one")
    assert url == f"{loopback.url}/{REPO}/tree/main/layer_2/small"
    assert [one.message for one in loopback.repos[REPO]["main"]] == ["commit 0", "A small one"]
    names = {"cfg.json", "sae_weights.safetensors", "goldengate.json", "feature_stats.safetensors", "labels.json",
             "README.md"}  # fmt: skip
    assert set(loopback.files(REPO)) == {".gitattributes", *(f"layer_2/small/{name}" for name in names)}
    again, x = SAE.from_pretrained(REPO, "layer_2/small"), torch.randn(9, 32)
    assert torch.equal(again.encode(x), tiny_sae.encode(x)) and again.labels == tiny_sae.labels
    assert torch.equal(again.stats.max_act, tiny_sae.stats.max_act)
    assert not loopback.private


def test_a_second_push_changes_only_what_it_must_in_one_commit(loopback, tiny_sae):
    tiny_sae.labels = {3: "bridges"}
    tiny_sae.push_to_hub(REPO)
    before = dict(loopback.files(REPO))
    tiny_sae.push_to_hub(REPO)
    assert len(loopback.repos[REPO]["main"]) == 2  # nothing had changed
    loopback.add(REPO, {"notes.md": b"mine"})
    tiny_sae.labels, tiny_sae.stats = {}, None
    sent = len(loopback.asked)
    tiny_sae.push_to_hub(REPO)
    after = loopback.files(REPO)
    assert len(loopback.repos[REPO]["main"]) == 4
    assert sum("/commit/" in path for _, path in loopback.asked[sent:]) == 1
    assert {"labels.json", "feature_stats.safetensors"} == set(before) - set(after)
    assert {name for name in set(before) & set(after) if before[name] != after[name]} == {"README.md"}
    assert after["notes.md"] == b"mine"


def test_the_card_stands_at_the_top_or_beside_the_sae_and_somebody_else_s_stays(loopback, tiny_sae, caplog):
    tiny_sae.push_to_hub(REPO)
    assert hub.MARK.encode() in loopback.files(REPO)["README.md"]
    loopback.add(REPO, {"README.md": b"# My own words", "b/README.md": b"# And here"})
    tiny_sae.push_to_hub(REPO)
    tiny_sae.push_to_hub(REPO, "a")
    tiny_sae.push_to_hub(REPO, "b")
    found = loopback.files(REPO)
    assert (found["README.md"], found["b/README.md"]) == (b"# My own words", b"# And here")
    assert f"SAE.from_pretrained('{REPO}', 'a')" in found["a/README.md"].decode()
    assert caplog.text.count("is not ours and stays") == 2 and "b/cfg.json" in found


def test_a_branch_is_made_and_a_repository_may_be_private(loopback, tiny_sae):
    url = tiny_sae.push_to_hub(REPO, revision="next", private=True)
    assert url == f"{loopback.url}/{REPO}/tree/next" and loopback.private == {REPO}
    assert "cfg.json" in loopback.files(REPO, "next") and "cfg.json" not in loopback.files(REPO)
    tiny_sae.push_to_hub(REPO, revision="next")
    assert SAE.from_pretrained(REPO, revision="next").cfg.d_sae == 96


@pytest.mark.parametrize(
    ("method", "part", "fault", "said"),
    [
        ("GET", "/api/models", "hang", "does not answer"),
        ("GET", "/api/models", 500, "status 500. Nothing was pushed"),
        ("GET", "/api/models", 429, "status 429. Nothing was pushed"),
        ("GET", "/api/models", "gated", "is gated"),
        ("POST", "/preupload/", 403, "refuses (status 403"),
        ("POST", "/commit/", 403, "refuses (status 403"),
        ("POST", "/commit/", 500, "refuses (status 500"),
        ("POST", "/commit/", "reset", "broke off"),
        ("POST", "/commit/", 412, "refuses (status 412"),
    ],
)
def test_a_push_that_fails_is_one_line_and_leaves_the_repository(
    loopback, tiny_sae, method, part, fault, said, monkeypatch, tmp_path
):
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    loopback.add(REPO, {"a/notes.md": b"mine"})
    loopback.faults.append((method, part, fault))
    with pytest.raises(UserError) as error:
        tiny_sae.push_to_hub(REPO, "a")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(loopback.repos[REPO]["main"]) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_whoever_may_not_write_is_told_so(loopback, tiny_sae):
    loopback.token = "right"
    for token in (None, "wrong"):
        with pytest.raises(UserError, match=f"{REPO}: the Hub refuses .status 403: You don't have the rights"):
            tiny_sae.push_to_hub(REPO, token=token)
    assert loopback.repos == {}
    tiny_sae.push_to_hub(REPO, token="right")
    with pytest.raises(UserError, match="no name of a repository"):
        tiny_sae.push_to_hub("not a repo")


def test_a_push_that_another_one_overtakes_is_refused(loopback, tiny_sae, monkeypatch):
    tiny_sae.push_to_hub(REPO)
    from huggingface_hub import HfApi

    create = HfApi.create_commit

    def late(self, *args, **options):
        loopback.add(REPO, {"README.md": b"# Somebody's, just now"})
        return create(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    tiny_sae.stats = None
    with pytest.raises(UserError, match="status 412: A commit has happened since"):
        tiny_sae.push_to_hub(REPO)
    assert loopback.files(REPO)["README.md"] == b"# Somebody's, just now"


def test_hostile_labels_are_pushed_as_text(loopback, tiny_sae):
    tiny_sae.labels = {3: "a\n---\nlicense: evil\n# <script>alert(1)</script> | ``` [x](javascript:1)", 4: "\ud800"}
    tiny_sae.push_to_hub(REPO)
    assert SAE.from_pretrained(REPO).labels == tiny_sae.labels


def test_the_command_pushes_and_a_new_process_loads(loopback, tiny_sae, tmp_path):
    folder = tiny_sae.save(tmp_path / "sae")
    outside = {**os.environ, **environment(loopback, tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-m", "sae", "push", str(folder), REPO, "--path", "a", "--dtype", "bfloat16"],
        capture_output=True, text=True, env=outside,
    )  # fmt: skip
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{loopback.url}/{REPO}/tree/main/a\n", "")
    script = f"from sae import SAE; print(SAE.from_pretrained({REPO!r}, 'a').cfg.d_sae)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=outside)
    assert (said.returncode, said.stdout, said.stderr) == (0, "96\n", "")
    loopback.token = "right"
    said = subprocess.run([sys.executable, "-m", "sae", "push", str(folder), REPO, "--path", "b"],
                          capture_output=True, text=True, env=outside)  # fmt: skip
    assert said.returncode == 2 and said.stdout == "" and len(said.stderr.splitlines()) == 1
    assert "You don't have the rights" in said.stderr


# ---- releases of SAELens's list ----

LIST = """
toy-res:
  conversion_func: null
  model: toy
  repo_id: user/saes
  config_overrides: {{dataset_path: texts, model_from_pretrained_kwargs: {{center_writing_weights: true}}}}
  saes:
  - id: blocks.2.hook_resid_post
    path: scaled
    neuronpedia: toy/2-res
    norm_scaling_factor: {scale}
  - {{id: blocks.3.hook_resid_post, path: scaled}}
  - {{id: blocks.4.hook_resid_post, path: plain}}
toy-token:
  conversion_func: null
  model: toy
  repo_id: user/saes
  config_overrides: {{normalize_activations: constant_norm_rescale}}
  saes:
  - {{id: a, path: plain}}
toy-clt:
  conversion_func: mntss_clt_layer_transcoder
  model: toy
  repo_id: user/clt
  saes:
  - {{id: layer_0, path: 0}}
"""
CASE = FIXTURES / "saelens-standard-scaled-checkpoint"


@pytest.fixture
def listed(loopback, monkeypatch, tmp_path):
    """An installed sae_lens that fails when it is imported, with a list of its own; its repository is on the Hub."""
    scale = json.loads((CASE / "sae" / saelens.SCALER).read_text())["scaling_factor"]
    package = tmp_path / "site" / "sae_lens"
    files.write_text(package / "__init__.py", "raise AssertionError('imported')")
    files.write_text(package / "pretrained_saes.yaml", LIST.format(scale=scale))
    monkeypatch.syspath_prepend(tmp_path / "site")
    scaled = {name: (CASE / "sae" / name).read_bytes() for name in ("cfg.json", "sae_weights.safetensors")}
    plain = {one.name: one.read_bytes() for one in (FIXTURES / "saelens-standard" / "sae").iterdir()}
    loopback.add("user/saes", {**under("scaled", scaled), **under("plain", plain)})
    return scale


def test_a_release_is_folded_with_the_factor_that_its_list_has(listed):
    sae = SAE.from_pretrained("toy-res", "blocks.2.hook_resid_post")
    assert max(differences(CASE, sae).values()) <= BAR
    about = sae.cfg.metadata
    assert (about.units, about.norm_factor, about.layout) == ("normalised", listed, "saelens")
    assert about.dataset == "texts" and about.foreign["neuronpedia_id"] == "toy/2-res"
    assert about.foreign["model_from_pretrained_kwargs"] == {"center_writing_weights": True}


def test_without_the_factor_the_way_out_is_named(listed):
    assert "the name of its release" in fails("toy-res", "blocks.3.hook_resid_post")
    assert "the name of its release" in fails("user/saes", "scaled")


def test_a_normalisation_that_the_list_corrects_is_taken(listed):
    assert SAE.from_pretrained("toy-res", "blocks.4.hook_resid_post").cfg.normalize_activations == "none"
    sae = SAE.from_pretrained("toy-token", "a")
    assert (sae.cfg.normalize_activations, sae.cfg.metadata.units) == ("constant_norm_rescale", "token")


def test_what_no_list_has_is_one_line_with_what_is_near(listed):
    assert fails("toy-rez", "a") == "toy-rez: neither a folder here nor a release of SAELens; did you mean toy-res?"
    assert "did you mean blocks.2.hook_resid_post? Give one of its 3" in fails("toy-res", "blocks.2.hook_resid_pos")
    assert fails("toy-res").startswith("toy-res: is a release of several SAEs. Give one of its 3 as sae_id, such as bl")
    assert "layout mntss_clt_layer_transcoder, which is not read" in fails("toy-clt", "layer_0")


@pytest.mark.parametrize("text", ["a: [", "[1]", "a: {saes: 3}", "a: {saes: [{path: 1}]}", "\ud800"])
def test_a_damaged_list_is_one_line(listed, text, tmp_path):
    path = tmp_path / "site" / "sae_lens" / "pretrained_saes.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    releases._releases.cache_clear()
    assert "is no list of releases" in fails("a", "b")


def test_without_sae_lens_the_name_of_a_release_says_what_to_do(loopback, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install sae-lens" in fails("gpt2-small-res-jb", "blocks.0.hook_resid_pre")
    assert loopback.asked == []


def test_push_hands_its_words_on(capsys, monkeypatch, tiny_sae, tmp_path):
    folder, seen = tiny_sae.save(tmp_path / "sae"), {}

    def push(self, repo, path, **options):
        seen.update(options, repo=repo, path=path)
        return "an address"

    monkeypatch.setattr(SAE, "push_to_hub", push)
    assert cli.main(["push", str(folder), "u/r", "--private", "--revision", "b"]) == 0
    assert seen == {
        "repo": "u/r",
        "path": None,
        "private": True,
        "revision": "b",
        "dtype": "float32",
        "readme": None,
    }
    (folder / "README.md").write_text("my own words")
    assert cli.main(["push", str(folder), "u/r"]) == 0 and seen["readme"] == "my own words"
    assert capsys.readouterr().out == "an address\n" * 2
    shutil.rmtree(folder)
    assert cli.main(["push", str(folder), "u/r"]) == 2
