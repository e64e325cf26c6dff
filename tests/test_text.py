"""Sources, the held-out split and packing, with SmolLM2's tokenizer."""

import gzip
import json
import random
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch

from sae import text
from sae.errors import UserError
from sae.recipe import TextRecipe
from sae.text import Document
from sae.token_rows import Text

SENTENCE = "the fog rolled over San Francisco Bay and the bridge's towers (746 ft) — naïve, 日本, 🙂 — were gone"
WORDS = SENTENCE.split()


def passages(count, longest, seed=0):
    draw = random.Random(seed)
    return [f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for i in range(count)]


def all_rows(packer):
    batches = list(packer)
    return text.Rows(*(torch.cat([getattr(b, f) for b in batches]) for f in ("tokens", "doc", "pos", "mask")))


def pieces(rows):
    """(document, tokens) of each run of one document in a row, sorted."""
    found = []
    for r in range(len(rows)):
        for number in set(rows.doc[r].tolist()) - {-1}:
            found.append((number, rows.tokens[r][rows.doc[r] == number].tolist()))
    return sorted(found)


def cut(texts, tokenizer, context):
    """What `pieces` should be: each document's tokens, cut where they exceed the context."""
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    return sorted((n, one[i : i + context]) for n, one in enumerate(ids) for i in range(0, len(one), context))


class WithBegin:
    """SmolLM2's tokenizer made to put its token 1 in front of a text, as Llama 3's does."""

    def __init__(self, tokenizer):
        self.inner = tokenizer
        self.decode = tokenizer.decode
        self.bos_token_id = 1
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.all_special_ids = [0, 1, 2]

    def __call__(self, texts, add_special_tokens=True, **options):
        encoded = self.inner(texts, add_special_tokens=False, **options)
        if add_special_tokens:
            encoded["input_ids"] = [1, *encoded.input_ids]
        return encoded

    def __len__(self):
        return len(self.inner)


# ---- packing -------------------------------------------------------------------------------------------


