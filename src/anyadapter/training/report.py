"""What a run tells: a line of JSON per log, a progress bar, a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

KEPT = ("loss", "grad_norm", "learning_rate", "eval_loss")  # of a log; the rest is of the clock


class LogFile(TrainerCallback):
    """``log.jsonl``: ``{"stage", "step", "epoch", …}`` with the training loss since the last line, or the evaluation loss.

    A run that goes on from a checkpoint first drops the lines that were written after it.
    """

    def __init__(self, path: Path, stage: int) -> None:
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            earlier = [line for line in read_log(self.path) if line["stage"] < self.stage]
            lines = [*earlier, *(line for log in state.log_history if (line := self.line(log)))]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := self.line(state.log_history[-1])):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def line(self, log: dict[str, Any]) -> dict[str, Any] | None:
        """A line of ours from one of Trainer's, if there is anything in it."""
        kept = {key: log[key] for key in KEPT if key in log}
        return {"stage": self.stage, "step": log["step"], "epoch": log["epoch"], **kept} if kept else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class ProgressBar(TrainerCallback):
    """Steps, losses and the time left, on standard error of the first process."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not state.is_world_process_zero)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.shown: dict[str, float] = {}
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.shown |= {key: value for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if self.bar:
            text = ", ".join(f"{key} {value:.4f}" for key, value in self.shown.items())
            self.bar.update(self.task, description=text or "training")

    def stop(self) -> None:
        """Leave the line as it is and give the cursor back."""
        if self.bar:
            self.bar.stop()


def plot(log: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Training and evaluation loss over steps, all stages one after the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    ends = {line["stage"]: line["step"] for line in log}  # lines are in order: the last of a stage is its length
    start = {stage: sum(n for s, n in ends.items() if s < stage) for stage in ends}
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(start[line["stage"]] + line["step"], line[key]) for line in log if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3)
    for stage, step in start.items():
        if step:
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":", label=None if stage > 2 else "next stage")
    axes.set(xlabel="step", ylabel="loss", title=title)
    if axes.lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
