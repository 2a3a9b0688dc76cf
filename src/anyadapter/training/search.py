"""Several runs that differ in a few settings, and which is best: the section ``search`` of ``anyadapter train CONFIG.yaml``.

::

    search: {adapter.scale: [0.01, 0.1, 1, 10, 100]}

Every combination of the values is a run in a folder of its own under ``output``, called by its values. ``search.json`` says
what each reached. The same call again goes on where a killed one stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyadapter.core.errors import ConfigError, DivergedError
from anyadapter.training.config import RunConfig, read_config, read_yaml, section
from anyadapter.training.report import write_text
from anyadapter.training.run import VERSIONS, RunResult, say, train
from anyadapter.training.tasks import task

SEARCH, FOUND = "search", "search.json"
LONGEST = 200  # bytes of a folder's name, which file systems limit to 255


def search(
    config: Mapping[str, Any] | str | Path, *, overwrite: bool = False, progress: bool = True
) -> tuple[RunResult, dict[str, Any]]:
    """Train with every combination of some settings, and choose by the evaluation rows.

    Args:
        config: as of :func:`anyadapter.training.run.train`, with the section ``search``: lists of values, by section and
            setting, such as ``{"adapter.scale": [1, 10], "training.learning_rate": [1e-3, 1e-2]}``.
        overwrite, progress: as of :func:`~anyadapter.training.run.train`.

    Returns:
        The best run, and what ``search.json`` holds: ``measure``, which is the task's own, or else the evaluation loss; its
        value for each of the ``runs``, None where training diverged; and the ``best`` one's folder.

    Raises:
        ConfigError: a setting or one of the values is refused, there are no evaluation rows, or ``output`` holds a run; all
            this before the first run.
        DivergedError: no run ended with finite numbers.
        ArtefactError: a folder cannot be written or read; the same call goes on.
    """
    values = dict(config if isinstance(config, Mapping) else read_yaml(Path(config)))
    spread = section(values, SEARCH)
    del values[SEARCH]
    if not spread:
        raise ConfigError("search is empty; expected lists such as `adapter.scale: [0.1, 1, 10]`.")
    for key, each in spread.items():
        if key.count(".") != 1 or not isinstance(each, (list, tuple)) or not each:
            raise ConfigError(f"search has {key}: {each!r}; expected lists such as `adapter.scale: [0.1, 1, 10]`.")
    runs = {}
    for chosen in itertools.product(*spread.values()):
        run = combined(values, dict(zip(spread, chosen)))
        runs[Path(run.output).name] = run
    first = next(iter(runs.values()))
    folder, measure = Path(first.output).parent, task(first.data.task).best
    if not (first.data.eval or first.data.eval_rows):
        raise ConfigError("A search needs evaluation rows to choose by: give data.eval or data.eval_rows.")
    if (folder / VERSIONS).exists():
        raise ConfigError(f"{folder} holds a run; choose another output folder for a search.")
    results: dict[str, RunResult] = {}
    found: dict[str, float | None] = {}
    for name, run in runs.items():
        try:
            results[name] = train(run, overwrite=overwrite, progress=progress)
            value = results[name].metrics[measure or "eval_loss"]
            found[name] = value if math.isfinite(value) else None
            say(f"{name}: {measure or 'eval_loss'} {value:.4g}")
        except DivergedError as error:  # the other runs may do better
            found[name] = None
            say(f"{name}: {error}")
    sound = {name: value for name, value in found.items() if value is not None}
    if not sound:
        raise DivergedError(f"None of the {len(runs)} runs in {folder} ended with a finite {measure or 'eval_loss'}.")
    best = (min if measure is None else max)(sound, key=lambda name: sound[name])
    summary = {"measure": measure or "eval_loss", "runs": found, "best": best}
    if int(os.environ.get("RANK", 0)) == 0:
        write_text(folder / FOUND, json.dumps(summary, indent=2) + "\n")
    return results[best], summary


def combined(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> RunConfig:
    """The settings of one run, whose folder is called by what was chosen."""
    changed = dict(values)
    for key, value in chosen.items():
        part, _, setting = key.partition(".")
        mine = {"name": changed[part]} if isinstance(changed.get(part), str) else section(changed, part)
        changed[part] = {**mine, setting: value}
    name = ",".join(f"{key}={value}" for key, value in chosen.items()).replace(os.sep, "_")
    if len(name.encode()) > LONGEST:
        raise ConfigError(
            f"{name[:80]!r} and so on is too long to call a folder by; search for fewer settings at once."
        )
    if "output" in changed:
        changed["output"] = str(Path(str(changed["output"])) / name)
    return read_config(changed)
