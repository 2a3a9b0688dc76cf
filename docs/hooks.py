"""Puts the catalogue, as the code has it, where a page says ``{{ catalogue }}``, what each method can do where one says
``{{ methods }}``, and an example's table and plot, as it left them in ``results``, where one says ``{{ example NAME }}``.
"""

import re
from pathlib import Path
from typing import Any

from anyadapter.core.catalogue import SYSTEMS, method, methods


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    markdown = markdown.replace("```python no-run", "```python")  # a mark for the tests, which renderers do not know
    markdown = re.sub(r"\{\{ example (\w+) \}\}", lambda found: example(found[1]), markdown)
    markdown = re.sub(r"\{\{ methods \}\}", lambda _: capabilities(), markdown)
    if "{{ catalogue }}" not in markdown:
        return markdown
    rows = [
        "| system | modality | status | methods | supports | tested hosts | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in SYSTEMS:
        supports = "; ".join(f"{name}: {', '.join(can) or 'attach'}" for name, can in system.supports.items())
        methods, hosts = ", ".join(f"`{m}`" for m in system.methods), ", ".join(system.hosts)
        rows.append(
            f"| {system.system} | {system.modality} | {system.status} | {methods} | {supports} | {hosts} | {system.note} |"
        )
    return markdown.replace("{{ catalogue }}", "\n".join(rows))


def example(name: str) -> str:
    """The table and the plot of an example. A missing one fails the build."""
    folder = Path(__file__).parent / "results"
    return f"{(folder / f'{name}.md').read_text()}\n![{name}](../results/{name}.png)\n"


def capabilities() -> str:
    """A table of the methods and what they can do."""
    known = {name: method(name).capabilities for name in methods()}
    verbs = ["scale", "merge", "weighted_sum", "average", "route", "slice_merge"]
    rows = ["| method | " + " | ".join(verbs) + " |", "|---" * (len(verbs) + 1) + "|"]
    rows += [
        f"| `{name}` | " + " | ".join("yes" if verb in can else "" for verb in verbs) + " |"
        for name, can in known.items()
    ]
    return "\n".join(rows)
