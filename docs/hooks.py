"""Puts the catalogue, as the code has it, where a page says ``{{ catalogue }}``, and an example's table and plot, as it left
them in ``results``, where one says ``{{ example NAME }}``.
"""

import re
from pathlib import Path
from typing import Any

from anyadapter.core.catalogue import SYSTEMS


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    markdown = re.sub(r"\{\{ example (\w+) \}\}", lambda found: example(found[1]), markdown)
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
