"""Every golden case of the folder in use, by the runner of its system: ``golden_runners/<slug>.py``, ``run(case)``.

``pytest -m golden -k <slug>`` runs one system's. A case that no runner knows fails by name.
"""

import importlib

import pytest
from golden_cases import discover, read


@pytest.mark.golden
@pytest.mark.parametrize(("slug", "name"), [pytest.param(*case, id="-".join(case)) for case in discover()])
def test_golden(slug: str, name: str) -> None:
    try:
        runner = importlib.import_module(f"golden_runners.{slug.replace('-', '_')}")
    except ModuleNotFoundError:
        pytest.fail(f"no runner knows the system {slug!r}, so its case {name!r} was not run")
    runner.run(read(slug, name))
