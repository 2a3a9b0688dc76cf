"""The command line: ``anyadapter --help``."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anyadapter.core.errors import AnyAdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="Adapters for frozen models: train, inspect, merge and convert them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)
console, errors = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of a table.")]
Base = Annotated[str, typer.Option("--base", help="Folder or Hub id of the base model; 'smollm2' is the embedded one.")]
Folder = Annotated[Path, typer.Argument(help="An adapter's folder.", show_default=False)]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Our own errors are for people: a message and exit code 1, no traceback."""
    try:
        yield
    except AnyAdapterError as error:
        errors.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("Interrupted. What was saved is whole; run the same command again to go on.")
        raise typer.Exit(130) from None


def show(values: dict[str, Any], as_json: bool) -> None:
    """Print an object as JSON, or as a table of two columns."""
    if as_json:
        print(json.dumps(values, indent=2, default=str))
        return
    table = Table(show_header=False, box=None)
    for key, value in values.items():
        shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        table.add_row(f"[bold]{key}[/]", shown if len(shown) < 500 else shown[:500] + " …")
    console.print(table)


@app.command()
def quickstart(
    base: Base = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL with 'prompt' and 'completion'; by default a real task that ships along."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the report, plot and adapters go.")] = Path("quickstart"),
    steps: Annotated[int | None, typer.Option(help="Training steps per adapter; by default the tuned budget.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and initialisation.")] = 0,
) -> None:
    """Train four adapters on one frozen model, compare them on held-out data, and leave a report.

    Example: `anyadapter quickstart --base HuggingFaceTB/SmolLM2-360M-Instruct --data mine.jsonl`
    """
    from anyadapter.quickstart import run

    with plain_errors():
        run(base=base, data=data, out=out, steps=steps, seed=seed)


