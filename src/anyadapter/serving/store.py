"""The registered adapters: thousands of folders, each checked before it is known by its name."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load
from torch import Tensor

from anyadapter.core.adapter import Adapter, check_tensors
from anyadapter.core.attach import NAME
from anyadapter.core.catalogue import config_from_dict, method_of
from anyadapter.core.errors import AnyAdapterError, ArtefactError, UnknownAdapterError, near
from anyadapter.core.fingerprint import check_fingerprint
from anyadapter.core.host import Host
from anyadapter.formats import layouts
from anyadapter.formats.files import CONFIG, TENSORS, inside, read_header, read_json
from anyadapter.formats.layouts import KEY
from anyadapter.formats.native import FORMAT_VERSION, digest
from anyadapter.formats.packed import read_bits, unpacked_shapes
from anyadapter.parts.quantised import Packed
from anyadapter.serving.packing import Packing, plan

VOLATILE = ("tensors_sha256", "library_version", "base", "scale")  # differ between adapters that are packed alike


@dataclass(eq=False)
class Registered:
    """One adapter the server knows.

    Attributes:
        id: ``name@version``; a name registered again gets another one, so that nothing of the old is taken for it.
        stamp: size and time of the file when it was checked; a file that has changed since is refused.
        scale: saved with the adapter.
        checked: whether its values were found sound.
        kept: its cells, where they are kept in memory, or its file no longer holds them.
    """

    name: str
    id: str
    folder: Path
    method: str
    packing: Packing = field(repr=False)
    template: Template = field(repr=False)
    stamp: tuple[int, int]
    scale: float
    sha256: str | None
    base: str | None
    bytes: int
    created: float
    checked: bool = False
    kept: Tensor | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The largest inner width of its parts."""
        return self.packing.rank

    @property
    def cells(self) -> int:
        """How many cells of the pool it takes while it is resident."""
        return self.packing.cells


@dataclass(eq=False)
class Template:
    """What adapters of the same settings and shapes share: an adapter without values, its layout, its packing, and the bits
    of its quantised matrices.

    Attributes:
        renamed: the name in the file of each of the adapter's tensors, where reading the layout is nothing but renaming.
    """

    adapter: Adapter
    layout: layouts.Layout
    packing: Packing
    bits: dict[str, int]
    renamed: dict[str, str] | None


