"""What a user sees when training meets a fault, as it is printed; asserts that the run then ends as an undisturbed one.

    python experiments/train_faults.py > faults.md

Known features in memory (tests/training/test_training.py), faults made on purpose in this process. Every row of the
table is a test too: tests/training/test_faults.py, tests/test_resume.py, tests/training/test_log.py.
"""

import errno
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sae import files
from sae.activations import batches
from sae.errors import Stopped, UserError
from sae.run import train
from sae.sources import SAMPLE
from sae.training import checkpoint
from sae.training.dead import Dead
from tests.training.test_training import planted, recipe

STEP = 40


@contextmanager
def in_step(act: Callable[[], Any]) -> Iterator[None]:
    """Something happens in step STEP."""
    count, calls = Dead.count_, []

    def counting(self, codes, fired=None):
        calls.append(0)
        if len(calls) == STEP:
            act()
        count(self, codes, fired)

    with mock.patch.object(Dead, "count_", counting):
        yield


def raises(error: BaseException) -> Callable[..., Any]:
    def act(*args, **kwargs):
        raise error

    return act


@contextmanager
def breaking_source(error: BaseException) -> Iterator[None]:
    shuffled = batches.shuffled

    def some(*args, **kwargs):
        for i, one in enumerate(shuffled(*args, **kwargs)):
            if i == STEP:
                raise error
            yield one

    with mock.patch.object(batches, "shuffled", some):
        yield


@contextmanager
def full_disk(name: str) -> Iterator[None]:
    """Writing a file of this name fails from the third time on."""
    real, met = files.write_blocks, []

    def write(path, blocks):
        if Path(path).name == name:
            met.append(0)
            if len(met) > 2:
                with files.atomic_file(path):
                    raise OSError(errno.ENOSPC, "No space left on device")
        real(path, blocks)

    with mock.patch.object(files, "write_blocks", write):
        yield


def main() -> None:
    logging.disable(logging.CRITICAL)
    x, _ = planted(SAMPLE + 4000)
    unseen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[SAMPLE:]
    bad = x.clone()
    bad[unseen] = float("nan")
    out_of_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9663676416 bytes.")
    faults = {
        "Ctrl-C": (in_step(lambda: os.kill(os.getpid(), signal.SIGINT)), x),
        "SIGTERM": (in_step(lambda: os.kill(os.getpid(), signal.SIGTERM)), x),
        "disk full while a checkpoint is written": (full_disk("training.safetensors"), x),
        "disk full under metrics.jsonl": (in_step(lambda: mock_lines(raises(UserError(NO_SPACE)))), x),
        "the store cannot be read": (breaking_source(OSError(errno.EIO, "Input/output error")), x),
        "the store is gone": (breaking_source(UserError("runs/acts/shard-00003.safetensors: is missing.")), x),
        "no memory in a step": (in_step(raises(out_of_memory)), x),
        "NaN in three batches in a row": (nullcontext(), bad),
    }
    print("| fault | code | what the user sees | afterwards |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        whole = train(recipe(Path(folder) / "whole", tokens=30_000), x, progress=False)
        for number, (name, (fault, rows)) in enumerate(faults.items()):
            made = recipe(f"runs/{number}", tokens=30_000, save_every=1e-9)
            os.chdir(folder)
            try:
                with fault:
                    train(made, rows, progress=False)
                raise AssertionError(f"{name}: nothing was seen")
            except Stopped as stopped:
                code, line = stopped.code, str(stopped)
            except UserError as error:
                code, line = 2, str(error)
            for one in checkpoint.all_of(Path(made.out)):
                files.read_safetensors(one / "training.safetensors")
            if rows is x:
                again = train(made, x, progress=False, resume=True)
                assert torch.equal(again.W_dec, whole.W_dec), name
                then = "resumed: same bits"
            else:
                then = "checkpoints load"
            print(f"| {name} | {code} | `{line}` | {then} |", flush=True)


NO_SPACE = "runs/3/metrics.jsonl: no space left to write it (0.0 MB free). Nothing was changed there; free some space."


def mock_lines(add: Callable[..., Any]) -> None:
    """From now on no line can be added, until the process's next run."""
    real = files.Lines.add

    def once(self, value):
        files.Lines.add = real
        add(self, value)

    files.Lines.add = once


if __name__ == "__main__":
    main()
