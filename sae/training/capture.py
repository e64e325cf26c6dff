"""A training step as one CUDA graph: objective, update and the count of what fired, launched at once, never waited for.

The graph reads its batch, the learning rate and Adam's step from fixed places on the device. What a graph cannot do is
take shapes from data: AuxK works on the dead features, whose number varies. So each graph has room for so many, the
dead are listed afresh in every step (from another place on each time, where there are more than fit), and the host
picks the graph: every EVERY steps it looks at a count that the device sent EVERY steps before, which by then is there.

Differs from the eager step only so: features that died in the last 2·EVERY steps may have to wait for a graph with
room. Objectives whose shapes or coefficients change (BatchTopK's number of kept entries, thresholds, penalties with a
schedule) are learnt eagerly, with the same kernels and a few waits a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels import Work, triton
from sae.objectives.revive import LIMIT, listed, most
from sae.objectives.terms import Losses, Objective, Params
from sae.training.dead import Dead
from sae.training.loop import Learn, learn
from sae.training.optimizer import RowAdam

if TYPE_CHECKING:
    from jaxtyping import Float

ARCHITECTURES = ("topk",)
EVERY = 16
ROOMS = (0, 256, 1024, 4096, LIMIT)
"""Dead features that a graph has room for; one graph each, made when it is first needed."""


def learner(architecture: str, params: Params, objective: Objective, optimizer: RowAdam, dead: Dead) -> Learn:
    """How this SAE learns from one batch a step: captured where its device and architecture allow it."""
    if architecture in ARCHITECTURES and triton.takes(params.encoder):
        return Captured(params, objective, optimizer, dead)
    return partial(learn, params, objective, optimizer, dead)


class Captured:
    """`loop.Learn` on CUDA, of one batch a step. Its answers are overwritten by the next step.

    The first step with each room runs eagerly (kernels are compiled in it) and counts; the second is captured. On
    other devices every step runs eagerly, in the same words: that is how it is tested without a GPU.
    """

    def __init__(self, params: Params, objective: Objective, optimizer: RowAdam, dead: Dead):
        self.params, self.objective, self.optimizer, self.dead = params, objective, optimizer, dead
        on_gpu = params.b_dec.is_cuda
        self.lr = params.b_dec.new_zeros((), dtype=torch.float64)
        self.x: Tensor | None = None
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Work, Losses] | None] = {}
        """By room; None once its first step has run."""
        self.steps = self.room = 0
        self.count = torch.zeros((), dtype=torch.int64, pin_memory=on_gpu)
        self.sent = torch.cuda.Event() if on_gpu else None

    def __call__(self, xs: Sequence[Float[Tensor, "B d"]], lr: float, share: float) -> tuple[Work, Losses]:
        (x,) = xs
        if self.x is None:
            self.x = torch.empty_like(x, memory_format=torch.contiguous_format)
            for state in self.optimizer.moments.values():  # float64: 1 − 0.999 keeps four digits in float32
                state.step = torch.full_like(self.lr, int(state.step))
        if x.shape != self.x.shape:  # a short batch at the end
            return learn(self.params, self.objective, self.optimizer, self.dead, xs, lr, share)
        if self.steps % EVERY == 0:
            self._choose_room()
        self.steps += 1
        self.x.copy_(x, non_blocking=True)
        self.lr.fill_(lr)
        return self._replay(self.room) if x.is_cuda else self._run(self.x, self.room)

    def _replay(self, room: int) -> tuple[Work, Losses]:
        assert self.x is not None, "the call fills it"
        if room not in self.graphs:
            self.graphs[room] = None
            return self._run(self.x, room)
        captured = self.graphs[room]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            # the prefetch thread pins memory meanwhile, which the default mode would take for part of the capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                work, losses = self._run(self.x, room)
            captured = self.graphs[room] = graph, work, losses
        graph, work, losses = captured
        graph.replay()
        return work, losses

    def _run(self, x: Tensor, room: int) -> tuple[Work, Losses]:
        mask = self.dead.mask()
        room = min(room, len(mask), most(x.shape[1]))
        step = torch.as_tensor(self.optimizer.moments["encoder"].step)
        dead = listed(mask, room, (step * room).long() % len(mask))
        work, losses = self.objective.loss(self.params, x, dead, 0.0)  # type: ignore[arg-type] - AuxK takes a list too
        self.optimizer.update_(work, self.lr, unit_norm=self.objective.unit_norm)
        self.dead.count_(work.codes, losses.fired)
        return work, losses

    def _choose_room(self) -> None:
        """The smallest room with a quarter to spare for the last count that came; and send for the next."""
        if self.sent is not None:
            self.sent.synchronize()  # sent EVERY steps ago, so there is nothing to wait for
        needed = int(self.count) * 5 // 4
        self.room = next((room for room in ROOMS if room >= needed), ROOMS[-1])
        self.count.copy_(self.dead.mask().sum(), non_blocking=True)
        if self.sent is not None:
            self.sent.record()