class AdapterStore:
    """Adapters by name.

    Args:
        host: the base they are for.
        layers, width, dtype: of the pool.
        root: when given, folders are names inside it, and nothing outside is read.
        max_rank, max_cells: limits to one adapter.
        keep: keep packed copies in memory (pinned, where there is CUDA) instead of reading the file again.
    """

    def __init__(
        self,
        host: Host,
        layers: int,
        width: int,
        dtype: torch.dtype,
        *,
        root: str | Path | None = None,
        max_rank: int = 512,
        max_cells: int = 1 << 30,
        keep: bool = False,
    ) -> None:
        self.host, self.layers, self.width, self.dtype = host, layers, width, dtype
        self.root = Path(root).resolve() if root is not None else None
        self.max_rank, self.max_cells, self.keep = max_rank, max_cells, keep
        self.by_name: dict[str, Registered] = {}
        self.templates: WeakValueDictionary[str, Template] = WeakValueDictionary()  # of adapters that somebody has
        self.base = ""  # the last fingerprint that fitted this base; most adapters have the same
        self.versions = itertools.count(1)

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.by_name)

    def get(self, name: str) -> Registered:
        """The adapter of that name. Raises :class:`UnknownAdapterError` with near names."""
        found = self.by_name.get(name)
        if found is None:
            raise UnknownAdapterError(f"No adapter {name[:128]!r} is loaded. {near(name[:128], self.by_name)}")
        return found

    def register(self, name: str, folder: str | Path | None = None, *, check: bool = True) -> Registered:
        """Make an adapter known, or put another one under its name; requests already in hand keep the old one.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``, at most 128.
            folder: of the artefact; with a ``root``, a name inside it. By default the same as ``name``.
            check: read all values now; otherwise that is done when it is first used.

        Raises:
            ArtefactError: malformed name, missing, damaged or hostile files, a rank or size beyond the limits.
            BaseMismatchError: it was trained on another base.
            TargetError, ConfigError: this base has no such parts, or the adapter cannot share a batch.
        """
        found = self.examine(name, folder)
        if check:
            self.pack(found)
        self.enter(found)
        return found

    def enter(self, found: Registered) -> None:
        """Put an examined adapter under its name."""
        if found.name in self.by_name:
            self.forget(self.by_name[found.name])
        self.by_name[found.name] = found

    def unload(self, name: str) -> Registered:
        """Forget a name; requests in hand keep the adapter. Raises :class:`UnknownAdapterError`."""
        found = self.get(name)
        self.forget(found)
        return found

    def forget(self, found: Registered) -> None:
        del self.by_name[found.name]

    def scan(self) -> dict[str, str]:
        """Register every folder under ``root``. Returns the refused ones, each with the reason."""
        refused = {}
        for path in sorted(self.root.iterdir()) if self.root else []:
            try:
                if (path / CONFIG).exists():
                    self.register(path.name, check=False)
            except (AnyAdapterError, OSError) as error:
                refused[path.name] = str(error)
        return refused

    def examine(self, name: str, folder: str | Path | None = None, *, anywhere: bool = False) -> Registered:
        """All of :meth:`register` that reads headers only; the store is not changed.

        Args:
            anywhere: the folder is the server's own, and a path that no client gave.
        """
        if not NAME.fullmatch(name):
            raise ArtefactError(f"An adapter's name is 1 to 128 letters, digits, '.', '_' or '-', not {name[:200]!r}.")
        with distrust(name):
            return self.look(name, str(folder if folder is not None else name), None if anywhere else self.root)

    def look(self, name: str, where: str, root: Path | None) -> Registered:
        """What the configuration and the header in a folder say; with a root the folder and its files must be in it."""
        path = inside(root, where) if root is not None else Path(where)
        for file in (CONFIG, TENSORS) if root is not None else ():
            if (path / file).is_symlink() and root not in (path / file).resolve().parents:
                raise ArtefactError(f"{file} of {where!r} leads out of the folder of adapters.")
        config = read_json(path / CONFIG)
        seen = stamp(path)  # before the header, so that a file put there meanwhile is noticed
        shapes = read_header(path / TENSORS)
        ours = config.get(KEY)
        ours = ours if isinstance(ours, dict) else {}
        template = self.template(path, config, shapes)
        if template.packing.rank > self.max_rank:
            raise ArtefactError(f"{name!r} has rank {template.packing.rank}; this server takes {self.max_rank}.")
        if template.packing.cells > self.max_cells:
            raise ArtefactError(
                f"{name!r} takes {template.packing.cells} cells of the pool, which has room for {self.max_cells}."
            )
        self.check_base(ours)
        scale = ours.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ArtefactError(f"{name!r}: the saved scale is {scale!r}, not a finite number.")
        return Registered(
            name=name,
            id=f"{name}@{next(self.versions)}",
            folder=path,
            method=template.adapter.config.method,
            packing=template.packing,
            template=template,
            stamp=seen,
            scale=float(scale),
            sha256=ours.get("tensors_sha256"),
            base=config.get("base_model_name_or_path"),
            bytes=seen[0],
            created=time.time(),
        )

    def template(self, path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Template:
        """The template of a folder, made once for all adapters with the same settings and shapes."""
        ours = config.get(KEY)
        same = {k: v for k, v in config.items() if k != KEY}
        if isinstance(ours, dict):
            same[KEY] = {k: v for k, v in ours.items() if k not in VOLATILE}
        key = json.dumps([same, shapes], sort_keys=True)
        template = self.templates.get(key)
        if template is None:
            template = self.templates[key] = self.make_template(path, config, shapes)
        return template

    def make_template(self, path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Template:
        meta = on_meta(shapes)
        if (ours := config.get(KEY)) is not None:
            if not isinstance(ours, dict) or not isinstance(ours.get("config"), dict):
                raise ArtefactError(f"{path / CONFIG}: the {KEY!r} object is malformed.")
            if ours.get("format_version") != FORMAT_VERSION:
                raise ArtefactError(
                    f"{path} has format version {ours.get('format_version')!r}; this version reads {FORMAT_VERSION}. "
                    "Upgrade with `pip install -U anyadapter`."
                )
            layout = layouts.by_name(ours.get("layout", "native"))
            settings = config_from_dict({**ours["config"], "method": ours.get("method", "")})
        else:
            layout = layouts.detect(path, config, meta)
            settings = layout.read_config(config, meta, self.host)
        with torch.device("meta"):
            adapter = method_of(settings)(settings, self.host)
        mine = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        bits = read_bits((ours or {}).get("bits"), mine)
        meta = on_meta(unpacked_shapes(bits, shapes, mine))
        values = layout.read({}, meta, adapter)
        check_tensors(adapter.tensors(), values)  # type: ignore[arg-type]  # none is packed
        file = {id(tensor): name for name, tensor in meta.items()}
        plain = not bits and all(id(value) in file for value in values.values())
        renamed = {name: file[id(value)] for name, value in values.items()} if plain else None
        return Template(adapter, layout, self.plan(adapter, bits), bits, renamed)

    def plan(self, adapter: Adapter, bits: dict[str, int]) -> Packing:
        """How adapters like this one lie in the pool."""
        return plan(adapter, self.host, self.layers, self.width, self.dtype, bits)

    def check_base(self, ours: dict[str, Any]) -> None:
        expected = ours.get("base")
        if expected is None:
            return
        key = json.dumps(expected, sort_keys=True)
        if key != self.base:
            check_fingerprint(self.host, expected)
            self.base = key

    def pack(self, found: Registered) -> Tensor:
        """The adapter's cells, read from its file: (layers, 2, cells, W).

        Raises:
            ArtefactError: the file has changed since it was registered, is damaged, holds numbers that are not finite, or
                memory is short.
        """
        if found.kept is not None:
            return found.kept
        with distrust(found.name):
            check_stamp(found)
            packed = found.packing.pack(self.read(found))
            check_stamp(found)  # it may have been replaced while it was read
            if self.keep:
                packed = found.kept = packed.pin_memory() if torch.cuda.is_available() else packed
        found.checked = True
        return packed

    def read(self, found: Registered) -> Mapping[str, Tensor | Packed]:
        """An adapter's tensors, by its own names. The first time, they are compared with what was saved."""
        tensors = load((found.folder / TENSORS).read_bytes())  # as in formats/files.py
        if not found.checked and found.sha256 is not None and digest(tensors) != found.sha256:
            raise ArtefactError(f"{found.name!r}: {TENSORS} is not the file {CONFIG} was saved with.")
        template = found.template
        if template.renamed is not None:
            return {name: tensors[theirs] for name, theirs in template.renamed.items()}
        values = dict(template.layout.read({KEY: {"bits": template.bits}}, tensors, template.adapter))
        for name, bits in template.bits.items():  # of a file with latents, which training goes on from
            if not isinstance(value := values[name], Packed):
                values[name] = Packed.of(value, bits, name)
        return values


def on_meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextmanager
def distrust(name: str) -> Iterator[None]:
    """Make an :class:`ArtefactError` of whatever goes wrong with an adapter's files.

    They come from elsewhere: they can be malformed in more ways than there are checks, and each must cost this adapter only.
    """
    try:
        yield
    except AnyAdapterError:
        raise
    except Exception as error:
        raise ArtefactError(f"{name!r} cannot be read ({type(error).__name__}: {error}).") from error


def check_stamp(found: Registered) -> None:
    """Raise an :class:`ArtefactError` if an adapter's tensors are not those that were registered."""
    if stamp(found.folder) != found.stamp:
        raise ArtefactError(f"The files of {found.name!r} have changed since it was loaded; load it again.")


def stamp(folder: Path) -> tuple[int, int]:
    """Size and time of change of an adapter's tensors."""
    status = (folder / TENSORS).stat()
    return status.st_size, status.st_mtime_ns
