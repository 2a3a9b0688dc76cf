"""The catalogue tells the truth: a row claims nothing that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from golden_cases import FOLDER
from typer.testing import CliRunner

import anyadapter as aa
from anyadapter.cli import app
from anyadapter.core.catalogue import SYSTEMS, System, method

ROOT = Path(__file__).parents[1]


def test_all_systems_are_listed_once() -> None:
    assert len(SYSTEMS) == len({s.slug for s in SYSTEMS}) == 28


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.slug)
def test_the_status_of_a_row_is_earned(system: System) -> None:
    module = system.slug.replace("-", "_")
    golden = (ROOT / "tests" / "golden_runners" / f"{module}.py").exists() and any(
        (FOLDER / system.slug).glob("*.json")
    )
    if system.status == "planned":
        assert system.methods == ()
        return
    assert golden, "no golden test"
    assert system.methods
    for name in system.methods:
        assert issubclass(method(name), aa.Adapter)
    known = {name for c in FAMILIES for name in aa.Host(c.build()).family.names}
    assert set(system.hosts) <= known
    if system.status == "implemented":
        assert (ROOT / "examples" / f"{module}.py").exists(), "no example"
        assert (ROOT / "docs" / "systems" / f"{system.slug}.md").exists(), "no docs page"


def test_list_as_json() -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    rows = json.loads(result.stdout)
    assert [row["slug"] for row in rows] == [s.slug for s in SYSTEMS]
    assert all({"slug", "system", "modality", "status", "supports"} <= row.keys() for row in rows)
    assert all(row["status"] in ("planned", "partial", "implemented") for row in rows)


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prefix", "ia3", "llama_adapter"])
def test_claims_and_refusals_of_a_method(name: str) -> None:
    """What a method says it can do it does, and what it does not say it refuses."""
    from families import case

    model = case("llama").build().requires_grad_(False)
    cls = method(name)
    adapter = aa.attach(model, cls.Config())
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if "scale" in cls.capabilities:
        adapter.scale = 0.0
        with torch.no_grad():
            ids = torch.arange(14).reshape(2, 7)
            off = model(input_ids=ids).logits
            with aa.disabled(model):
                torch.testing.assert_close(model(input_ids=ids).logits, off)
    else:
        with pytest.raises(aa.ConfigError, match="has no scale"):
            adapter.scale = 0.5
    if "merge" in cls.capabilities:
        aa.merge(model)
        aa.unmerge(model)
    else:
        with pytest.raises(aa.AttachError, match="cannot be merged"):
            aa.merge(model)
