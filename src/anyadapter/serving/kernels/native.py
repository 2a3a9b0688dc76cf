"""The kernels in C for CPUs (``native.c``), compiled once by the system's compiler and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.errors import AnyAdapterError
from anyadapter.serving.batch import Rows, Sequences
from anyadapter.serving.kernels.grouped import Grouped

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
DTYPES = (torch.float32, torch.bfloat16)
LONG = 32  # from so many new tokens on, a sequence's attention is faster in torch
DESCRIBED = "described"  # under which a table keeps its structure for C
SMALL = 1 << 15  # a product of fewer numbers than this is not worth waking a second thread


class CompilerError(AnyAdapterError, OSError):
    """There is no C compiler, or what it made does not load."""


class CRows(ctypes.Structure):
    """``Rows`` of native.c."""

    _fields_ = [(n, c_long) for n in ("segments", "chunks", "cell", "stride")] + [
        (n, c_void_p) for n in ("tokens", "rows", "hidden", "cells", "offsets", "scale", "levels", "pool")
    ]


class CSequences(ctypes.Structure):
    """``Sequences`` of native.c."""

    _fields_ = (
        [(n, c_long) for n in ("segments", "kv_heads", "sharing", "dim", "stride", "least", "window")]
        + [(n, c_void_p) for n in ("tokens", "starts", "cells", "keys", "values")]
        + [("scale", c_float), ("softcap", c_float)]
    )


class Native:
    """All products in C, and the attention of short sequences; that of long ones, of which there are few, in torch.

    Raises:
        CompilerError: when the C file cannot be compiled or loaded here.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.library = library()
        self.dtype = dtype
        self.half = int(dtype is torch.bfloat16)
        self.size = dtype.itemsize
        self.grouped = Grouped()

    def shrink(self, x: Tensor, pool: Tensor, rows: Rows) -> Tensor:
        hidden = torch.empty(rows.total)
        described = self.describe(rows, pool)
        described.pool = pool.data_ptr()
        arguments = x.data_ptr(), x.stride(0) * self.size, x.shape[1], hidden.data_ptr(), self.half
        self.library.shrink(described, *arguments, threads(rows.total * x.shape[1]))
        return hidden

    def expand(self, hidden: Tensor, y: Tensor, pool: Tensor, rows: Rows) -> None:
        described = self.describe(rows, pool)
        described.pool = pool.data_ptr()
        arguments = hidden.data_ptr(), y.data_ptr(), y.stride(0) * self.size, y.shape[1], self.half
        self.library.expand(described, *arguments, threads(rows.total * y.shape[1]))

    def add(self, x: Tensor, y: Tensor, keys: Tensor, values: Tensor, down: Rows, up: Rows) -> None:
        hidden = torch.empty(down.total)
        self.library.add(
            self.describe(down, keys),
            self.describe(up, values),
            keys.data_ptr(),
            values.data_ptr(),
            x.data_ptr(),
            x.stride(-2) * self.size,
            x.shape[-1],
            hidden.data_ptr(),
            y.data_ptr(),
            y.stride(-2) * self.size,
            y.shape[-1],
            self.half,
            threads(down.total * (x.shape[-1] + y.shape[-1])),
        )

    def describe(self, rows: Rows, pool: Tensor) -> CRows:
        """The structure for C, made once for all layers that share the table; its ``pool`` is that of one layer."""
        found = rows.__dict__.get(DESCRIBED)
        if found is None:
            bounds = rows.tokens.data_ptr(), rows.rows.data_ptr(), rows.hidden.data_ptr()
            bits = rows.bits
            found = rows.__dict__[DESCRIBED] = CRows(
                len(rows.tokens) - 1,
                rows.cells.shape[1],
                pool.shape[1] * (1 if bits is None else 8 * self.size),
                pool.stride(0) * self.size,
                *bounds,
                rows.cells.data_ptr(),
                None if bits is None else bits.offsets.data_ptr(),
                rows.scale.data_ptr(),
                None if bits is None else bits.levels.data_ptr(),
                pool.data_ptr(),
            )
        return found

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        heads, dim = q.shape[1:]
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        described = CSequences(
            len(sequences.tokens) - 1,
            keys.shape[1],
            heads // keys.shape[1],
            dim,
            keys.stride(0) * self.size,
            LONG,
            window or 0,
            sequences.tokens.data_ptr(),
            sequences.starts.data_ptr(),
            sequences.cells.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            scale,
            softcap or 0.0,
        )
        count = threads(len(sequences.cells) * keys.stride(0))
        self.library.attend(described, q.data_ptr(), q.stride(0) * self.size, out.data_ptr(), self.half, count)
        if sequences.longest[1] >= LONG:
            self.grouped.attend_into(
                out, q, keys, values, sequences, scale=scale, window=window, softcap=softcap, least=LONG
            )
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of rows, weight · x / √(mean(x²) + eps): x, any shape that ends with ``weight``'s."""
        x = x.contiguous()
        out, width = torch.empty_like(x), len(weight)
        rows = x.numel() // width
        count = threads(x.numel())
        self.library.norm(x.data_ptr(), rows, width, weight.data_ptr(), eps, out.data_ptr(), self.half, count)
        return out

    def gate(self, g: Tensor, u: Tensor) -> Tensor:
        """silu(g) · u: both (1, T, width), the result new."""
        rows, width = g.shape[-2:]
        out = torch.empty(g.shape, dtype=g.dtype)
        strides = (g.data_ptr(), g.stride(-2) * self.size, u.data_ptr(), u.stride(-2) * self.size)
        self.library.gate(*strides, rows, width, out.data_ptr(), self.half, threads(out.numel()))
        return out


def threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers >= SMALL else 1


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled C file, loaded."""
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("there is no C compiler here; install cc, gcc or clang, or name one in the variable CC")
    try:
        loaded = ctypes.CDLL(str(build(compiler)), mode=os.RTLD_NOW)
    except subprocess.CalledProcessError as error:
        raise CompilerError(f"{shlex.join(compiler)} could not compile {SOURCE.name}: {error.stderr[-500:]}") from error
    except OSError as error:
        raise CompilerError(f"what {shlex.join(compiler)} made of {SOURCE.name} cannot be loaded: {error}") from error
    rows, sequences = POINTER(CRows), POINTER(CSequences)
    loaded.shrink.argtypes = [rows, c_void_p, c_long, c_long, c_void_p, c_int, c_int]
    loaded.expand.argtypes = [rows, c_void_p, c_void_p, c_long, c_long, c_int, c_int]
    matrix: tuple[Any, ...] = (c_void_p, c_long, c_long)
    loaded.add.argtypes = [rows, rows, c_void_p, c_void_p, *matrix, c_void_p, *matrix, c_int, c_int]
    loaded.attend.argtypes = [sequences, c_void_p, c_long, c_void_p, c_int, c_int]
    loaded.norm.argtypes = [c_void_p, c_long, c_long, c_void_p, c_float, c_void_p, c_int, c_int]
    loaded.gate.argtypes = [c_void_p, c_long, c_void_p, c_long, c_long, c_long, c_void_p, c_int, c_int]
    for function in (loaded.shrink, loaded.expand, loaded.add, loaded.attend, loaded.norm, loaded.gate):
        function.restype = None
    return loaded


def find_compiler() -> list[str] | None:
    """The command in CC, or the first compiler on the path."""
    if named := shlex.split(os.environ.get("CC", "")):
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def build(compiler: list[str]) -> Path:
    """The shared library for this source, compiler and processor; made if it is not in the cache.

    Torch has loaded an OpenMP library for all to see; linking without ``-fopenmp`` binds to it, so that there is one pool
    of threads in the process and not two.
    """
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), shlex.join([*compiler, *FLAGS]).encode(), processor().encode()):
        key.update(hashlib.sha256(part).digest())
    file = cache() / f"kernels-{key.hexdigest()[:24]}.so"
    if file.exists():
        return file
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        object_file, made = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        openmp = [] if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ["-fopenmp"]
        for step in (
            ["-c", str(SOURCE), *FLAGS, "-o", str(object_file)],
            ["-shared", str(object_file), *openmp, "-o", str(made)],
        ):
            subprocess.run([*compiler, *step], check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, file)  # whole or not at all, also when two processes build at once
    return file


def cache() -> Path:
    """The folder for compiled files, which only the user may write to."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "anyadapter", "kernels")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise CompilerError(
            f"{folder} can be written by others; a library is not loaded from there. Run chmod go-w on it."
        )
    return folder


def processor() -> str:
    """What the compiled code depends on: the machine's instruction set."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(
        sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    )
