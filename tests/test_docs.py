"""The documentation's Python is run: the blocks of a page, one after another, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from markdown import markdown

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_of_code_is_rendered_as_one() -> None:
    spec = spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(hooks := module_from_spec(spec))
    for page in DOCS.rglob("*.md"):
        assert "```" not in markdown(hooks.on_page_markdown(page.read_text()), extensions=["pymdownx.superfences"]), (
            page
        )


def pages() -> list[Path]:
    """The pages with Python in them; a block marked ``no-run`` needs what is not here."""
    return sorted(
        p
        for p in DOCS.rglob("*.md")
        if BLOCK.search(re.sub(r"^```python no-run.*?^```", "", p.read_text(), flags=re.M | re.S))
    )


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(DOCS).as_posix())
def test_the_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = [m.group(1) for m in BLOCK.finditer(page.read_text()) if not m.group(0).startswith("```python no-run")]
    (tmp_path / "page.py").write_text("\n".join(blocks))
    # The pages' adapter trained on 2 cores must not take minutes: they are written to be short.
    run = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
