"""Tensor parallelism: one model over several devices, and its adapters with it (S-LoRA, section 6).

Sheng et al. 2023, S-LoRA, arXiv 2311.03285. Every process runs the same engine on the same requests; each holds its own heads
of keys and values in its pool, and its own part of each adapter. Which linears are divided, and how, is the model's own plan
(``tp_plan`` of transformers). Of a linear W with N processes, T tokens and an adapter of rank r:

    "colwise": W by outputs.    A by rows, r/N each    all-gather (T, r)    B by outputs    beside W's own outputs
    "rowwise": W by inputs.     A by inputs            all-reduce (T, r)    B by outputs    into a slice of W's partial sum

and the one all-reduce of the partial sums that the model needs anyway also brings the slices together. Nothing is held twice,
and the adapters' traffic is O(T r).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyadapter.core.adapter import Adapter
from anyadapter.core.errors import ArtefactError, TargetError
from anyadapter.core.fingerprint import check_fingerprint
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.loop import trace
from anyadapter.serving.mixed import Mixed, MixedConfig, flat
from anyadapter.serving.packing import Block, Packing, Part, dense, plan
from anyadapter.serving.pool import KEYS, VALUES
from anyadapter.serving.request import Output, Request, Sampling
from anyadapter.serving.sampling import Choice
from anyadapter.serving.split import LostError, Split
from anyadapter.serving.store import AdapterStore, Registered
from anyadapter.serving.tables import Products, Uses, Work, bounds

logger = logging.getLogger(__name__)

Command = list[Any]  # what to do, and with what; JSON


# -------------------------------------------------------------------------- an adapter's part

Cut = tuple[slice, slice]  # of a matrix
ALL = slice(None)


@dataclass(eq=False)
class SplitPacking(Packing):
    """How one process's part of an adapter lies in its pool.

    Attributes:
        cuts: which part of each tensor it is; all of those that are not named.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)


