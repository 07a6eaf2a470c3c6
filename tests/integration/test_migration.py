"""Our side of docs/from-ray-train.md, as a script on real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_migrated_script_trains_and_gives_a_model(cluster: str, tmp_path: Path) -> None:
    """With fewer steps and under a name of its own; everything else is as shown."""
    _, after = blocks(ROOT / "docs" / "from-ray-train.md", "python")
    assert all(after.count(one) == 1 for one in ("steps=112", 'name="digits"'))
    name = f"migrated-{os.getpid()}"
    script = after.replace("steps=112", "steps=8").replace('name="digits"', f'name="{name}"')
    script += "    print(sum(parameter.numel() for parameter in model.parameters()))\n"
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    told, size = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"\d+\.\d+ [0-9a-f]{64}", told)
    assert int(size) == 64 * 64 + 64 + 64 * 10 + 10
    assert (tmp_path / "runs" / name / "result.json").exists()
