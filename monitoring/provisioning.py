"""The dashboards and the data source as files that Grafana reads when it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from monitoring.dashboards.catalogue import all_dashboards
from monitoring.grafana import FOLDER, SOURCE


def write_files(folder: Path, prometheus: str) -> list[Path]:
    """Write them below `folder`, in place of older ones; return their paths.

    Args:
        prometheus: the URL at which Grafana reaches Prometheus.
    """
    of_dashboards = folder.absolute() / "dashboards"
    of_dashboards.mkdir(parents=True, exist_ok=True)
    source = {**SOURCE, "type": "prometheus", "access": "proxy", "url": prometheus}
    provider = {
        "name": FOLDER["title"],
        "folder": FOLDER["title"],
        "folderUid": FOLDER["uid"],
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": str(of_dashboards)},
    }
    written = []
    for path, value in (
        ("provisioning/datasources/elastic.yaml", {"apiVersion": 1, "datasources": [source]}),
        ("provisioning/dashboards/elastic.yaml", {"apiVersion": 1, "providers": [provider]}),
    ):
        written.append(_write(folder / path, yaml.safe_dump(value, sort_keys=False)))
    for one in all_dashboards():
        written.append(_write(of_dashboards / f"{one['uid']}.json", _text(one)))
    return written


def _text(dashboard: dict[str, Any]) -> str:
    return json.dumps(dashboard, indent=2) + "\n"


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
