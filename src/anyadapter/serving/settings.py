"""The engine's limits."""

from __future__ import annotations

from dataclasses import dataclass

from anyadapter.core.adapter import Settings


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """The engine's limits.

    Attributes:
        cells: size of the pool; a token takes one cell, an adapter of rank r on all linears a few tens of r. By default
            what fits into ``pool_bytes``.
        pool_bytes: memory for the pool where ``cells`` is not given.
        max_context: most tokens of prompt and output together; by default the model's own limit.
        max_running: most requests in one pass.
        max_waiting: most requests in the queue; beyond that, submit raises BusyError.
        step_tokens: most tokens of one pass: a token of each decoding request, and pieces of prompts.
        max_rank: of an adapter.
        policy: who is admitted next: ``"fcfs"``, ``"cluster"``, ``"vtc"``, ``"abort"``.
        adapters: folder under which adapters are registered by name; None reads any folder.
        keep: keep packed adapters in memory instead of reading their files again.
        pack: on a CPU, keep a second copy of the model's linears in oneDNN's layout; a pass takes a quarter less time.
        graphs: on CUDA, record the passes that only decode as CUDA graphs and play them again.
        read_ahead: read the adapters of waiting requests in a thread, ahead of need.
    """

    cells: int | None = None
    pool_bytes: int = 2 << 30
    max_context: int | None = None
    max_running: int = 64
    max_waiting: int = 1024
    step_tokens: int = 512
    max_rank: int = 512
    policy: str = "fcfs"
    adapters: str | None = None
    keep: bool = False
    pack: bool = True
    graphs: bool = True
    read_ahead: bool = True

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "step_tokens", "max_rank", "pool_bytes"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("step_tokens", self.step_tokens >= self.max_running, "at least max_running")
        for name in ("cells", "max_context"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or None")