def test_a_document_that_fits_is_never_cut(tokenizer):
    texts = passages(700, 45)
    rows = all_rows(text.pack(texts, tokenizer, 128))
    lengths = [len(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    assert max(lengths) <= 128 and min(lengths) >= 3
    for r in range(len(rows)):
        for number in set(rows.doc[r].tolist()) - {-1}:
            assert int((rows.doc[r] == number).sum()) == lengths[number]


def test_every_token_appears_exactly_once_when_isolated(tokenizer):
    texts = passages(300, 90) + [" ".join(passages(30, 40, seed=1))]
    rows = all_rows(text.pack(texts, tokenizer, 64, rows_per_batch=7))
    assert pieces(rows) == cut(texts, tokenizer, 64)


def test_concatenated_rows_are_the_documents_in_order(tokenizer):
    texts = passages(300, 90)
    rows = all_rows(text.pack(texts, tokenizer, 64, isolate=False, rows_per_batch=7))
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    real = rows.doc >= 0
    assert rows.tokens[real].tolist() == [i for one in ids for i in one]
    assert rows.doc[real].tolist() == [n for n, one in enumerate(ids) for _ in one]


def test_packing_wastes_less_than_three_percent_of_varied_documents(tokenizer):
    packer = text.pack(passages(2000, 60), tokenizer, 128)
    for _ in packer:
        pass
    assert packer.counts["padding"] < 0.03 * packer.counts["positions"]


def test_rows_depend_on_the_documents_alone(tokenizer):
    texts = passages(200, 60)
    first = all_rows(text.pack(texts, tokenizer, 96))
    again = all_rows(text.pack(iter(texts), tokenizer, 96, rows_per_batch=11))
    for name in ("tokens", "doc", "pos", "mask"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_positions_restart_with_each_piece_when_isolated(tokenizer):
    rows = all_rows(text.pack(passages(100, 200), tokenizer, 64))
    for r in range(len(rows)):
        expected, last = [], None
        for number in rows.doc[r].tolist():
            expected.append(0 if number != last or number < 0 else expected[-1] + 1)
            last = number
        assert rows.pos[r].tolist() == expected
    assert not rows.mask[rows.pos == 0].any()


def test_positions_run_through_a_row_that_is_plainly_concatenated(tokenizer):
    rows = all_rows(text.pack(passages(100, 20), tokenizer, 64, isolate=False))
    assert torch.equal(rows.pos[:-1], torch.arange(64, dtype=torch.int32).expand(len(rows) - 1, 64))
    assert int((~rows.mask[:-1]).sum()) == len(rows) - 1  # only the first position of each row
    assert (rows.doc[:-1] >= 0).all()


def test_special_tokens_padding_and_first_positions_are_masked(tokenizer):
    texts = ["One two three<|im_end|>four five six", "seven eight"]
    packer = text.pack(texts, tokenizer, 32)
    rows = all_rows(packer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = (rows.doc >= 0) & (rows.tokens != end) & (rows.pos > 0)
    assert torch.equal(rows.mask, expected)
    assert packer.counts["special"] == 1 and packer.counts["first"] == 2
    counted = sum(packer.counts[name] for name in ("padding", "special", "first"))
    assert counted + int(rows.mask.sum()) == packer.counts["positions"]
    own = all_rows(text.pack(texts, tokenizer, 32, special_ids={int(rows.tokens[0, 2])}))
    assert own.mask.sum() == rows.mask.sum() and not own.mask[0, 2]


def test_a_tokenizer_without_its_own_begin_token_gets_none(tokenizer):
    assert text.begin_id(tokenizer) is None
    rows = all_rows(text.pack(["Hello there."], tokenizer, 16))
    assert rows.tokens[0, 0] == tokenizer("Hello", add_special_tokens=False).input_ids[0]


def test_a_tokenizer_that_begins_texts_begins_each_document(tokenizer):
    begins = WithBegin(tokenizer)
    texts = passages(40, 80)
    rows = all_rows(text.pack(texts, begins, 64))
    starts = rows.tokens[(rows.pos == 0) & (rows.doc >= 0)]
    assert (starts == 1).all()
    assert [(n, ids[1:]) for n, ids in pieces(rows)] == cut(texts, tokenizer, 63)
    plain = all_rows(text.pack(texts, begins, 64, isolate=False))
    assert int((plain.tokens == 1).sum()) == len(texts)


def test_loss_mask_needs_both_tokens_in_one_document(tokenizer):
    rows = all_rows(text.pack(passages(50, 20), tokenizer, 64))
    counts = text.loss_mask(rows)
    for r, t in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(64)).tolist():
        both = t < 63 and bool(rows.mask[r, t] and rows.mask[r, t + 1] and rows.doc[r, t] == rows.doc[r, t + 1])
        assert bool(counts[r, t]) == both


def test_max_tokens_stops_after_the_document_that_reaches_it(tokenizer):
    texts = passages(100, 20)
    packer = text.pack(texts, tokenizer, 64, max_tokens=200)
    rows = all_rows(packer)
    lengths = [len(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    last = int(rows.doc.max())
    assert sum(lengths[:last]) < 200 <= sum(lengths[: last + 1]) == packer.counts["tokens"]


def test_a_context_of_one_is_an_error(tokenizer):
    with pytest.raises(UserError, match="context: 1"):
        text.pack(["a"], tokenizer, 1)


# ---- going on at a state -------------------------------------------------------------------------------


class Listening:
    """A tokenizer that remembers the texts that it was given, those of `begin_id` ("a") aside."""

    def __init__(self, tokenizer):
        self.inner, self.heard = tokenizer, []

    def __call__(self, texts, **options):
        self.heard += [one for one in ([texts] if isinstance(texts, str) else texts) if one != "a"]
        return self.inner(texts, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)


def saved(packer):
    return json.loads(json.dumps(packer.state))


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "doc", "pos", "mask"))


def check_resuming(make, each=1):
    """Packers that `make` begins at the state before every batch, or before one of `each`, go on as one without a
    break does: the same rows to the bit, the same states on the way, the same counts. Gives batches and states."""
    whole = make(None)
    states, batches = [saved(whole)], []
    for rows in whole:
        batches.append(rows)
        states.append(saved(whole))
    ended = saved(whole)  # counts documents behind the last row too
    for start in range(0, len(states), each):
        resumed = make(states[start])
        assert saved(resumed) == states[start]
        n = start
        for rows in resumed:
            assert same(rows, batches[n]), (start, n)
            n += 1
            assert saved(resumed) == states[n], (start, n)
        assert n == len(batches) and saved(resumed) == ended
        assert (resumed.counts, resumed.sources, resumed.by_source) == (whole.counts, whole.sources, whole.by_source)
    return batches, states


def of_all_kinds(tokenizer):
    """Texts shorter and much longer than 48 tokens, texts of nothing, ready-made ids with a beginning and without."""
    ids = tokenizer(" ".join(passages(20, 12, seed=3)), add_special_tokens=False).input_ids
    found = [Document(one, f"group {i}") for i, one in enumerate(passages(60, 25))]
    found[7:7] = [Document("", "nothing"), Document("", "ids", tokens=tuple(ids))]
    found[20:20] = [Document(" ".join(passages(30, 40, seed=1)), "long"), Document("", "ids", tokens=(1, *ids[:90]))]
    return [*found, Document("", "only a beginning", tokens=(1,)), Document(SENTENCE, "last"), Document("", "nothing")]


@pytest.mark.parametrize("window", [8, 512])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("isolate", [True, False])
def test_packing_resumes_exactly_after_every_batch(tokenizer, monkeypatch, isolate, begins, window):
    monkeypatch.setattr(text, "WINDOW", window)
    known = of_all_kinds(tokenizer)
    reader = WithBegin(tokenizer) if begins else tokenizer

    def make(state, **options):
        left = known[state["documents"] :] if state else known
        return text.pack(left, reader, 48, isolate=isolate, resume=state, **options)

    batches, states = check_resuming(lambda state: make(state, rows_per_batch=1))
    assert len(batches) > 50
    waiting = [number for number, _ in states[len(states) // 4]["pending"]]
    assert waiting and (isolate or len(set(waiting)) == 1), "the states are in the middle of something"
    check_resuming(lambda state: make(state, rows_per_batch=7))
    limited, _ = check_resuming(lambda state: make(state, rows_per_batch=1, max_tokens=1500))
    assert 1500 // 48 <= len(limited) < len(batches)


@pytest.mark.parametrize("isolate", [True, False])
def test_max_tokens_that_were_reached_before_a_break_stop_reading_after_it(tokenizer, isolate):
    texts = passages(40, 20)
    packer = text.pack(texts, tokenizer, 16, isolate=isolate, max_tokens=200, rows_per_batch=1)
    while packer.counts["tokens"] < 200:
        next(packer)

    def unread():
        pytest.fail("a document was read")
        yield

    resumed = text.pack(unread(), tokenizer, 16, isolate=isolate, max_tokens=200, rows_per_batch=1, resume=packer.state)
    for rows in packer:
        assert same(next(resumed), rows)
    assert next(resumed, None) is None
    assert resumed.counts == packer.counts


def test_a_state_does_not_change_while_its_packer_goes_on(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "WINDOW", 8)
    packer = text.pack(passages(60, 60), tokenizer, 32, rows_per_batch=5)
    next(packer)
    state = packer.state
    told = json.dumps(state)
    resumed = text.pack(passages(60, 60)[state["documents"] :], tokenizer, 32, rows_per_batch=5, resume=state)
    for one, other in zip(packer, resumed, strict=True):
        assert same(one, other)
    assert json.dumps(state) == told


def recipe_of(tmp_path, weights, isolate, **options):
    """Files of passages, of another length in each, and the recipe of their mixture."""
    for n, name in enumerate(weights):
        lines = (json.dumps({"text": one}) + "\n" for one in passages(80, 25 + 40 * n, seed=n))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    source = {str(tmp_path / f"{name}.jsonl"): share for name, share in weights.items()}
    return TextRecipe(
        source if len(source) > 1 else next(iter(source)), context=48, isolate_documents=isolate, **options
    )


@pytest.mark.parametrize("max_tokens", [None, 2000])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("weights", [{"one": 1}, {"short": 0.1, "long": 0.7, "longer": 0.2}])
def test_the_text_of_a_recipe_resumes_exactly_after_every_batch(
    tokenizer, tmp_path, monkeypatch, weights, isolate, max_tokens
):
    monkeypatch.setattr(text, "WINDOW", 8)
    host = SimpleNamespace(tokenizer=tokenizer, special_ids={0, 1, 2})
    source = Text(recipe_of(tmp_path, weights, isolate, max_tokens=max_tokens), host, "train")

    def make(state):
        packer = source.rows(resume=state)
        packer.rows_per_batch = 2
        return packer

    batches, states = check_resuming(make)
    assert len(batches) > 10
    assert states[-1]["by_source"].keys() == states[-1]["sources"].keys()
    assert len(states[-1]["by_source"]) == len(weights) and ("" in states[-1]["by_source"]) == (len(weights) == 1)
    assert states[-1]["documents"] == states[-1]["counts"]["documents"] == sum(states[-1]["by_source"].values())


@pytest.mark.parametrize("weights", [{"one": 1}, {"short": 0.1, "long": 0.7, "longer": 0.2}])
def test_what_was_read_before_a_break_is_not_tokenized_after_it(tokenizer, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(text, "WINDOW", 8)
    listening = Listening(tokenizer)
    host = SimpleNamespace(tokenizer=listening, special_ids={0, 1, 2})
    source = Text(recipe_of(tmp_path, weights, isolate=True), host, "train")
    noted = []
    packer = source.rows(noted.append)
    packer.rows_per_batch = 20
    next(packer)
    state, before = packer.state, [document.text for document in noted]
    assert len(before) == state["documents"] > 8
    list(packer)
    after = [document.text for document in noted[len(before) :]]
    listening.heard.clear()
    again = []
    list(source.rows(again.append, resume=state))
    assert [document.text for document in again] == after
    assert not set(listening.heard) & set(before)
    assert len(listening.heard) == len(set(listening.heard)), "and nothing twice"


def test_a_mixture_goes_on_choosing_as_without_a_break(tokenizer):
    weights = {"short": 0.1, "long": 0.3, "longer": 0.6}
    read = {name: list(text.tokenized(passages(50, 10 + 20 * n, seed=n), tokenizer)) for n, name in enumerate(weights)}
    whole = list(text.mixed(read, weights))
    tokens, taken = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
    for n, document in enumerate(whole):
        left = {name: found[taken[name] :] for name, found in read.items()}
        assert list(text.mixed(left, weights, tokens)) == whole[n:]
        tokens[document.source] += len(document.tokens)
        taken[document.source] += 1


@pytest.mark.parametrize("isolate", [True, False])
def test_the_bundled_corpus_resumes_exactly(tokenizer, isolate):
    source = TextRecipe(isolate_documents=isolate, max_tokens=110_000)
    host = SimpleNamespace(tokenizer=tokenizer, special_ids=set(tokenizer.all_special_ids))
    batches, states = check_resuming(lambda state: Text(source, host, "train").rows(resume=state), each=4)
    assert len(batches) > 10 and states[4]["documents"] < states[-4]["documents"]


# ---- sources -------------------------------------------------------------------------------------------


def test_the_bundled_corpus_knows_topic_form_and_prompt_as_its_group():
    found = list(text.documents("bundled"))
    assert len(found) > 500
    assert all(d.topic and d.form and d.group for d in found)
    assert any(d.topic == "the Golden Gate Bridge" for d in found)
    one = next(d for d in found if "{}" in d.form)
    assert one.group.startswith(one.form.split("{}")[0])


def test_iterables_of_str_documents_and_mappings_are_read():
    kept = Document("c", "group", "topic")
    found = list(text.documents(["a", "  ", kept, {"text": "d", "topic": "t", "form": "f"}]))
    assert [d.text for d in found] == ["a", "c", "d"]
    assert found[1] is kept
    assert found[2].group == "t\tf"
    assert found[0].group == next(text.documents(["a"])).group != next(text.documents(["b"])).group


def test_local_files_of_each_kind_are_read_alike(tmp_path):
    texts = ["First, with ünïcode.", "Second\nover two lines."]
    rows = [{"body": t, "topic": "x"} for t in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet"):
        assert [d.text for d in text.documents(tmp_path / name, column="body")] == texts, name
    assert next(text.documents(tmp_path / "a.parquet", column="body")).topic == "x"
    assert len(list(text.documents(str(tmp_path / "*.jsonl*"), column="body"))) == 4
    assert len(list(text.documents(tmp_path, column="body"))) == 10


def test_files_of_a_glob_come_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.txt").write_text("d")
    assert [d.text for d in text.documents(str(tmp_path / "*.txt"))] == ["a", "b", "c"]
    assert len(list(text.documents(str(tmp_path / "**" / "*.txt")))) == 4


def test_a_dataset_is_streamed_from_its_train_split(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, config, **options):
        asked.update(path=path, config=config, **options)
        return iter([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d.text for d in text.documents("Salesforce/wikitext:wikitext-2-v1")] == ["one", "two"]
    assert asked == dict(path="Salesforce/wikitext", config="wikitext-2-v1", split="train", streaming=True)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) > 20
    return message


@pytest.mark.parametrize("source", ["nowhere.txt", "nowhere/*.jsonl", "/nowhere", "./no.parquet"])
def test_a_missing_file_is_an_error_before_anything_is_read(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file") as error:
        text.documents(source)
    assert source in one_line(error)


def test_a_name_that_is_neither_file_nor_dataset_is_one_line(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist.\nMore.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="no/such: neither a file here nor a dataset") as error:
        next(text.documents("no/such"))
    one_line(error)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_is_an_error_that_names_the_columns(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text('{"content": "x", "id": 3}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"content": "x", "id": 3}]), path)
    with pytest.raises(UserError, match="no column 'text'.*'content', 'id'") as error:
        next(text.documents(path))
    one_line(error)
    with pytest.raises(UserError, match="holds int"):
        next(text.documents(path, column="id"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"not parquet at all", "not readable as parquet"),
        ("a.parquet", b"", "not readable as parquet"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 is not JSON"),
        ("a.txt", b"\xff\xfe broken \x80", "cannot be read as UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.jsonl", b'{"text": "  "}\n', "holds no text"),
        ("a.jsonl", b"[1, 2]\n", "a document is list"),
        ("a.csv", b"text\nx\n", "not one of .txt"),
    ],
)
def test_a_file_that_gives_no_text_is_one_line_with_its_name(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        list(text.documents(path))
    assert name in one_line(error)


def test_a_cut_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": t} for t in passages(500, 30)]), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not readable as parquet"):
        list(text.documents(path))


def test_empty_text_in_memory_is_an_error():
    with pytest.raises(UserError, match="holds no text"):
        list(text.documents([""]))
    with pytest.raises(UserError, match="a document is int"):
        list(text.documents([3]))


# ---- held out ------------------------------------------------------------------------------------------


def test_held_out_and_train_are_disjoint_by_group_and_complete():
    found = [Document(f"text {i}", f"group {i % 400}") for i in range(2000)]
    train = list(text.select(found, 0.1, "train"))
    held = list(text.select(found, 0.1, "held_out"))
    assert len(train) + len(held) == 2000
    assert not {d.group for d in train} & {d.group for d in held}
    assert 0.05 < len({d.group for d in held}) / 400 < 0.15  # 0.1 ± 3.3 standard errors
    wider = {d.group for d in text.select(found, 0.3, "held_out")}
    assert {d.group for d in held} <= wider


def test_the_split_is_the_same_on_every_machine_and_day():
    parts = [text.part_of(Document("", f"group {i}"), 0.5) for i in range(8)]
    assert "".join(part[0] for part in parts) == "hthhthtt"


def test_no_share_holds_out_nothing_and_a_wrong_share_is_an_error():
    found = [Document("a", "a"), Document("b", "b")]
    assert list(text.select(found, 0.0, "train")) == found
    with pytest.raises(UserError, match="held_out: 1.5"):
        text.select(found, 1.5, "train")


def test_a_lone_surrogate_a_byte_order_mark_and_deep_nesting_are_dealt_with(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\ud800b", "topic": "\\udc00"}\n{"text": "\\ud83d\\ude42\\u2028x"}\n')
    first, second = text.documents(path)
    assert (first.text, first.topic, second.text) == ("a\ufffdb", "\ufffd", "🙂\u2028x")
    assert [d.text for d in text.documents(["\ud800", Document("x\udfff", "g")])] == ["\ufffd", "x\ufffd"]
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON") as error:
        next(text.documents(path))
    one_line(error)


def test_names_of_columns_are_shown_without_their_control_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tex\\u001b[31m\\n": "x"}\n')
    with pytest.raises(UserError, match="no column 'text'") as error:
        next(text.documents(path))
    one_line(error)
    assert "\x1b" not in str(error.value) and "?." not in str(error.value)


# ---- chats, ready-made ids, mixtures, slices -----------------------------------------------------------------

CHAT = [{"role": "user", "content": "Where is the bridge?"}, {"role": "assistant", "content": "In San Francisco."}]


def counted(texts, tokenizer, context=64, **options):
    noted = []
    packer = text.pack(texts, tokenizer, context, note=noted.append, **options)
    return all_rows(packer), packer, noted


def test_a_chat_is_read_through_the_template_and_its_marks_do_not_count(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    rows, packer, (document,) = counted(text.documents(tmp_path / "a.jsonl", "text,messages"), tokenizer)
    assert document.text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "<|im_start|>user\nWhere is the bridge?<|im_end|>" in document.text
    read = tokenizer.decode(rows.tokens[0][: int((rows.doc[0] >= 0).sum())])
    assert read == document.text
    counts = tokenizer.batch_decode([[i] for i in rows.tokens[rows.mask].tolist()])
    assert " bridge" in counts and not {"<|im_start|>", "<|im_end|>"} & set(counts)
    assert packer.counts["special"] > 0


def test_the_other_spelling_of_chats_is_read_too(tokenizer):
    other = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]
    one, two = (next(text.tokenized(text.documents([{"c": chat}], "c"), tokenizer)) for chat in (CHAT, other))
    assert one.text == two.text and one.tokens == two.tokens and one.group == two.group


@pytest.mark.parametrize(
    "chat,says",
    [
        ([{"role": "user"}], "a message with 'role', expected 'role' and 'content'"),
        ([{"text": "a"}], "a message with 'text'"),
        ({"a": 1}, "holds dict"),
        ([1.5, 2.5], "holds list"),
        ([[1, 2]], "holds list"),
    ],
)
def test_what_is_neither_text_nor_chat_nor_ids_is_one_line(chat, says):
    with pytest.raises(UserError, match=says) as caught:
        list(text.documents([{"text": chat}]))
    assert "\n" not in str(caught.value)


def test_a_chat_needs_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="a chat, and this host's tokenizer has no chat template"):
        list(text.tokenized(text.documents([{"text": CHAT}]), tokenizer))


def test_ready_made_ids_are_taken_as_they_are_and_their_text_is_known(tokenizer, tmp_path):
    texts = [SENTENCE, " ".join(WORDS[::-1])]
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    table = pyarrow.table({"input_ids": ids})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, _, noted = counted(text.documents(tmp_path / "a.parquet", "input_ids"), tokenizer)
    plain, _, _ = counted(texts, tokenizer)
    assert torch.equal(rows.tokens, plain.tokens) and torch.equal(rows.mask, plain.mask)
    assert [document.text for document in noted] == texts


def test_ids_of_another_tokenizer_are_refused(tokenizer):
    ids = tokenizer(SENTENCE * 3, add_special_tokens=False).input_ids
    for foreign in ([i + 1 for i in ids], [(i * 7919) % 40_000 for i in ids]):
        with pytest.raises(UserError, match="token ids are not of this host's tokenizer: .* pairs come back"):
            list(text.tokenized(text.documents([{"text": foreign}]), tokenizer))
    with pytest.raises(UserError, match="beyond this tokenizer's"):
        list(text.tokenized(text.documents([{"text": [*ids, len(tokenizer)]}]), tokenizer))


@pytest.mark.parametrize("wrong", [-5, 10**30, 49_153])
def test_an_id_that_no_tokenizer_has_is_named(tokenizer, wrong):
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    with pytest.raises(UserError, match=f"token {wrong:,} is beyond this tokenizer's"):
        list(text.tokenized(text.documents([{"text": ids}] * 20 + [{"text": [*ids, wrong]}]), tokenizer))


def test_foreign_ids_behind_short_documents_are_found(tokenizer):
    short = [{"text": tokenizer("Hello there", add_special_tokens=False).input_ids}] * 16
    foreign = [{"text": [(i * 7919 + n) % 40_000 for i in range(60)]} for n in range(20)]
    with pytest.raises(UserError, match="not of this host's tokenizer"):
        list(text.tokenized(text.documents(short + foreign), tokenizer))


def test_arrays_of_ids_are_read_as_lists_are(tokenizer):
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    for array in (torch.tensor(ids), torch.tensor(ids).numpy()):
        (document,) = text.tokenized(text.documents([{"text": array}]), tokenizer)
        assert list(document.tokens) == ids


def test_a_beginning_that_ids_bring_is_not_doubled(tokenizer):
    begins = WithBegin(tokenizer)
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    brought, _, _ = counted(text.documents([{"text": [1, *ids]}]), begins)
    plain, _, _ = counted([SENTENCE], begins)
    assert torch.equal(brought.tokens, plain.tokens)


def test_a_mixture_gives_each_source_its_share_of_the_tokens_at_every_moment(tokenizer):
    sources = {name: text.documents(passages(400, n, seed=n)) for name, n in (("short", 10), ("long", 60))}
    read = {name: text.tokenized(found, tokenizer) for name, found in sources.items()}
    tokens = {"short": 0, "long": 0}
    for i, document in enumerate(text.mixed(read, {"short": 3, "long": 1})):
        tokens[document.source] += len(document.tokens)
        if i > 20:
            assert abs(tokens["short"] - 3 * tokens["long"]) <= 3 * 600
    assert tokens["short"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.03)
    assert i < 799, "it ended when the source that was due had no more"


def test_only_positions_of_the_slice_count(tokenizer):
    whole, _, _ = counted(passages(40, 30), tokenizer)
    rows, packer, _ = counted(passages(40, 30), tokenizer, positions=(4, 9))
    assert torch.equal(rows.mask, whole.mask & (rows.pos >= 4) & (rows.pos < 9)) and bool(rows.mask.any())
    counts = packer.counts
    assert counts["positions"] - int(rows.mask.sum()) == sum(
        counts[k] for k in ("padding", "special", "first", "sliced")
    )


def test_documents_are_noted_in_the_order_of_their_numbers(tokenizer):
    rows, _, noted = counted(passages(700, 20), tokenizer)
    r = int((rows.doc >= 0).sum(1).argmax())
    number = int(rows.doc[r, 0])
    first = tokenizer.decode(rows.tokens[r][rows.doc[r] == number])
    assert noted[number].text == first and len(noted) == 700
