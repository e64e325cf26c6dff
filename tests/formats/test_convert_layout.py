"""`sae convert` of a whole SAE: the same codes in another layout, losses told, or a layout named that can say it."""

import shutil

import pytest
import torch

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.run import convert_layout
from tests.conftest import make_sae
from tests.peers.agree import BAR, FIXTURES

CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.safetensors"))
LAYOUTS = ("saelens", "sparsify", "dictionary_learning")


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_says_the_same_sae_or_names_one_that_does(tmp_path, case, to):
    try:
        made = convert_layout(case / "sae", tmp_path / "out", to)
    except UserError as error:
        assert list(tmp_path.iterdir()) == []
        other = next(name for name in LAYOUTS if str(error).endswith((f"as {name}.", f"--to {name}.")))
        convert_layout(case / "sae", tmp_path / "out", other)
    else:
        assert made["largest difference"] <= BAR


def test_a_calibrated_threshold_that_sparsify_has_no_word_for_is_told(tmp_path):
    make_sae().save(tmp_path / "sae")
    lost = convert_layout(tmp_path / "sae", tmp_path / "theirs", "sparsify")["lost"]
    assert "threshold: sparsify has no word for a calibrated one; 0.5 stays with" in lost[0]
    assert "statistics: sparsify has no place for them" in lost[1]


def beside(path):
    """Everything below a folder, with what it holds."""
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def a_model(at):
    at.mkdir()
    (at / "config.json").write_text('{"model_type": "llama"}')
    (at / "model.safetensors").write_bytes(b"weights")


def a_run(at):
    shutil.copytree(FIXTURES / "sparsify-topk" / "sae", at / "layers.3")
    (at / "config.json").write_text("{}")
    (at / "cfg.json").write_text("{}")


def another_saes(at):
    shutil.copytree(FIXTURES / "sparsify-topk" / "sae", at)


def an_indexed_sae(at):
    make_sae().save(at)
    (at / "index").mkdir()
    (at / "index" / "index.json").write_text("{}")


def a_file(at):
    at.write_text("mine")


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("there", [a_model, a_run, another_saes, an_indexed_sae, a_file])
def test_what_is_no_earlier_conversion_is_never_replaced(tmp_path, there, to):
    source = make_sae().save(tmp_path / "source")
    there(tmp_path / "out")
    if there is another_saes and to == "sparsify":
        convert_layout(source, tmp_path / "out", to)  # two files of this layout and no others
        assert torch.equal(SAE.load(tmp_path / "out").W_dec, SAE.load(source).W_dec)
        return
    before = beside(tmp_path)
    with pytest.raises(UserError, match="Give another") as caught:
        convert_layout(source, tmp_path / "out", to)
    assert beside(tmp_path) == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("out", [".", "run", "run/trainer_0"])
def test_a_folder_that_holds_the_source_is_never_replaced(tmp_path, monkeypatch, out, to):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "dictionary_learning-AutoEncoderTopK" / "sae", tmp_path / "run" / "trainer_0")
    before = beside(tmp_path)
    for source in ("run/trainer_0", "run/trainer_0/ae.pt"):
        with pytest.raises(UserError, match="is or holds what is to be converted"):
            convert_layout(source, out, to)
    assert beside(tmp_path) == before


def test_an_earlier_conversion_is_replaced(tmp_path):
    for seed in (0, 1):
        source = make_sae(seed=seed).save(tmp_path / str(seed))
        convert_layout(source, tmp_path / "out", "sparsify")
    assert torch.equal(SAE.load(tmp_path / "out").W_dec, SAE.load(tmp_path / "1").W_dec)


def test_an_sae_is_not_saved_over_one_of_another_layout(tmp_path):
    another_saes(tmp_path / "out")
    before = beside(tmp_path)
    with pytest.raises(UserError, match="holds an SAE of sparsify's layout"):
        make_sae().save(tmp_path / "out")
    assert beside(tmp_path) == before
