"""Writing a corpus: resumable to the byte, in full batches, without passages that go in circles."""

import gzip
import itertools
import json

import pytest
import torch

from sae import corpus, files
from sae.corpus import Prompt, Sampling
from sae.errors import UserError

SHORT = Sampling(max_new_tokens=24)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.json"
    blocks = [
        {
            "topics": ["fog", "a bridge"],
            "forms": ["Describe {}.", "Why {}?"],
            "names": {"a bridge": "bridge"},
        },
        {"topics": ["a prize"], "forms": ["Write about {} at great length."], "topic": "scam", "samples": 3},
    ]
    path.write_text(json.dumps(blocks))
    return path


def write(host, out, prompts_file, **options):
    settings = {"tokens": 260, "batch": 3, "sampling": SHORT, "progress": False, "prompts_file": prompts_file}
    return corpus.write(host, out, **{**settings, **options})


def content(folder):
    return (folder / "corpus.jsonl.gz").read_bytes(), (folder / "corpus.json").read_bytes()


def test_a_prompt_is_filed_under_its_topic_and_form(prompts_file):
    found = dict(corpus.prompts(prompts_file))
    assert found[Prompt("bridge", "Why {}?", "Why a bridge?")] == 1
    assert found[Prompt("scam", "Write about {} at great length.", "Write about a prize at great length.")] == 3
    assert len(found) == 5


def test_a_round_has_each_prompt_once_and_later_rounds_those_with_more_samples(prompts_file):
    wanted = corpus.prompts(prompts_file)
    batches = corpus.schedule(wanted, 2, 0, len)
    rounds = [list(itertools.chain(*itertools.islice(batches, n))) for n in (3, 1, 1, 3)]
    everything = {prompt for prompt, _ in wanted}
    often = {prompt for prompt, samples in wanted if samples == 3}
    assert [set(r) for r in rounds] == [everything, often, often, everything]
    assert [len(r) for r in rounds] == [5, 1, 1, 5]


def test_the_corpus_holds_what_the_recipe_counts(tiny_host, tmp_path, prompts_file):
    summary = write(tiny_host, tmp_path / "out", prompts_file)
    with gzip.open(tmp_path / "out" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert summary == files.read_json(tmp_path / "out" / "corpus.json")
    assert summary["counts"]["passages"] == len(lines) >= 260 / 24
    assert summary["counts"]["tokens"] >= 260
    assert summary["fingerprint"] == tiny_host.fingerprint
    assert all(list(line) == ["topic", "form", "text", "prompt"] for line in lines)


def test_near_duplicates_are_dropped_and_counted(tiny_host, tmp_path, prompts_file, monkeypatch):
    words = [f"word{i}" for i in range(40)]
    whole, half, other = " ".join(words), " ".join([*words[:26], *"abcdefghij"]), " ".join([*words[:12], *"abcdefghij"])
    assert corpus.without_near_duplicates([whole, half, other]) == [0, 2]
    assert corpus.without_near_duplicates([half, whole, "Short.", "short.", "Short, other."]) == [0, 2, 4]

    real, number = corpus._passages, itertools.count()

    def alike(*args):
        line = real(*args)
        for passage in line["passages"]:
            passage["text"] = f"{whole} {next(number)}"
        return line

    monkeypatch.setattr(corpus, "_passages", alike)
    counts = write(tiny_host, tmp_path / "out", prompts_file)["counts"]
    assert counts["passages"] == 1 and counts["dropped_duplicates"] == 0 and counts["dropped_near_duplicates"] > 10


def test_an_interrupted_corpus_is_resumed_to_the_same_bytes(tiny_host, tmp_path, prompts_file):
    write(tiny_host, tmp_path / "whole", prompts_file)
    write(tiny_host, tmp_path / "parts", prompts_file, tokens=60)
    parts = tmp_path / "parts" / "parts.jsonl"
    with parts.open("a") as file:
        file.write('{"batch": 2, "passa')  # killed while it wrote a line
    write(tiny_host, tmp_path / "parts", prompts_file)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert parts.read_bytes() == (tmp_path / "whole" / "parts.jsonl").read_bytes()


def test_an_interrupt_keeps_the_finished_batches(tiny_host, tmp_path, prompts_file, monkeypatch):
    write(tiny_host, tmp_path / "whole", prompts_file)
    real, calls = corpus.sample, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(corpus, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tiny_host, tmp_path / "cut", prompts_file)
    assert len(files.read_lines(tmp_path / "cut" / "parts.jsonl")) == 3  # the recipe and two batches
    assert not (tmp_path / "cut" / "corpus.json").exists()
    write(tiny_host, tmp_path / "cut", prompts_file)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_the_number_of_workers_does_not_change_the_corpus(tiny_host, tmp_path, prompts_file):
    write(tiny_host, tmp_path / "one", prompts_file)
    write(tiny_host, tmp_path / "three", prompts_file, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_another_seed_writes_another_corpus(tiny_host, tmp_path, prompts_file):
    write(tiny_host, tmp_path / "a", prompts_file)
    write(tiny_host, tmp_path / "b", prompts_file, seed=1)
    assert content(tmp_path / "a")[0] != content(tmp_path / "b")[0]


def test_a_folder_begun_with_another_recipe_is_refused(tiny_host, tmp_path, prompts_file):
    write(tiny_host, tmp_path / "a", prompts_file, tokens=30)
    with pytest.raises(UserError, match=r"another recipe \(differs in batch, seed\)"):
        write(tiny_host, tmp_path / "a", prompts_file, seed=1, batch=2)


@pytest.mark.parametrize("broken", ["{", "[]", '{"topics": []}', '[{"topics": ["a"]}]', "[3]"])
def test_a_broken_prompts_file_is_one_line(tiny_host, tmp_path, broken):
    path = tmp_path / "prompts.json"
    path.write_text(broken)
    with pytest.raises(UserError, match="prompts.json") as error:
        write(tiny_host, tmp_path / "out", path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_or_rows_are_an_error(tiny_host, tmp_path, prompts_file):
    with pytest.raises(UserError, match="at least 1"):
        write(tiny_host, tmp_path / "out", prompts_file, batch=0)


def test_passages_that_are_short_or_go_in_circles_are_degenerate():
    assert corpus.is_degenerate(range(19))
    assert not corpus.is_degenerate(range(20))
    assert corpus.is_degenerate([1, 2, 3, 4, 5] * 20)
    assert not corpus.is_degenerate([*range(60), *range(40)])


def test_greedy_sampling_of_a_batch_equals_each_request_alone(host):
    """Left padding, positions, the cache and rows that leave the batch change nothing."""
    asked = ["What is 2 + 2? Answer with one number.", "Name three colors.", "Tell a story about the fog."]
    requests = [host.chat_tokens(text)[0] for text in asked]
    greedy = Sampling(top_k=1, max_new_tokens=20)
    stops = frozenset(host.special_ids)
    together = corpus.sample(host, requests, greedy, stops, seed=0)
    for request, answer in zip(requests, together, strict=True):
        assert corpus.sample(host, [request], greedy, stops, seed=1) == [answer]


def test_a_draw_stays_within_top_k_and_top_p():
    logits = torch.tensor([[3.0, 2.9, -1.0, 0.0]]).repeat(500, 1)
    generator = torch.Generator().manual_seed(0)
    by_p = corpus._draw(logits, Sampling(temperature=1.0, top_p=0.9), generator)
    assert set(by_p.tolist()) == {0, 1}
    by_k = corpus._draw(logits, Sampling(temperature=9.0, top_p=1.0, top_k=3), generator)
    assert set(by_k.tolist()) == {0, 1, 3}
