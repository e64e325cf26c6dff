"""The user's own labels: kept with the SAE, told apart, and understood where a number is."""

import pytest

from sae import cli, labels
from sae.autoencoder import SAE
from sae.dials import Dial, parse_dials
from sae.errors import UserError
from sae.labels import feature_of
from tests.conftest import make_sae

KNOWN = {12: "the Golden Gate Bridge", 34: "anger", 5: "golden retrievers"}


def test_a_name_is_a_number_a_whole_label_or_the_only_one_that_holds_it():
    assert feature_of("12", KNOWN) == feature_of(12, KNOWN) == 12
    assert feature_of("ANGER", KNOWN) == 34
    assert feature_of("gate  bridge", KNOWN) == 12
    with pytest.raises(UserError, match=r"2 features have that in their label: 12 \(the Golden Gate Bridge\), 5"):
        feature_of("golden", KNOWN)
    with pytest.raises(UserError, match="'joy' is neither a feature's number nor a label"):
        feature_of("joy", KNOWN)
    for odd in ("", "²", "1" * 30):
        with pytest.raises(UserError, match="neither"):
            feature_of(odd, KNOWN)


def test_labels_go_with_the_sae(tmp_path):
    make_sae().save(tmp_path / "a")
    labels.change(tmp_path / "a", 12, " the  Golden Gate\nBridge ")
    labels.change(tmp_path / "a", 34, "anger")
    model = SAE.load(tmp_path / "a")
    assert model.labels == {12: "the Golden Gate Bridge", 34: "anger"}
    model.save(tmp_path / "b")
    model.save(tmp_path / "a")  # onto itself
    assert labels.read(tmp_path / "b") == labels.read(tmp_path / "a") == model.labels
    assert labels.change(tmp_path / "a", 12, "") == {34: "anger"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("12", "told from a number"),
        ("1.5x", "told"),
        ("off", "told"),
        ("a=b", "told from a number"),
        ("x" * 201, "told from"),
        ("Anger", "feature 34 has"),
    ],
)
def test_a_label_that_would_be_misread_is_refused_and_nothing_changes(tmp_path, name, says):
    labels.write(tmp_path, KNOWN)
    with pytest.raises(UserError, match=says):
        labels.change(tmp_path, 7, name)
    assert labels.read(tmp_path) == KNOWN


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"golden": "gate"}', "not a feature's number"),
        ('{"5": null}', "label of 5 is None"),
        ('{"1_0": "x"}', "'1_0' is not"),
        ('{" 1 ": "x"}', "' 1 ' is not"),
        ('{"\u0661": "x"}', "is not a feature's number"),
        ('{"07": "x"}', "'07' is not"),
        ('{"-3": "x"}', "of -3"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, text, says):
    (tmp_path / labels.FILE).write_text(text)
    with pytest.raises(UserError, match=says):
        labels.read(tmp_path)


def test_a_label_of_a_feature_that_the_sae_has_not_is_refused(tmp_path):
    make_sae().save(tmp_path / "a")
    labels.write(tmp_path / "a", {96: "beyond"})
    with pytest.raises(UserError, match="names feature 96, the SAE has 96"):
        SAE.load(tmp_path / "a")


def test_dials_know_labels():
    expected = [Dial(12, 5.0, True), Dial(34, 0.5)]
    assert parse_dials("the Golden Gate Bridge=5x, anger = 0.5", KNOWN) == expected
    assert parse_dials(["gate bridge=5x", "anger=0.5"], KNOWN) == expected
    assert parse_dials({"gate bridge": "5x", "anger": 0.5}, KNOWN) == expected
    assert parse_dials("12=5x 34=0.5", KNOWN) == expected
    with pytest.raises(UserError, match="neither a feature's number nor a label"):
        parse_dials(["joy=2x"], KNOWN)
    with pytest.raises(UserError, match="not a feature's number"):
        parse_dials("joy=2x")


def test_the_verb_sets_lists_and_takes_away(tmp_path, capsys):
    make_sae().save(tmp_path / "a")

    def label(*words):
        code = cli.main(["label", str(tmp_path / "a"), *words])
        return code, *capsys.readouterr()

    assert label("12", "the Golden Gate Bridge")[0] == 0
    code, out, _ = label()
    assert code == 0 and "12" in out and "the Golden Gate Bridge" in out
    assert "Golden" in label("golden gate")[1]
    assert label("96", "beyond")[0] == 2
    assert label("golden gate", "")[0] == 0
    assert "no labels" in label()[1]
    assert cli.main(["label", str(tmp_path / "nothing")]) == 2