class Division:
    """The packing of one process's part, made from the packing of the whole.

    A column-wise site's rows of A are filled up to a multiple of the number of processes with rows of zeros, so that every
    process has as many cells taken.
    """

    def __init__(self, whole: Packing, split: Split) -> None:
        self.whole, self.split, self.size = whole, split, split.size
        self.width = whole.width // split.size
        self.taken: Counter[tuple[int, int]] = Counter()
        for layer in range(whole.layers):
            self.taken[layer, KEYS] = self.taken[layer, VALUES] = whole.prefix
        self.moved: dict[tuple[int, int, int], tuple[Block, Cut | None]] = {}

    def packing(self) -> SplitPacking:
        whole = self.whole
        settings = {
            name: getattr(whole, name) for name in ("layers", "dtype", "prefix", "shift", "rank", "layer_of", "prompt")
        }
        parts = {path: self.part(path, part, whole.layer_of[path]) for path, part in whole.parts.items()}
        made = SplitPacking(**settings, width=self.width, parts=parts, cells=max(self.taken.values()))
        for fill in whole.fills:
            block, cut = self.moved[fill.layer, fill.block.half, fill.block.start]
            made.fills.append(replace(fill, block=block))
            if cut is not None:
                made.cuts[fill.name] = cut
        return made

    def part(self, path: str, part: Part, layer: int) -> Part:
        style, first, second = self.split.styles.get(path), part.first, part.second
        divided = {"colwise": "scale_output", "rowwise": "scale_input"}.get(style or "")
        if style is None or (part.kind.startswith("scale") and part.kind != divided):  # all of it, in every process
            bias = self.move(layer, part.bias) if part.bias is not None else None
            moved = self.move(layer, second) if second is not None else None
            return replace(part, first=self.move(layer, first), second=moved, bias=bias)
        if part.kind == divided:
            cut = (
                (self.own(first.width), ALL) if style == "colwise" else (ALL, self.own(first.width))
            )  # (out, 1), (1, in)
            return replace(part, first=self.move(layer, first, width=first.width // self.size, cut=cut))
        if part.kind != "low_rank" or second is None:
            raise TargetError(
                f"The bottleneck at {path} cannot be served by several processes, which divide this linear."
            )
        rows, width = first.rows, second.width // self.size
        if style == "colwise":
            rows = -(-first.rows // self.size)
            stops = [min(rank * rows, first.rows) for rank in (self.split.rank, self.split.rank + 1)]
            a = self.move(layer, first, rows=rows, cut=(slice(*stops), ALL))
            rows *= self.size
        else:
            a = self.move(layer, first, width=first.width // self.size, cut=(ALL, self.own(first.width)))
        return replace(part, first=a, second=self.move(layer, second, rows, width, (self.own(second.width), ALL)))

    def move(self, layer: int, block: Block, rows: int = 0, width: int = 0, cut: Cut | None = None) -> Block:
        """The block that takes another's place, with as many rows and as wide unless it is said otherwise."""
        rows, width = rows or block.rows, width or block.width
        chunks = -(-width // self.width)
        new = Block(self.taken[layer, block.half], rows, width, chunks, block.half)
        self.taken[layer, block.half] += rows * chunks
        self.moved[layer, block.half, block.start] = new, cut
        return new

    def own(self, total: int) -> slice:
        """This process's share."""
        return slice(self.split.rank * total // self.size, (self.split.rank + 1) * total // self.size)


class SplitStore(AdapterStore):
    """Adapters by name, of which this process keeps its part. Those of the first process are made known to all."""

    split: Split
    tell: Callable[[Command], None]

    def plan(self, adapter: Adapter, bits: dict[str, int]) -> Packing:
        """Quantised matrices are cut, and so lie in the pool as numbers."""
        whole = plan(adapter, self.host, self.layers, self.width * self.split.size, self.dtype)
        if whole.made is not None:
            raise TargetError(
                "A gated prefix is served by one process only: its keys are made by the whole projections."
            )
        return Division(whole, self.split).packing()

    def check_base(self, ours: dict[str, Any]) -> None:
        expected = ours.get("base")
        if expected is not None:
            check_fingerprint(self.host, expected, self.split.fingerprint)

    def read(self, found: Registered) -> dict[str, Tensor]:
        """This process's part of the tensors."""
        packing: Any = found.packing
        parts = {name: dense(whole)[packing.cuts.get(name, ...)] for name, whole in super().read(found).items()}
        if packing.prefix:  # (n, layers · 2 · heads · dim): this process's heads
            prompt = parts[packing.prompt].reshape(packing.prefix, self.layers, 2, self.split.size, self.width)
            parts[packing.prompt] = prompt[..., self.split.rank, :]
        return parts

    def enter(self, found: Registered) -> None:
        where = str(found.folder) if self.root is None else found.folder.name
        self.tell(["enter", found.name, where, found.id, found.checked])
        self.split.agree(lambda: None)
        super().enter(found)

    def follow(self, name: str, folder: str, id: str, check: bool) -> None:
        """What the other processes do when the first one enters an adapter."""

        def prepare() -> Registered:
            found = replace(self.examine(name, folder), id=id)
            if check:
                self.pack(found)
            return found

        try:
            super().enter(self.split.agree(prepare))
        except LostError:
            raise
        except Exception as error:  # the first process tells whoever asked
            logger.warning("adapter %s is refused: %s", name, trace(error))

    def unload(self, name: str) -> Registered:
        found = super().unload(name)
        self.tell(["unload", name])
        return found


# -------------------------------------------------------------------------- the pass


@dataclass(frozen=True)
class Gathered(Products):
    """A column-wise site's products.

    Attributes:
        order: (N,) int64: where each of the activations that ``up`` reads, token by token, is among those of all processes,
            one process after the other.
    """

    order: Tensor | None = None


class SplitMixed(Mixed):
    """The guest of a divided model."""

    split: Split

    def tabulate(self, runs: Sequence[tuple[Uses, int]]) -> dict[str, Work]:
        work = super().tabulate(runs)
        done: dict[int, Work] = {}  # sites that are alike share their tables
        for path, item in work.items():
            if self.split.styles.get(path) == "colwise":
                if id(item) not in done:
                    done[id(item)] = Work([self.gathered(path, p, runs) for p in item.products], item.factors)
                work[path] = done[id(item)]
        return work

    def gathered(self, path: str, item: Products, runs: Sequence[tuple[Uses, int]]) -> Gathered:
        n, pieces, begun, total = self.split.size, [np.empty(0, dtype=np.int64)], 0, item.down.total
        for uses, count in runs:
            parts = [resident.packing.parts[path] for resident, _ in uses if path in resident.packing.parts]
            rows = bounds([part.first.rows for part in parts if part.kind == "low_rank"])
            token = [(np.arange(n)[:, None] * total + np.arange(start, stop)).ravel() for start, stop in pairwise(rows)]
            if token:
                offsets = begun + np.arange(count, dtype=np.int64)[:, None] * rows[-1]
                pieces.append((offsets + np.concatenate(token)).ravel())
            begun += count * int(rows[-1])
        up = replace(
            item.up,
            rows=item.up.rows * n,
            hidden=item.up.hidden * n,
            scale=item.up.scale.repeat_interleave(n),
            total=total * n,
        )
        order = torch.from_numpy(np.concatenate(pieces)).to(up.cells.device)
        return Gathered(item.kind, item.down, up, order=order)

    def add(self, path: str, item: Products, x: Tensor, y: Tensor, layer: int) -> None:
        keys, values = self.pool.half(layer, KEYS), self.pool.half(layer, VALUES)
        x, y = flat(x), flat(y)
        hidden = self.kernels.shrink(x, keys, item.down)
        if isinstance(item, Gathered):
            hidden = self.split.gather(hidden, "adapters")[item.order]
        elif self.split.styles.get(path) == "rowwise":
            hidden = self.split.reduce(hidden, "adapters")
            width = y.shape[1] // self.split.size
            y = y[:, self.split.rank * width : (self.split.rank + 1) * width]
            mine = y.contiguous()
            self.kernels.expand(hidden, mine, values, item.up)
            y.copy_(mine)
            return
        self.kernels.expand(hidden, y, values, item.up)


class SplitEngine(Engine):
    """An engine whose model is divided. The first process is used as any engine; the others call :meth:`follow`.

    The first process decides what is asked and when, and chooses the tokens; it tells the others before each step. All else
    follows in each process by itself.

    A failure that can be agreed costs what it costs in one process: whatever goes wrong in any of them while an adapter is
    registered or a request is started, and an error in a pass that all meet at the same place. An error that one process
    meets alone in the middle of a pass cannot be agreed, as the others are waiting for its next tensor: it ends the group. The
    process that failed raises :class:`LostError` within ``PATIENCE``, the others once it has ended (over gloo; in any case when
    the timeout given to ``torch.distributed`` is over). For commands and tokens they wait as long as the first process lives.

    Args:
        model: as for :class:`Split`; ``torch.distributed`` is initialised.
        settings: the same in every process.
    """

    Store = SplitStore

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        settings: EngineSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.split = Split(model)
        self.commands: list[Command] = []
        self.leads = False
        self.own_clock, self.now = clock, None if self.split.rank == 0 else 0.0
        super().__init__(model, tokenizer, settings=settings, clock=self.read_clock)
        self.leads = self.split.rank == 0

    def make_guest(self) -> Mixed:
        guest = SplitMixed(MixedConfig(), self.host)
        guest.split, guest.heads = self.split, guest.heads // self.split.size
        return guest

    def make_decoder(self) -> None:
        """None: a pass waits for the other processes, and not always on the device."""

    def make_store(self, width: int, max_cells: int) -> AdapterStore:
        store: Any = super().make_store(width, max_cells)
        store.host, store.split, store.tell = self.split.whole, self.split, self.tell
        return store

    def read_clock(self) -> float:
        """During a step, the time at which the first process began it."""
        return self.own_clock() if self.now is None else self.now

    def start(self, request: Request) -> None:
        """As in one process. What can go wrong differs from process to process; those where nothing did give it up too."""
        super().start(request)

        def check() -> None:
            if request.id not in self.sequences:
                raise ArtefactError("It could not be started here.")

        try:
            self.split.agree(check)
        except ArtefactError as error:
            self.end(request, "error", str(error))  # nothing, where it has ended

    def failed(self, pieces: Any, error: Exception) -> None:
        self.split.check_same(error)
        super().failed(pieces, error)

    def choose(self, logits: Tensor, requests: list[Request]) -> list[Choice]:
        choices = super().choose(logits, requests) if self.split.rank == 0 else []
        tokens = torch.tensor([-1 if c.token is None else c.token for c in choices] or [-1] * len(requests))
        self.split.spread(tokens)
        return choices or [Choice(None if token < 0 else token) for token in tokens.tolist()]

    # ------------------------------------------------------------------ the first process

    def tell(self, command: Command) -> None:
        """Send a command, and those that waited, to the other processes."""
        if self.leads:
            self.split.share([*self.commands, command])
            self.commands.clear()

    def submit(self, request: Request) -> None:
        super().submit(request)
        if self.leads:
            asked = {name: getattr(request, name) for name in ("id", "prompt", "arrival", "deadline")}
            self.commands.append(["submit", asked, dict(request.adapters), asdict(request.sampling)])

    def cancel(self, id: str) -> None:
        super().cancel(id)
        if self.leads:
            self.commands.append(["cancel", id])

    def step(self) -> list[Output]:
        """As in one process.

        Raises:
            LostError: the processes no longer do the same. So it is after any error that was not foreseen.
        """
        try:
            if self.leads:
                self.now = self.own_clock()
                self.tell(["step", self.now])
            return super().step()
        except LostError:
            raise
        except Exception as error:
            raise self.split.lose(error) from error
        finally:
            if self.leads:
                self.now = None

    def close(self) -> None:
        with suppress(LostError):  # then the others end by themselves
            self.tell(["close"])
        super().close()

    # ------------------------------------------------------------------ the others

    def follow(self) -> None:
        """Do what the first process does, until it closes its engine.

        Raises:
            LostError: another process is gone, or this one has failed alone. Whatever is raised, these processes no longer do
                the same; let this one end, and the others will notice.
        """
        while True:
            for what, *with_what in self.split.share():
                if what == "close":
                    self.close()
                    return
                self.obey(what, *with_what)

    def obey(self, what: str, *with_what: Any) -> None:
        if what == "submit":
            asked, adapters, sampling = with_what
            how: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sampling.items()}
            asked["prompt"] = tuple(asked["prompt"])
            self.submit(Request(**asked, adapters=adapters, sampling=Sampling(**how)))
        elif what == "step":
            self.now = with_what[0]
            self.step()
        elif what == "enter":
            self.store.follow(*with_what)  # type: ignore[attr-defined]
        else:
            {"cancel": self.cancel, "unload": self.store.unload}[what](*with_what)
