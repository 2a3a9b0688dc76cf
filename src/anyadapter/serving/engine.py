"""The engine: one frozen model, its pool, and the loop that decides, computes and chooses, one forward pass a step.

Sheng et al. 2023, S-LoRA, arXiv 2311.03285. The model is any causal language model of transformers whose family is
registered; it is run through its own modules, on the tokens of all requests laid flat.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyadapter.core.attach import check_name
from anyadapter.core.errors import AnyAdapterError, RequestError, TargetError
from anyadapter.core.host import Host, device_of
from anyadapter.serving.batch import Sequences
from anyadapter.serving.checks import check_combination, check_model, end_tokens
from anyadapter.serving.fused import can_fuse
from anyadapter.serving.graphs import Decoder
from anyadapter.serving.kernels import kernels_for
from anyadapter.serving.loop import trace
from anyadapter.serving.mixed import Mixed, MixedConfig
from anyadapter.serving.policies import policy_named
from anyadapter.serving.pool import Pool
from anyadapter.serving.request import Output, Request
from anyadapter.serving.residents import Resident, Residents
from anyadapter.serving.sampling import Choice, Sampler, choose
from anyadapter.serving.scheduler import Limits, Scheduler
from anyadapter.serving.settings import EngineSettings
from anyadapter.serving.store import AdapterStore, Registered
from anyadapter.serving.tables import Uses, bounds
from anyadapter.serving.text import TextStream
from anyadapter.serving.threads import helper

__all__ = ["Engine", "EngineSettings"]
logger = logging.getLogger(__name__)

GUEST = "serving"  # the name under which the engine is attached to the model
TOLERANCE = 0.02  # of the check at the start, relative to the spread of the logits
UNBOUNDED = 1 << 30  # tokens, for a model that names no limit
AHEAD = 16  # adapters read ahead of need at most


@dataclass(eq=False)
class Sequence:
    """A running request's place in the pool and what comes out of it.

    Attributes:
        cells: the prefix's, then its own, one for each token computed; the rest of the array is not yet taken.
        used: how many cells are in use.
        prefix: how many of them belong to the adapter.
        shift: added to its positions.
    """

    request: Request
    uses: Uses
    cells: np.ndarray
    used: int
    prefix: int
    shift: int
    text: TextStream | None = None


@dataclass
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Serves requests for one model and thousands of adapters. Not thread-safe: one thread owns it.

    Args:
        model: a causal language model of transformers, in evaluation mode; the engine is attached to it until ``close``.
        tokenizer: its tokenizer; None gives outputs without text.
        settings: limits.
        clock: seconds; the requests' ``arrival`` and ``deadline`` are on it.

    Raises:
        AttachError: another engine is attached to the model.
        TargetError: the model cannot be served: its family is not registered, its attention has parts the engine does not
            know, or a first pass does not agree with the model's own.
    """

    Store: type[AdapterStore] = AdapterStore

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        settings: EngineSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        self.settings = settings = settings or EngineSettings()
        self.host = Host.of(model)
        check_name(self.host, GUEST)
        check_model(model, self.host)
        self.device, self.dtype = device_of(model), next(model.parameters()).dtype
        config = model.config.get_text_config()
        limits = settings.max_context, getattr(config, "max_position_embeddings", None)
        self.max_context = min(filter(None, limits), default=UNBOUNDED)
        self.eos = end_tokens(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        reference = self.probe()
        self.mixed = self.make_guest()
        width = self.mixed.heads * self.mixed.dim
        cell_bytes = self.mixed.layers * 2 * width * self.dtype.itemsize
        cells = settings.cells or settings.pool_bytes // cell_bytes
        self.pool = Pool(self.mixed.layers, cells, width, self.dtype, self.device)
        self.mixed.connect(self.pool, kernels_for(self.device, self.dtype))
        self.store = self.make_store(width, cells - 1)
        self.residents = Residents(self.pool)
        rows = Limits(
            cells=cells,
            max_running=settings.max_running,
            batch_tokens=max(settings.step_tokens, self.max_context),
            step_tokens=settings.step_tokens,
            max_waiting=settings.max_waiting,
        )
        self.scheduler = Scheduler(rows, lambda id: self.held[id].cells, policy_named(settings.policy))
        self.held: dict[str, Registered] = {}  # adapters of requests in hand, by identity
        self.holders: dict[str, int] = {}
        self.requests: dict[str, Request] = {}  # in hand: waiting and running
        self.sequences: dict[str, Sequence] = {}
        self.samplers: dict[str, Sampler] = {}
        self.reader = helper("adapters") if settings.read_ahead else None
        self.reading: dict[str, Future[Tensor]] = {}
        self.counters = Counters()
        self.outputs: list[Output] = []  # made, and not yet given
        self.mixed.name = GUEST
        self.decoder = self.make_decoder()
        if settings.pack and can_fuse(self.device, self.dtype):
            self.mixed.fuse()
        self.host.install(self.mixed)
        try:
            self.check(reference)
        except BaseException:
            self.close()
            raise

    def make_guest(self) -> Mixed:
        """What computes the adapters' part of a pass."""
        return Mixed(MixedConfig(), self.host)

    def make_decoder(self) -> Decoder | None:
        """What computes passes in which each request has one new token, where there is something faster for them."""
        on = self.settings.graphs and self.device.type == "cuda"
        return Decoder(self.mixed, self.call, self.settings.max_running) if on else None

    def make_store(self, width: int, max_cells: int) -> AdapterStore:
        """Where adapters are registered."""
        settings = self.settings
        return self.Store(
            self.host,
            self.mixed.layers,
            width,
            self.dtype,
            root=settings.adapters,
            max_rank=settings.max_rank,
            max_cells=max_cells,
            keep=settings.keep,
        )

    # ------------------------------------------------------------------ what users call

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served: empty, beyond the context or the pool, adapters that cannot be combined.
            UnknownAdapterError: an adapter it names is not registered.
            BusyError: too many wait.
        """
        if request.id in self.requests:
            raise RequestError(f"A request {request.id!r} is in hand already.", "id")
        if not request.prompt:
            raise RequestError("The prompt is empty; give at least one token.", "prompt")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise RequestError(f"A token of the prompt is not among the model's {vocabulary}.", "prompt")
        if request.sampling.stop and self.tokenizer is None:
            raise RequestError("Texts that stop the output need a tokenizer, which this engine was not given.", "stop")
        found = [self.store.get(name) for name in request.adapters]
        check_combination(found, list(request.adapters.values()))
        total = (
            len(request.prompt) + request.sampling.max_tokens + sum(r.packing.prefix for r in found if r.packing.shift)
        )
        if total > self.max_context:
            raise RequestError(
                f"The prompt has {len(request.prompt)} tokens and max_tokens is {request.sampling.max_tokens}; together "
                f"they may be {self.max_context}.",
                "max_tokens" if len(request.prompt) < self.max_context else "prompt",
            )
        request.held = tuple(registered.id for registered in found)
        for registered in found:
            self.held[registered.id] = registered
            self.holders[registered.id] = self.holders.get(registered.id, 0) + 1
        try:
            for registered in found:
                self.mixed.cover(registered.packing)
            self.scheduler.submit(request)
        except BaseException:
            self.drop(request.held)
            raise
        self.requests[request.id] = request

    def cancel(self, id: str) -> None:
        """End a request now; its cells are free on return. An unknown id is ignored."""
        if id in self.requests:
            self.end(self.requests[id], "cancel")

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Decide, compute one forward pass, choose tokens. Requests that fail end with an error; the others go on.

        What was made before an unforeseen error is not lost: :meth:`take` gives it, and so does the next step.
        """
        plan = self.scheduler.plan(self.clock())
        for request in plan.aborted:
            self.end(request, "abort")
        for request in plan.admitted:
            self.start(request)
        for id in plan.prefetch:
            self.read_ahead(self.held[id])
        pieces = [(self.sequences[r.id], n) for r, n in plan.prefill if r.id in self.sequences]
        pieces += [(self.sequences[r.id], 1) for r in plan.decode if r.id in self.sequences]
        if pieces:
            # Neighbours with the same adapters share their reading of them.
            pieces.sort(key=lambda piece: [(resident.id, weight) for resident, weight in piece[0].uses])
            try:
                logits = self.forward(pieces)
            except (RuntimeError, TargetError) as error:
                self.failed(pieces, error)
                return self.take()
            rows = [row for row, (s, _) in enumerate(pieces) if s.request.computed == s.request.length]
            self.advance([pieces[row][0] for row in rows], logits[rows] if len(rows) < len(pieces) else logits)
            self.counters.steps += 1
        return self.take()

    def take(self) -> list[Output]:
        """The outputs not yet given, in order."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def stats(self) -> dict[str, float]:
        """What is going on, as numbers."""
        return {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "cells": self.pool.cells,
            "cells_free": self.pool.left,
            "cells_adapters": self.residents.cells,
            "cells_sequences": sum(s.used - s.prefix for s in self.sequences.values()),
            "adapters": len(self.store.by_name),
            "adapters_resident": len(self.residents.by_id),
            "adapter_hits": self.residents.hits,
            "adapter_misses": self.residents.misses,
            "adapter_evictions": self.residents.evictions,
            "steps": self.counters.steps,
            "prompt_tokens": self.counters.prompt_tokens,
            "output_tokens": self.counters.output_tokens,
            **{f"finished_{reason}": n for reason, n in self.counters.finished.items()},
        }

    def check_integrity(self) -> None:
        """Assert that every cell has exactly one owner, and that every request waits or runs."""
        owned = [r.cells for r in self.residents.by_id.values()]
        owned += [s.cells[s.prefix : s.used] for s in self.sequences.values()]
        cells = np.concatenate([np.flatnonzero(self.pool.free), *owned])
        assert len(cells) == self.pool.cells == len(np.unique(cells)), "a cell was lost or has two owners"
        assert self.pool.left == self.pool.free.sum(), "the count of free cells is wrong"
        running = [id for s in self.sequences.values() for id in s.request.held]
        assert dict(self.residents.users) == {id: running.count(id) for id in set(running)}, "users are miscounted"
        assert self.requests.keys() == self.scheduler.queue.keys() | self.scheduler.rows.keys(), "a request was lost"

    def close(self) -> None:
        """Take the engine off the model, which is then what it was."""
        if self.reader is not None:
            self.reader.shutdown(cancel_futures=True)
        if self.host.adapters.get(GUEST) is self.mixed:
            self.host.remove(self.mixed)
            self.mixed.placements.clear()  # they hold the second copy of the weights, in a circle that is long to be found

    # ------------------------------------------------------------------ requests and their cells

    def start(self, request: Request) -> None:
        """Give an admitted request its adapters. Whatever fails here ends this request alone."""
        uses: list[tuple[Resident, float]] = []
        try:
            for id, weight in zip(request.held, request.adapters.values()):
                registered = self.held[id]
                pack = partial(self.packed, registered)
                resident = self.residents.load(id, registered.packing, registered.scale, pack)
                self.residents.use([id])
                uses.append((resident, weight))
            self.sequences[request.id] = self.sequence(request, tuple(uses))
        except Exception as error:
            self.residents.leave(resident.id for resident, _ in uses)
            logger.warning("a request could not be started: %s", trace(error))
            known = isinstance(error, AnyAdapterError)
            self.end(request, "error", str(error) if known else f"It could not be started ({type(error).__name__}).")

    def sequence(self, request: Request, uses: Uses) -> Sequence:
        """A request's place, of which only the prefixes of its adapters are taken."""
        prefixed = [resident for resident, _ in uses if resident.packing.prefix]
        prefix = np.concatenate([np.empty(0, np.int32), *(r.cells[: r.packing.prefix] for r in prefixed)])
        cells = np.zeros(len(prefix) + len(request.prompt) + request.sampling.max_tokens, dtype=np.int32)
        cells[: len(prefix)] = prefix
        shift = sum(r.packing.prefix for r in prefixed if r.packing.shift)
        text = TextStream(self.tokenizer, request.sampling.stop) if self.tokenizer is not None else None
        return Sequence(request, uses, cells, used=len(prefix), prefix=len(prefix), shift=shift, text=text)

    def end(self, request: Request, reason: str, message: str = "", **what: Any) -> None:
        """Give back all that a request holds and, unless it was cancelled, tell. One that has ended is left alone."""
        if self.requests.pop(request.id, None) is None:
            return
        self.scheduler.remove(request.id)
        request.finish = reason
        sequence = self.sequences.pop(request.id, None)
        self.samplers.pop(request.id, None)
        if sequence is not None:
            self.pool.release(sequence.cells[sequence.prefix : sequence.used])
            self.residents.leave(request.held)
        self.drop(request.held)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        if reason != "cancel":
            self.outputs.append(Output(request.id, finish=reason, message=message, **what))

    def drop(self, ids: Iterable[str]) -> None:
        """A request in hand no longer needs these adapters."""
        for id in ids:
            self.holders[id] -= 1
            if not self.holders[id]:
                registered = self.held.pop(id)
                del self.holders[id]
                self.reading.pop(id, None)
                if self.store.by_name.get(registered.name) is not registered and id in self.residents.by_id:
                    self.residents.evict(id)  # unloaded or replaced meanwhile: nobody can ask for it again

    def read_ahead(self, registered: Registered) -> None:
        """Have a waiting request's adapter read from its file by the time it is admitted."""
        id = registered.id
        if self.reader is None or id in self.residents.by_id or id in self.reading or len(self.reading) >= AHEAD:
            return
        self.reading[id] = self.reader.submit(self.store.pack, registered)

    def packed(self, registered: Registered) -> Tensor:
        """An adapter's cells, read ahead or now."""
        future = self.reading.pop(registered.id, None)
        return future.result() if future is not None else self.store.pack(registered)

    # ------------------------------------------------------------------ the pass

    def forward(self, pieces: list[tuple[Sequence, int]]) -> Tensor:
        """Compute the next n tokens of each sequence; the logits after each piece: (pieces, vocabulary)."""
        tokens: list[int] = []
        counts = [count for _, count in pieces]
        slots = self.residents.alloc(sum(counts))
        positions, seen = [], []
        for (sequence, count), new in zip(pieces, np.split(slots, np.cumsum(counts)[:-1])):
            request, start = sequence.request, sequence.request.computed
            sequence.cells[sequence.used : sequence.used + count] = new
            sequence.used += count
            request.computed += count
            known = len(request.prompt)
            self.counters.prompt_tokens += count if start < known else 0
            tokens += request.prompt[start : start + count] if start < known else [request.output[start - known]]
            positions.append(np.arange(start, start + count) + sequence.shift)
            seen.append(sequence.cells[: sequence.used])
        if self.decoder is not None and max(counts) == 1:
            uses = [sequence.uses for sequence, _ in pieces]
            logits = self.decoder.run(uses, tokens, np.concatenate(positions), slots, seen)
            if logits is not None:
                return logits
        sequences = Sequences(
            tokens=self.tensor(bounds(counts)),
            starts=self.tensor(bounds([len(cells) for cells in seen])),
            cells=self.tensor(np.concatenate(seen)),
            longest=(max(len(cells) for cells in seen), max(counts)),
        )
        self.mixed.begin(
            [(sequence.uses, count) for sequence, count in pieces],
            sequences,
            self.tensor(slots.astype(np.int64)),
        )
        last = self.tensor(bounds(counts)[1:].astype(np.int64) - 1)
        try:
            return self.call(
                self.tensor(np.array(tokens, dtype=np.int64)), self.tensor(np.concatenate(positions)), last
            )
        finally:
            self.mixed.now = None

    def failed(self, pieces: list[tuple[Sequence, int]], error: Exception) -> None:
        """Undo a pass that broke. Short of memory, its largest piece is given up; otherwise all of it."""
        for sequence, count in pieces:
            self.pool.release(sequence.cells[sequence.used - count : sequence.used])
            sequence.used -= count
            sequence.request.computed -= count
        given_up = [sequence.request for sequence, _ in pieces]
        if isinstance(error, torch.OutOfMemoryError):
            given_up = [max(pieces, key=lambda piece: piece[1])[0].request]
        logger.error("a pass of %d requests failed, %d are given up: %s", len(pieces), len(given_up), trace(error))
        kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        for request in given_up:
            self.end(request, "error", f"The model could not compute this request ({kind}).")

    def call(self, tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Run the model on flat tokens: the logits at ``last``, (n, vocabulary)."""
        # A mask of four dimensions is taken as it is: none is made, and our attention does not look at it.
        mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        keep = {"logits_to_keep": last} if self.keeps_logits else {}
        out = self.model(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=mask, use_cache=False, **keep
        )
        return out.logits[0] if self.keeps_logits else out.logits[0, last]

    def advance(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose the next token of each sequence and end those that are done. Logits: (sequences, vocabulary)."""
        choices = self.choose(logits, [s.request for s in sequences]) if sequences else []
        for sequence, choice in zip(sequences, choices):
            request = sequence.request
            if choice.token is None:
                self.end(request, "error", "The model gave numbers that are not finite.")
                continue
            request.output.append(choice.token)
            self.counters.output_tokens += 1
            sampling = request.sampling
            stops = choice.token in sampling.stop_token_ids or (choice.token in self.eos and not sampling.ignore_eos)
            text, stopped = "", False
            if sequence.text is not None and not stops:
                text, stopped = sequence.text.push([choice.token])
            reason = "stop" if stops or stopped else "length" if not request.remaining else None
            if sequence.text is not None and reason and not stopped:
                text += sequence.text.flush()
            what: dict[str, Any] = {"tokens": (choice.token,), "text": text, "logprobs": choice.logprobs}
            if reason:
                self.end(request, reason, **what)
            else:
                self.outputs.append(Output(request.id, **what))

    def choose(self, logits: Tensor, requests: list[Request]) -> list[Choice]:
        """The next token of every request."""
        return choose(logits.float(), requests, self.samplers)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    # ------------------------------------------------------------------ the check at the start

    @torch.inference_mode()
    def probe(self) -> tuple[Tensor, Tensor]:
        """A few tokens and the model's own logits after them."""
        generator = torch.Generator().manual_seed(0)
        size = self.model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(size, (min(12, self.max_context),), generator=generator).to(self.device)
        return tokens, self.model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()

    @torch.inference_mode()
    def check(self, reference: tuple[Tensor, Tensor]) -> None:
        """Compare passes over the pool, in three pieces, the last of one token, with the model's own."""
        tokens, expected = reference
        request = Request("check", tuple(tokens.tolist()))
        sequence = Sequence(request, (), np.zeros(len(tokens), np.int32), 0, 0, 0)
        cut = len(tokens) // 2
        try:
            for count in filter(None, (cut, len(tokens) - cut - 1, 1)):
                logits = self.forward([(sequence, count)])
        finally:
            self.pool.release(sequence.cells[: sequence.used])
        error = (logits[0].float() - expected).abs().max() / expected.std()
        if not error < (TOLERANCE if self.dtype.itemsize >= 4 else 20 * TOLERANCE):
            raise TargetError(
                f"Run by the engine, {self.host.describe()} gives other logits than by itself (off by {error:.2g} of their "
                "spread): its attention or positions work in a way the engine does not know."
            )
