"""The checkpoint that ships: whole, small, described by its own files, and what its card says."""

from pathlib import Path

import pytest

from experiments import dial, forty, ship
from sae import SAE, files
from sae.evaluation.core import headline
from sae.features.pool import document_maxima

FOLDER = Path(__file__).parents[1] / "checkpoints" / "smollm2-golden-gate"
CONCEPTS = files.read_json(FOLDER / "concepts.json")
DIALS = files.read_json(FOLDER / "dials.json") if (FOLDER / "dials.json").exists() else {}
PUBLISHED = "d4dccdd1f24cb58737d0caf02ead45be615c6f4e48b55587cb44c5833f4fd9d1"
dialled = pytest.mark.skipif(
    not DIALS and files.checksum(FOLDER / "sae_weights.safetensors") != PUBLISHED,
    reason="trained again to other bits; python -m experiments.ship RUN FOLDER --dials measures their dials",
)


@pytest.fixture(scope="module")
def shipped():
    return SAE.load(FOLDER)


def test_it_is_small_and_its_figures_are_those_of_these_weights(shipped):
    weights = FOLDER / "sae_weights.safetensors"
    digest = files.checksum(weights)
    assert weights.stat().st_size <= 45e6
    assert digest in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert shipped.threshold is not None and float(shipped.threshold[0]) > 0
    for name in ("evaluation.json", "evaluation-unseen.json", "evaluation-docstrings.json"):
        assert files.read_json(FOLDER / name)["eval_config"], name
    assert shipped.cfg.metadata.evaluation["fvu"]["low"] < shipped.cfg.metadata.evaluation["fvu"]["high"] < 0.3


def test_its_card_is_made_of_its_files(shipped):
    figures = [headline(files.read_json(FOLDER / f"evaluation{name}.json")) for name in ("", "-docstrings", "-unseen")]
    facts = {"minutes": 2, "read": 20_000, "which": "…", "machine": "…", "sha256": PUBLISHED, "bytes": 9_500_000}
    text = ship.page(shipped, FOLDER, *figures, documents=1_199, facts=facts)
    sections = ("## Forty concepts", "## Named features", "## Use and limits")
    for part in ("standard library's docstrings", PUBLISHED, *sections):
        assert part in text


def test_few_features_are_dead(shipped):
    assert shipped.stats.n_tokens >= 500_000
    assert float((shipped.stats.density == 0).float().mean()) <= 0.01


def test_the_forty_concepts_have_features_with_their_names(shipped):
    assert [row["concept"] for row in CONCEPTS] == [concept.name for concept in forty.concepts()]
    assert sum(row["auroc"] >= forty.ENOUGH for row in CONCEPTS) >= 30
    assert shipped.labels == ship.names([forty.Row(**row) for row in CONCEPTS], DIALS)
    assert {name.removesuffix(" (detects)") for name in shipped.labels.values()} <= {row["concept"] for row in CONCEPTS}
    assert "the Golden Gate Bridge" in shipped.labels.values()


@dialled
def test_the_bridge_s_recorded_dial_writes_where_random_features_do_not():
    assert DIALS["sha256"] == files.checksum(FOLDER / "sae_weights.safetensors")
    assert {"the Golden Gate Bridge", "computer code"} <= set(SAE.load(FOLDER).labels.values())
    row = next(row for row in DIALS["dials"] if row["concept"] == "the Golden Gate Bridge")
    assert row["about"]["value"] >= 0.7 and row["about"]["low"] >= 0.55
    assert row["random features"]["about"]["value"] <= 0.05 >= row["unsteered"]["about"]["value"]


@dialled
def test_dials_are_reported_on_questions_that_did_not_choose_them():
    assert not set(dial.QUESTIONS["choosing"]) & set(dial.QUESTIONS["reporting"])
    assert len(set(dial.QUESTIONS["reporting"])) == 40
    assert {row["concept"] for row in DIALS["dials"]} > set(dial.DIALS)
    assert [row["concept"] for row in DIALS["tried"]] == list(dial.TRIED)
    for row in DIALS["dials"]:
        assert len(row["shown"]) == 10
        assert {one["question"] for one in row["shown"]} <= set(dial.QUESTIONS["reporting"])


def test_concepts_are_chosen_and_reported_on_texts_that_hold_them_or_not():
    which = forty.passages()
    for concept in forty.concepts():
        for reporting in (False, True):
            own, others = which.of(concept, reporting)
            assert len(own) >= 15 and len(others) >= 50, (concept.name, reporting)
            assert {which.documents[i].topic for i in own} == {concept.name}
            forms = [{which.documents[i].form for i in side} for side in (own, others)]
            assert forms[1] <= forms[0] or reporting  # of the ten unseen forms all stand on the other side
            assert all((i >= which.n_choosing) == reporting for i in [*own, *others])
    unseen = {which.documents[i].form for i in range(which.n_choosing, len(which.documents))}
    assert not unseen & {document.form for document in which.documents[: which.n_choosing]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_concept_s_figure_can_be_made_again(host, shipped):
    which, hook = forty.passages(), shipped.cfg.metadata.hook_name
    limits = {hook: shipped.cfg.metadata.outlier_norm}
    maxima = document_maxima(
        shipped, forty.blocks(which, host, [hook], limits), len(which.documents), hook=hook
    )  # the figures were made in bfloat16, this host is float32
    for row, concept in list(zip(CONCEPTS, forty.concepts(), strict=True))[:5]:
        found, _ = forty.contrasted(which, maxima, concept, reporting=True)
        assert float(found.auroc[row["feature"]]) == pytest.approx(row["auroc"], abs=0.03)


@dialled
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_bridge_dial_writes(host, shipped):
    row = next(row for row in DIALS["dials"] if row["concept"] == "the Golden Gate Bridge")
    concept = next(one for one in forty.concepts() if one.name == row["concept"])
    bench = dial.Bench(host, shipped, shipped.cfg.metadata.hook_name, 1.0, dial.limit_of(host))
    effort = dial.Effort(tokens=40)
    on, off = dial.reported(
        bench, concept, [dial.Setting(row["feature"], row["amount"]), dial.Setting(row["feature"], 0.0)], effort, 1
    )
    assert on.rate >= 0.5
    assert off.rate <= 0.05