@app.command("list")
def list_systems(as_json: Json = False) -> None:
    """The catalogue: every system, its modality, status, methods and hosts.

    Example: `anyadapter list --json | jq '.[] | select(.status == "implemented") | .slug'`
    """
    from anyadapter.core.catalogue import SYSTEMS

    if as_json:
        print(json.dumps([system.to_dict() for system in SYSTEMS], indent=2))
        return
    table = Table("system", "modality", "status", "methods", "tested hosts", "note")
    for system in SYSTEMS:
        colour = {"implemented": "green", "partial": "yellow", "planned": "dim"}[system.status]
        status = f"[{colour}]{system.status}[/]"
        methods, hosts = ", ".join(system.methods), ", ".join(system.hosts)
        table.add_row(system.system, system.modality, status, methods, hosts, system.note)
    console.print(table)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see the page 'Training' of the documentation.")],
    overwrite: Annotated[bool, typer.Option(help="Start anew where a finished run lies.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, or several to search for settings. The same command goes on where an interrupted run stopped.

    Example: `anyadapter train examples/llm_adapters.yaml`
    """
    from anyadapter.training.config import read_yaml
    from anyadapter.training.run import train as run
    from anyadapter.training.search import SEARCH, search

    with plain_errors():
        values = read_yaml(config)
        if SEARCH in values:
            result, found = search(values, overwrite=overwrite)
            show({"folder": str(result.folder), **result.metrics, SEARCH: found}, as_json)
        else:
            result = run(values, overwrite=overwrite)
            show({"folder": str(result.folder), **result.metrics}, as_json)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help="JSONL or JSON with held-out examples.")],
    base: Base = "smollm2",
    adapter: Annotated[
        str | None, typer.Option(help="An adapter's folder or Hub id; without one, the base alone.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="exact, number, letter, or a data set of the LLM-Adapters protocol.")
    ] = "exact",
    batch: Annotated[int, typer.Option(help="Examples per batch; the answers do not depend on it.")] = 8,
    tokens: Annotated[int, typer.Option(help="New tokens per answer, at most.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Only the first so many examples.")] = None,
    as_json: Json = False,
) -> None:
    """Score generated answers on held-out data, with an adapter or without.

    Example: `anyadapter eval test.jsonl --adapter runs/lora/adapter --metric number`
    """
    from anyadapter.formats.native import load
    from anyadapter.training.base import load_base
    from anyadapter.training.evaluate import evaluate_file

    with plain_errors():
        model, tokenizer = load_base(base)
        if adapter:
            load(model, adapter)
        summary = evaluate_file(model, tokenizer, data, metric=metric, batch=batch, max_new_tokens=tokens, limit=limit)
        show(summary, as_json)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    base: Base = "smollm2",
    adapter: Annotated[str | None, typer.Option(help="An adapter's folder or Hub id.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 64,
    template: Annotated[str, typer.Option(help="How the prompt is framed: plain, chat or alpaca.")] = "plain",
) -> None:
    """Answer one prompt, greedily.

    Example: `anyadapter generate "What is 3 + 4?" --adapter runs/lora/adapter --template alpaca`
    """
    from anyadapter.formats.native import load
    from anyadapter.training.base import load_base
    from anyadapter.training.evaluate import answer

    with plain_errors():
        model, tokenizer = load_base(base)
        if adapter:
            load(model, adapter)
        text = sys.stdin.read() if prompt == "-" else prompt
        print(answer(model, tokenizer, [text], template=template, max_new_tokens=tokens)[0])


@app.command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """What a folder holds: method, base, settings, parameters, bytes and wrapped modules. Reads no base model.

    Example: `anyadapter inspect runs/lora/adapter --json`
    """
    from anyadapter.formats.native import inspect as look

    with plain_errors():
        show(look(folder), as_json)


@app.command()
def merge(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Where the merged model goes.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one named in the adapter.")] = None,
) -> None:
    """Add a linear adapter into its base and save the whole model.

    Example: `anyadapter merge runs/lora/adapter merged --base smollm2`
    """
    from anyadapter.core.attach import merge as add

    with plain_errors():
        model, tokenizer = with_adapter(folder, base)
        add(model, unload=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        console.print(f"Saved {out}.")


@app.command()
def compose(
    out: Annotated[Path, typer.Argument(help="The new adapter's folder.")],
    sources: Annotated[list[str], typer.Argument(help="FOLDER=WEIGHT for each adapter; a weight may be negative.")],
    rank: Annotated[int | None, typer.Option(help="Cut every update to so many directions; of LoRA only.")] = None,
    apart: Annotated[bool, typer.Option(help="Average A and B of LoRA apart, which is another model.")] = False,
    base: Annotated[str | None, typer.Option(help="The base; by default the one named in the first adapter.")] = None,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: the average where weights sum to 1, else the weighted sum of what they do.

    Example: `anyadapter compose mixed runs/maths=1 runs/polite=0.5 runs/verbose=-0.3 --rank 16`
    """
    from anyadapter.compose import average, weighted_sum
    from anyadapter.core.errors import ConfigError
    from anyadapter.formats.native import save_pretrained
    from anyadapter.training.base import load_base

    with plain_errors():
        weights: dict[str | Path, float] = dict(weighted(source) for source in sources)
        if len(weights) < len(sources):
            raise ConfigError("A folder is named twice; give it one weight.")
        model, _ = load_base(base_of(Path(next(iter(weights))), base))
        if apart or (rank is None and abs(sum(weights.values()) - 1) < 1e-6):
            adapter = average(model, weights, apart=apart)
        else:
            adapter = weighted_sum(model, weights, rank=rank)
        save_pretrained(model, out, adapter.name)
        facts = {"folder": str(out), "method": adapter.config.method, "parameters": adapter.parameter_count()}
        show({**facts, "largest_error_of_an_update": max(adapter.lost.values(), default=0.0)}, as_json)


@app.command()
def convert(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="native, peft or llm-adapters.")] = "peft",
    base: Annotated[str | None, typer.Option(help="The base; by default the one named in the adapter.")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read a legacy adapter_model.bin (plain tensors only).")] = False,
) -> None:
    """Write an adapter in another layout.

    Example: `anyadapter convert official-lora mine --to native --base llama-7b --allow-pickle`
    """
    from anyadapter.formats.native import save_pretrained

    with plain_errors():
        model, _ = with_adapter(folder, base, allow_pickle)
        save_pretrained(model, out, layout=to)
        console.print(f"Saved {out} in the layout {to}.")


@app.command()
def quantize(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="The new folder; by default FOLDER-1bit beside it.")] = None,
    bits: Annotated[int, typer.Option(help="Bits of a number: 1, 2, 4 or 8.")] = 1,
    matrices: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of tensor names, such as '*lora_A*'; may be repeated. By default all matrices."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of another library's adapter; by default the one named in it.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read a legacy adapter_model.bin (plain tensors only).")] = False,
    as_json: Json = False,
) -> None:
    """Round the matrices of a trained adapter and pack them. The base is read only for an adapter of another library.

    Training with rounded matrices is better at 1 bit: `quantize: {bits: 1}` in the file for `anyadapter train`.

    Example: `anyadapter quantize runs/lora/adapter --bits 4`
    """
    from anyadapter.formats.files import CONFIG, read_json
    from anyadapter.formats.layouts import KEY
    from anyadapter.formats.native import locate, save_pretrained
    from anyadapter.formats.quantize import quantize_folder
    from anyadapter.parts.quantised import check_bits

    with plain_errors(), TemporaryDirectory() as scratch:
        check_bits(bits)  # before a base is loaded
        source = locate(folder)
        beside = folder.resolve().parent if folder.is_dir() else Path()  # one from the Hub: here
        target = out or beside / f"{folder.resolve().name}-{bits}bit"
        if KEY not in read_json(source / CONFIG):
            model, _ = with_adapter(source, base, allow_pickle)
            source = Path(scratch)
            save_pretrained(model, source, layout="native")
        facts = quantize_folder(source, target, bits, tuple(matrices) if matrices else None)
        show({"folder": str(target), **facts}, as_json)


