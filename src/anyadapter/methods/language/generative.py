"""GenerativeAdapter: a context in, an adapter out, in one forward pass of the frozen model.

Chen et al. 2024, arXiv 2411.05877. At every adapted linear W of a layer, the tokens of a context are read into an associative
memory: with H the hidden states that enter the layer,

    S = Σ over windows of (A2 norm(H))ᵀ (A3 norm(H)),        y = W x + (alpha / R2) · B N(S)ᵀ A1 x,

N(S) being S normalised. What is kept of a context is its :class:`State`, S at every linear: states can be added, taken away,
saved, and turned into an ordinary LoRA. Tensors are named as in the authors' code. A call with no state is the base's.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets, escape
from anyadapter.core.errors import AttachError, BaseMismatchError, ConfigError, SignalError, TargetError
from anyadapter.core.fingerprint import fingerprint
from anyadapter.core.host import Host, device_of, features
from anyadapter.core.site import Site
from anyadapter.methods.language.lora import LoRAConfig
from anyadapter.parts.context import State, digest, sampled, token_ids, windows
from anyadapter.parts.low_rank import truncated
from anyadapter.parts.spectrum import leading, randomised

MODES = ("concat", "sequential", "parallel")
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig(AdapterConfig):
    """Settings of GenerativeAdapter; the sizes are the paper's for a base of seven billion parameters.

    Attributes:
        inner: R1, length of keys and queries.
        rank: R2, length of values.
        alpha: numerator of the scaling alpha / R2 (R2, not ``max_rank``).
        max_rank: rank q of a generated adapter, with ``norm="svd"``. Choose it well below the tokens of a context.
        targets: the linears that get adapters; the paper's ablation has ``"feed_forward.down"``.
        exclude: targets to leave out.
        layers: indices of the layers to adapt; all by default, negative from the last.
        norm: N(S): ``"svd"`` sets the q largest singular values to 1 and the others to 0, ``"frobenius"`` and ``"spectral"``
            divide S by its norm.
        merge: the ``"sum"`` of the windows' products before it is normalised, or their ``"mean"``.
        window: tokens read at a time, unless a call says something else.
        official: the authors' SVD: randomised with one iteration (here with a fixed seed), which fills up with noise where a
            context has fewer tokens than ``max_rank``, and in training drops adapters whose singular values are too close.
            Off, the SVD is exact, directions that the context does not have are left out, and gradients are always defined.
    """

    method: ClassVar[str] = "generative"
    inner: int = 1024
    rank: int = 1024
    alpha: float = 64.0
    max_rank: int = 128
    targets: Targets = "self_attention.output"
    exclude: Targets = ()
    layers: tuple[int, ...] | None = None
    norm: Literal["svd", "frobenius", "spectral"] = "svd"
    merge: Literal["sum", "mean"] = "sum"
    window: int = 1024
    official: bool = False

    def __post_init__(self) -> None:
        for name in ("inner", "rank", "max_rank", "window"):
            value = getattr(self, name)
            self.require(name, isinstance(value, int) and value >= 1, "a positive integer")
        self.require("alpha", math.isfinite(self.alpha), "finite")
        self.require("norm", self.norm in ("svd", "frobenius", "spectral"), "'svd', 'frobenius' or 'spectral'")
        self.require("merge", self.merge in ("sum", "mean"), "'sum' or 'mean'")
        if self.norm == "svd":
            widest = min(self.inner, self.rank)
            self.require("max_rank", self.max_rank <= widest, f"at most {widest}, the smaller of inner and rank")

    @property
    def generated_rank(self) -> int:
        """The rank of an adapter that is exported whole."""
        return self.max_rank if self.norm == "svd" else min(self.inner, self.rank)


class Generative(Adapter):
    """y = W x + (alpha / R2) · B N(S)ᵀ A1 x, with S read from a context.

    Signals:
        state: what the rows of a call know: a :class:`State` for all of them, or a list with a state or None for each.
        sees: (rows, rows), with ``context_mask``: the rows are windows of contexts and what follows them, all in one
            call; row i knows the rows j where this is not zero. Gradients pass from what it answers to what it read.
        context_mask: (rows, tokens), the tokens that can be read: not padding, and nothing of rows that nobody sees.
    """

    Config = GenerativeConfig
    task: ClassVar[str] = "contexts"
    reads: ClassVar[tuple[str, ...]] = ("state", "sees", "context_mask")
    capabilities = frozenset({"scale"})
    config: GenerativeConfig

    def setup(self, host: Host) -> None:
        config = self.config
        width = getattr(getattr(host.model, "config", None), "hidden_size", None)
        if width is None:
            raise TargetError(f"{host.describe()} has no config.hidden_size, the width of what enters its layers.")
        sites = host.find(config.targets, exclude=config.exclude, layers=config.layers)
        layers = host.paths("layer")
        self.layer_of: dict[str, str] = {}  # of each adapted linear
        for site in sites:
            layer = next((path for path in layers if site.path.startswith(f"{path}.")), None)
            if layer is None:
                raise TargetError(f"{site.path} lies in no layer of {host.describe()}, whose input it would read.")
            self.layer_of[site.path] = layer
        for layer in dict.fromkeys(self.layer_of.values()):
            self.at(Site(layer, host.modules[layer]), partial(self.listen, layer))
        for site in sites:
            self.at(site, Generator(site.module, int(width), config, partial(self.core, site.path)))
        self.mark = uuid.uuid4().hex  # of what it reads
        self.recorded: dict[str, Tensor] | None = None  # what entered each layer, where it is asked for
        self.products: dict[str, Tensor] | None = None  # O of every row, where it is asked for

    def generator(self, path: str) -> Generator:
        """The generator of an adapted linear."""
        return self.branches[escape(path)]  # type: ignore[return-value]

    # ------------------------------------------------------------------ in a call of the model

    def listen(self, layer: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer, with what enters it at hand for the linears in it."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.recorded is not None:
            self.recorded[layer] = hidden.detach()
        if "sees" in self.signals:
            # Beside the signals, it is there when a checkpointed layer is run again, and gone after that.
            self.signals.values[f"{self.name}: {layer}"] = hidden
        return call(*args, **kwargs)

    def core(self, path: str) -> Tensor | None:
        """N(S) of one linear for the rows of this call, (1 or rows, R1, R2); None where nothing was read."""
        state = self.signals.values.get("state")
        if "sees" not in self.signals:
            return self.stacked(path, state) if isinstance(state, (list, tuple)) else self.known(path, state)
        if isinstance(state, (list, tuple)):
            raise SignalError(f"{self.name!r}: with the signal 'sees', state is one State for all rows, not a list.")
        return self.seen(path, state)

    def known(self, path: str, state: State | None) -> Tensor | None:
        """N(S) of a state, (1, R1, R2), computed once; None where nothing was read."""
        if state is None:
            return None
        if not isinstance(state, State):
            raise SignalError(
                f"The signal 'state' of {self.name!r} is a {type(state).__name__}; expected a State this adapter has read."
            )
        if not state.windows:
            return None
        self.recognise(state)
        S = state.outer[path]
        # Besides this adapter's settings, it depends on the guard of training, and has a gradient or not.
        key = (path, self.mark, self.training, S.requires_grad and torch.is_grad_enabled())
        if key not in state.cores:
            with exactly(S):
                state.cores[key] = self.normalised(S[None], torch.full((1,), state.windows))
        return state.cores[key]

    def recognise(self, state: State) -> None:
        """Refuse a state that another generator has read. Its recipe is compared once; no more is asked of what this one read.

        Raises:
            BaseMismatchError: another generator has read it.
        """
        if self.mark in state.readers:
            return
        if {**state.recipe, **self.signature()} != state.recipe:
            raise BaseMismatchError(
                f"A state that another generator than {self.name!r} has read; read the context with this one. Where two are "
                "attached, turn the other off with `adapter.enabled = False`."
            )
        state.readers.add(self.mark)

    def stacked(self, path: str, states: Sequence[State | None]) -> Tensor | None:
        """N(S) of each row's own state, (rows, R1, R2)."""
        cores = [self.known(path, state) for state in states]
        some = next((core for core in cores if core is not None), None)
        return None if some is None else torch.cat([torch.zeros_like(some) if c is None else c for c in cores])

    def seen(self, path: str, before: State | None) -> Tensor:
        """N(S) of what each row sees of the others, and of a state all know, (rows, R1, R2)."""
        hidden: Tensor = self.signals.values[f"{self.name}: {self.layer_of[path]}"]
        mask, sees = self.signal("context_mask"), self.signal("sees")
        rows = hidden.shape[0]
        if sees.shape != (rows, rows) or mask.shape != hidden.shape[:2]:
            raise SignalError(
                f"{self.name!r}: sees is {tuple(sees.shape)} and context_mask {tuple(mask.shape)}; this call needs "
                f"{(rows, rows)} and {tuple(hidden.shape[:2])}."
            )
        read = mask.bool().any(1).nonzero()[:, 0]  # the others have nothing to be seen
        products = self.generator(path).outer(hidden[read], mask[read])
        if self.products is not None:
            self.products[path] = products.detach()
        with exactly(products):
            # Rows that see the same share one normalisation, the dearest part.
            sums, which = sees[:, read].to(products.dtype).unique(dim=0, return_inverse=True)
            total, count = torch.einsum("sr,rij->sij", sums, products), sums.sum(1)
            if before is not None and before.windows:
                self.recognise(before)
                total, count = total + before.outer[path], count + before.windows
            return self.normalised(total, count)[which]

    def normalised(self, total: Tensor, count: Tensor) -> Tensor:
        """N(S) for a batch of sums over ``count`` windows, (n, R1, R2); 0 where nothing was read."""
        config, some = self.config, count > 0
        result, total = torch.zeros_like(total), total[some]
        if config.merge == "mean":
            total = total / count[some, None, None]
        if config.norm == "frobenius":
            core = total / (total.pow(2).sum((-2, -1), keepdim=True) + EPS).sqrt()
        elif config.norm == "spectral":
            core = total / (torch.linalg.matrix_norm(total, 2, keepdim=True) + EPS)
        elif config.official:
            core = randomised(total, config.max_rank, guard=self.training)
        else:
            core = leading(total, config.max_rank)
        result[some] = core
        return result

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(
        self,
        model: nn.Module,
        context: Tensor | Sequence[int] | str,
        *,
        mode: str = "sequential",
        window: int | None = None,
        state: State | None = None,
        tokenizer: Any = None,
        at_once: int = 1,
    ) -> State:
        """Read a context; what comes back makes the model answer as if the context had been in its prompt.

        Args:
            model: the base this adapter is attached to.
            context: token ids, (tokens,) or (1, tokens), or text, for which a ``tokenizer`` is needed.
            mode: ``"sequential"``: each window is read by the model that knows the windows before it, and ``state``;
                ``"parallel"``: each by the base alone; ``"concat"``: all in one window, by the model that knows ``state``.
            window: tokens a window has at most; by default the settings'. All have the same length but the last.
            state: what was read before; it is extended, and not changed itself.
            at_once: windows in one call of the model. The result is the same; 1 needs the least memory.

        Raises:
            ConfigError: no such mode, no tokens, text without a tokenizer, or a ``state`` without a recipe.
            AttachError: the adapter is not attached to this model, or is disabled.
            BaseMismatchError: another generator has read ``state``.
        """
        ids = token_ids(context, tokenizer)
        steps = self.reading(model, ids, mode=mode, window=window, state=state, at_once=at_once)
        return deque(steps, maxlen=1).pop()  # the last

    def reading(
        self,
        model: nn.Module,
        ids: Tensor | Sequence[int],
        *,
        mode: str = "sequential",
        window: int | None = None,
        state: State | None = None,
        at_once: int = 1,
        multiple: int = 1,
    ) -> Iterator[State]:
        """:meth:`read` in steps: what is known after each window, so that other work can be done in between.

        Args:
            multiple: fill windows up to so many tokens, or to ``window``; they have fewer lengths then.
        """
        ids, host = token_ids(ids), self.attached_to(model)
        if mode not in MODES:
            raise ConfigError(f"There is no mode {mode!r} of reading; expected one of {', '.join(MODES)}.")
        state = state or self.nothing(host)
        recipe, reads = state.recipe, state.reads
        length = len(ids) if mode == "concat" else window or self.config.window
        rows, mask = windows(ids, length)
        more = min(-rows.shape[1] % multiple, length - rows.shape[1])
        rows, mask = F.pad(rows, (0, more)), F.pad(mask, (0, more))
        read = {"mode": mode, "window": length, "tokens": len(ids), "context": digest(ids)}
        read["after"] = 0 if mode == "parallel" else len(reads)
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            state = self.read_windows(
                model, rows[part], mask[part], alone=mode == "parallel", state=state, at_once=at_once
            )
            read = {**read, "windows": min(part.stop, len(rows))}
            state = replace(state, recipe={**recipe, "reads": [*reads, read]})
            yield state

    @torch.no_grad()
    def read_windows(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        *,
        alone: bool = False,
        state: State | None = None,
        at_once: int = 1,
    ) -> State:
        """:meth:`read` for a context that is cut already, (windows, tokens); ``alone`` is the mode ``"parallel"``.

        What comes back is for use: without a recipe it cannot be saved, added or taken away.
        """
        host = self.attached_to(model)
        state = state or self.nothing(host)
        self.recognise(state)
        outer, count, device = dict(state.outer), state.windows, device_of(host.model)
        for rows, seen in zip(ids.to(device).split(at_once), mask.to(device).split(at_once)):
            known = None if alone else State(dict(outer), count, {}, {self.mark})
            sees = torch.ones(len(rows), len(rows), device=device).tril(-1) * (not alone)
            for path, products in self.look(host, rows, seen, sees, known).items():
                outer[path] = outer[path] + products.float().sum(0)
            count += len(rows)
        return State(outer, count, {}, {self.mark})

    def attached_to(self, model: nn.Module) -> Host:
        """The host of a model this adapter acts in. Raises :class:`AttachError` when it does not."""
        host = Host.of(model)
        if host.adapters.get(self.name) is not self or not self.active:
            raise AttachError(f"{self.name!r} is not attached to this model, or is disabled; it cannot read.")
        return host

    def look(self, host: Host, ids: Tensor, mask: Tensor, sees: Tensor, known: State | None) -> dict[str, Tensor]:
        """O of each window at every linear, (windows, R1, R2), from one call of the model without its head."""
        products: dict[str, Tensor] = {}
        self.products = products
        values = {"state": known, "sees": sees, "context_mask": mask}
        try:
            with host.signals.set({name: [self.name] for name in self.reads}, values):
                run(host.model, ids, mask)
        finally:
            self.products = None
        return products

    def nothing(self, host: Host) -> State:
        """The state of one who has read nothing."""
        outer = {}
        for path in self.layer_of:
            weight = self.generator(path).A1.weight
            outer[path] = torch.zeros(self.config.inner, self.config.rank, device=weight.device)
        return State(outer, 0, {**self.signature(), "base": fingerprint(host), "reads": []}, {self.mark})

    def signature(self) -> dict[str, Any]:
        """What tells this generator from others, in the recipes of what it reads: settings, and a hash of its tensors."""
        tensors = self.values()
        return {"config": self.config.to_dict(), "generator": sampled([tensors[name] for name in sorted(tensors)])}

    # ------------------------------------------------------------------ training on contexts read once

    @torch.no_grad()
    def record(self, model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What the frozen base computes of contexts, (rows, tokens, d) for each adapted layer.

        It does not change in training: with :meth:`recall`, a context that is trained on many times is run only once.
        """
        host = Host.of(model)
        recorded: dict[str, Tensor] = {}
        self.recorded = recorded
        try:
            with host.signals.set({"state": [self.name]}, {"state": None}):
                run(host.model, ids, mask)
        finally:
            self.recorded = None
        return recorded

    def recall(self, hidden: Mapping[str, Tensor], mask: Tensor) -> State:
        """The state of one context from the record of its windows, with gradients to the generator. It cannot be saved."""
        outer = {path: self.generator(path).outer(hidden[layer], mask).sum(0) for path, layer in self.layer_of.items()}
        return State(outer, len(mask), {}, {self.mark})

    # ------------------------------------------------------------------ as an ordinary LoRA

    @torch.no_grad()
    def export(self, state: State, rank: int | None = None) -> tuple[LoRAConfig, dict[str, Tensor]]:
        """The adapter a state stands for, as settings and tensors of a LoRA that do the same without this adapter.

        Args:
            rank: of the LoRA; by default one that holds it whole. A smaller one gets the best approximation of each update.

        Raises:
            ConfigError: the rank is no positive integer.
            BaseMismatchError: another generator has read the state.
        """
        rank = self.config.generated_rank if rank is None else rank
        config = LoRAConfig(rank=rank, alpha=float(rank), targets=tuple(self.layer_of))
        tensors = {}
        for path in self.layer_of:
            generator, core = self.generator(path), self.known(path, state)
            u, s, vt = torch.linalg.svd(torch.zeros_like(state.outer[path]) if core is None else core[0].float())
            kept = int((s > s[0] * EPS).sum())
            a = (u[:, :kept] * s[:kept]).mT @ generator.A1.weight.float()
            b = generator.B.weight.float() @ vt[:kept].mT * (generator.scaling * self.scale)
            if kept > rank:
                a, b, _ = truncated(a, b, rank)
            # A context with fewer directions than the rank leaves the rest at zero: all adapters have one shape.
            tensors[f"{path}.lora_A.weight"] = F.pad(a, (0, 0, 0, rank - len(a)))
            tensors[f"{path}.lora_B.weight"] = F.pad(b, (0, rank - b.shape[1]))
        return config, tensors


class Generator(Branch):
    """One linear's projections: keys A2 and values A3 of what was read, query A1 and output B of what is computed.

    Args:
        module: the linear.
        width: d, of what enters the layer.
        core: gives N(S) for the rows of a call, (1 or rows, R1, R2), or None.
    """

    def __init__(
        self, module: nn.Module, width: int, config: GenerativeConfig, core: Callable[[], Tensor | None]
    ) -> None:
        super().__init__()
        width_in, width_out = features(module)
        self.A1 = nn.Linear(width_in, config.inner, bias=False)
        self.A2 = nn.Linear(width, config.inner, bias=False)
        self.A3 = nn.Linear(width, config.rank, bias=False)
        self.B = nn.Linear(config.rank, width_out, bias=False)
        self.norm = nn.RMSNorm(width, eps=EPS)
        for part in (self.A1, self.A2, self.A3):
            nn.init.kaiming_normal_(part.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)
        self.scaling = config.alpha / config.rank
        self.core = core

    def outer(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """O of each row, the product of its keys and values: (rows, tokens, d), (rows, tokens) → (rows, R1, R2)."""
        normed = self.norm(hidden.to(self.norm.weight.dtype)) * mask[..., None].to(self.norm.weight.dtype)
        keys, values = self.A2(normed), self.A3(normed)
        with exactly(keys):
            return keys.float().mT @ values.float()

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (rows, tokens, in) → (rows, tokens, out)."""
        out, core = call(x), self.core()
        if core is None:
            return out
        if len(core) not in (1, len(x)):
            raise SignalError(
                f"The signal 'state' holds {len(core)} states for {len(x)} rows; give one for each row, or one."
            )
        query = self.A1(x.to(self.A1.weight.dtype))
        delta = self.B(query @ core.to(query.dtype))
        return out + (delta * (self.scaling * self.strength(out))).to(out.dtype)


# ---------------------------------------------------------------------- pieces


def run(model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Run a model's layers, not its head."""
    body: Any = getattr(model, "base_model", model)
    body(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def exactly(tensor: Tensor) -> Iterator[None]:
    """No lower precision inside the block, also under autocast."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield


def generate_lora(
    model: nn.Module,
    adapter: Generative,
    ids: Tensor | Sequence[int],
    state: State | None = None,
    *,
    rank: int | None = None,
    **options: Any,
) -> tuple[State, LoRAConfig, dict[str, Tensor]]:
    """Read a context and export what was read: the extended state, and settings and tensors of a LoRA.

    Args:
        ids: token ids.
        state: what was read before.
        rank: of the LoRA, as in :meth:`Generative.export`.
        options: of :meth:`Generative.read`, such as ``mode``.
    """
    state = adapter.read(model, ids, state=state, **options)
    return state, *adapter.export(state, rank)
