"""The example notebook, run in a kernel of its own as a user would."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_the_notebook_runs_from_top_to_bottom(cluster: str, tmp_path: Path) -> None:
    """On the cluster of the tests; a task written in a cell, a killed worker, equal hashes."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [cell for cell in notebook.cells if cell.get("outputs")]
    assert stored == [], "clear all outputs before saving the notebook"
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)})
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    text = "".join(one.text for one in outputs if one.output_type == "stream")
    assert "equal, bit for bit" in text
    assert "worker_lost" in text
    assert "digits are read right" in text
    assert any("image/png" in one.data for one in outputs if "data" in one)