@app.command()
def serve(
    base: Annotated[
        str,
        typer.Option(envvar="ANYADAPTER_BASE", help="Folder or Hub id of the model; 'smollm2' is the embedded one."),
    ] = "smollm2",
    adapters: Annotated[
        Path | None, typer.Option(envvar="ANYADAPTER_ADAPTERS", help="Folder that holds the adapters' folders.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(envvar="ANYADAPTER_NAME", help="The base's name in requests; by default from --base.")
    ] = None,
    host: Annotated[str, typer.Option(envvar="ANYADAPTER_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="ANYADAPTER_PORT", help="Port; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    dtype: Annotated[
        str | None, typer.Option(envvar="ANYADAPTER_DTYPE", help="float32, bfloat16 or float16; by default the files'.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(envvar="ANYADAPTER_DEVICE", help="cpu, cuda …; by default CUDA where there is one.")
    ] = None,
    pool_tokens: Annotated[
        int | None,
        typer.Option(envvar="ANYADAPTER_POOL_TOKENS", help="Size of the pool in tokens, instead of --pool-gb."),
    ] = None,
    pool_gb: Annotated[
        float, typer.Option(envvar="ANYADAPTER_POOL_GB", help="Memory for keys, values and adapters, in GiB.")
    ] = 2.0,
    generator: Annotated[
        Path | None,
        typer.Option(
            envvar="ANYADAPTER_GENERATOR", help="Folder of a GenerativeAdapter, to make adapters of contexts."
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(envvar="ANYADAPTER_MAX_RUNNING", help="Most sequences computed at once.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option(envvar="ANYADAPTER_MAX_WAITING", help="Most sequences in the queue; beyond, 429.")
    ] = 1024,
    max_context: Annotated[
        int | None,
        typer.Option(
            envvar="ANYADAPTER_MAX_CONTEXT", help="Tokens of prompt and output; by default the model's limit."
        ),
    ] = None,
    max_rank: Annotated[int, typer.Option(envvar="ANYADAPTER_MAX_RANK", help="Largest rank of an adapter.")] = 512,
    max_body: Annotated[int, typer.Option(envvar="ANYADAPTER_MAX_BODY", help="Bytes of a request.")] = 1 << 20,
    max_tokens: Annotated[
        int | None, typer.Option(envvar="ANYADAPTER_MAX_TOKENS", help="Most tokens a request may ask for.")
    ] = None,
    max_n: Annotated[int, typer.Option(envvar="ANYADAPTER_MAX_N", help="Most choices for a prompt.")] = 16,
    policy: Annotated[
        str, typer.Option(envvar="ANYADAPTER_POLICY", help="Who is next: fcfs, cluster, vtc (fair) or abort.")
    ] = "fcfs",
    first_token_seconds: Annotated[
        float | None,
        typer.Option(
            envvar="ANYADAPTER_FIRST_TOKEN_SECONDS", help="Give up a request that has no token by then (503)."
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(envvar="ANYADAPTER_DRAIN_SECONDS", help="Seconds for requests in hand after SIGTERM.")
    ] = 30.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ANYADAPTER_API_KEY", show_default=False, help="Key that all /v1 routes ask for."),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="ANYADAPTER_ADMIN_KEY", show_default=False, help="Key for changing adapters."),
    ] = None,
    allow_adapter_updates: Annotated[
        bool,
        typer.Option(envvar="ANYADAPTER_ALLOW_ADAPTER_UPDATES", help="Load, replace and unload adapters over HTTP."),
    ] = False,
    insecure: Annotated[
        bool, typer.Option(envvar="ANYADAPTER_INSECURE", help="Listen beyond this machine without a key.")
    ] = False,
) -> None:
    """Serve a model and its adapters over OpenAI's HTTP API. Every option can be an environment variable.

    Keys are safer there, as other users see a command line.

    Example: `anyadapter serve --base smollm2 --adapters runs --policy vtc`
    """
    from anyadapter.serving.engine import EngineSettings
    from anyadapter.serving.gate import ServerSettings
    from anyadapter.serving.server import serve as run

    with plain_errors():
        engine = EngineSettings(
            cells=pool_tokens,
            pool_bytes=int(pool_gb * 2**30),
            max_context=max_context,
            max_running=max_running,
            max_waiting=max_waiting,
            max_rank=max_rank,
            policy=policy,
            adapters=str(adapters) if adapters is not None else None,
        )
        server = ServerSettings(
            model_name=name or (Path(base).resolve().name if Path(base).is_dir() else base),
            api_key=api_key or None,
            admin_key=admin_key or None,
            allow_adapter_updates=allow_adapter_updates,
            max_body=max_body,
            max_tokens=max_tokens,
            max_n=max_n,
            first_token_seconds=first_token_seconds,
        )
        run(
            base,
            engine,
            server,
            host=host,
            port=port,
            dtype=dtype,
            device=device,
            generator=str(generator) if generator is not None else None,
            drain_seconds=drain_seconds,
            insecure=insecure,
        )


def with_adapter(folder: Path, base: str | None, allow_pickle: bool = False) -> tuple[Any, Any]:
    """The base of an adapter with the adapter loaded, and the tokenizer."""
    from anyadapter.formats.native import load
    from anyadapter.training.base import load_base

    model, tokenizer = load_base(base_of(folder, base))
    load(model, folder, allow_pickle=allow_pickle)
    return model, tokenizer


def base_of(folder: Path, base: str | None) -> str:
    """The base an adapter is for: the one given, else the one its folder names."""
    from anyadapter.core.errors import ArtefactError
    from anyadapter.formats.files import CONFIG, read_json

    name = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not name:
        raise ArtefactError(f"{folder} does not say which base it was trained on; name it with --base.")
    return str(name)


def weighted(source: str) -> tuple[Path, float]:
    """The folder and weight in ``FOLDER=WEIGHT``."""
    from anyadapter.core.errors import ConfigError

    folder, _, weight = source.rpartition("=")
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ConfigError(f"{source!r} is not FOLDER=WEIGHT, such as runs/maths=0.5.") from None


if __name__ == "__main__":
    app()
