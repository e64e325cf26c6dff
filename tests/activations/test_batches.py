"""Shuffled batches: every row once an epoch, exact positions, a mixing guarantee that holds."""

import itertools

import numpy as np
import pytest
import torch

from sae.activations import batches as feed
from sae.errors import UserError


def rows(n=103):
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 3)


def ids(batch):
    return batch.acts["h"][:, 0].long().tolist()


def test_an_epoch_holds_every_row_once():
    stream = feed.shuffled(feed.TensorSource({"h": rows(96)}), 32, seed=0)
    first, second = ([i for b in itertools.islice(stream, 3) for i in ids(b)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != second


def test_resuming_from_a_position_is_exact_across_epochs():
    source = feed.TensorSource({"h": rows()})
    whole = [ids(b) for b in itertools.islice(feed.shuffled(source, 20, seed=3), 12)]
    some = list(itertools.islice(feed.shuffled(source, 20, seed=3), 7))
    rest = [ids(b) for b in itertools.islice(feed.shuffled(source, 20, seed=3, position=some[-1].position), 5)]
    assert [ids(b) for b in some] + rest == whole


def test_another_seed_is_another_order():
    source = feed.TensorSource({"h": rows()})
    assert ids(next(feed.shuffled(source, 20, 0))) != ids(next(feed.shuffled(source, 20, 1)))


def test_a_memory_mapped_array_is_a_source(tmp_path):
    np.save(tmp_path / "acts.npy", rows().numpy())
    source = feed.TensorSource({"h": np.load(tmp_path / "acts.npy", mmap_mode="c")})
    assert sorted(ids(next(feed.shuffled(source, 103, 0)))) == list(range(103))


@pytest.mark.parametrize("acts", [torch.zeros(4), torch.zeros(0, 3), [[1.0]]])
def test_activations_of_a_wrong_shape_are_refused(acts):
    with pytest.raises(UserError, match=r"expected \[N, d\]"):
        feed.TensorSource({"h": acts})


def test_more_sequences_than_rows_in_a_batch_cannot_be_promised():
    with pytest.raises(UserError, match="min_sequences: 4,096 is not below the batch of 4,096"):
        feed.buffer_rows(4096, 4096, 128)


def test_prefetching_changes_nothing_and_hands_errors_on():
    source = feed.TensorSource({"h": rows()})
    plain = [ids(b) for b in itertools.islice(feed.shuffled(source, 20, 0), 6)]
    ahead = feed.prefetched(feed.shuffled(source, 20, 0))
    assert [ids(b) for b in itertools.islice(ahead, 6)] == plain
    ahead.close()

    def broken():
        yield from itertools.islice(feed.shuffled(source, 20, 0), 1)
        raise UserError("the disk went away")

    stream = feed.prefetched(broken())
    next(stream)
    with pytest.raises(UserError, match="the disk went away"):
        next(stream)


def test_a_thread_that_fetches_ahead_leaves_other_threads_their_cores():
    import threading

    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        stream = feed.prefetched(torch.get_num_threads() for _ in range(3))
        assert next(stream) == 1 and torch.get_num_threads() == 2
        stream.close()
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2] and next(feed.prefetched(iter([torch.get_num_threads()]), one_core=False)) == 2
    finally:
        torch.set_num_threads(before)


def test_batches_of_several_hooks_hold_the_same_rows_normed_by_their_own_scale():
    source = feed.TensorSource({"a": rows(96), "b": rows(96).to(torch.bfloat16)[:, :2]})
    batches = feed.normed(feed.shuffled(source, 32, seed=0), {"a": 2.0, "b": 0.5})
    for one in itertools.islice(batches, 4):
        assert one.acts["a"].dtype == one.acts["b"].dtype == torch.float32
        assert torch.equal(one.acts["a"][:, 0] / 2, one.acts["b"][:, 0] * 2) and len(one) == 32
    with pytest.raises(UserError, match="96 of a, 95 of b rows. Give the same rows of every hook"):
        feed.TensorSource({"a": rows(96), "b": rows(95)})


def test_rows_that_are_not_finite_are_noted_by_their_numbers_and_hook():
    acts = {"a": rows(96), "b": rows(96).to(torch.bfloat16)}
    acts["b"][7, 1], acts["b"][50, 0] = float("nan"), float("-inf")
    found = [
        list(one.bad.items())
        for one in feed.checked(itertools.islice(feed.shuffled(feed.TensorSource(acts), 96, 0), 1))
    ]
    assert [(hook, numbers.tolist()) for hook, numbers in found[0]] == [("b", [7, 50])]
    large = {"a": torch.full((4, 3), 3e38)}  # finite, though their sum is not
    assert [one.bad for one in feed.checked(itertools.islice(feed.shuffled(feed.TensorSource(large), 4, 0), 1))] == [{}]
