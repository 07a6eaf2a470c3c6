"""The commands `elastic dashboards` and `elastic top`. Never computes anything itself."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

dashboards_app = typer.Typer(
    no_args_is_help=True, help="Dashboards for Grafana: docs/monitoring.md."
)

_REFRESH_S = 0.25
_PROMETHEUS = "http://localhost:9090"
_Prometheus = Annotated[
    str, typer.Option("--prometheus", metavar="URL", help="Where Grafana reaches Prometheus.")
]


@dashboards_app.command()
def install(
    grafana: Annotated[str, typer.Option(metavar="URL", help="Such as http://localhost:3000.")],
    prometheus: _Prometheus = _PROMETHEUS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also dashboards that were changed by hand.")
    ] = False,
) -> None:
    """Put a data source, a folder and the dashboards into a Grafana.

    GRAFANA_TOKEN holds the token of a service account that is Admin, or USER:PASSWORD. Doing it
    again changes nothing; a newer `elastic` replaces what an older one wrote, and leaves alone what
    was changed by hand since.

    **Example**

        GRAFANA_TOKEN=glsa_... elastic dashboards install --grafana http://localhost:3000
    """
    from monitoring.dashboards.catalogue import all_dashboards
    from monitoring.grafana import Grafana

    face = Grafana(grafana, os.environ.get("GRAFANA_TOKEN", ""))
    try:
        for one in face.install(all_dashboards(), prometheus, overwrite=overwrite):
            Console().print(f"{one.what}: {one.state}", soft_wrap=True)
    finally:
        face.close()


def top(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A job's name, for its newest run, or a folder.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Print it once, do not go on.")] = False,
) -> None:
    """Watch a running job: workers, their shares and speeds, verdicts, where the time goes.

    Drawn four times a second from the run folder; Ctrl-C ends the view, not the job. A run that has
    ended is shown once, as it was at its end.

    **Examples**

        elastic top stdlib-lm
        elastic top runs/with-faults --once
    """
    from rich.live import Live

    from elastic.core.runs import find_run
    from elastic.top import View

    run, console = find_run(name, running=False), Console()
    view = View(run)
    view.read()
    if run.is_running() and not once:
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(view.frame(), console=console, screen=True, auto_refresh=False) as live,
        ):
            while run.is_running():
                time.sleep(_REFRESH_S)
                view.read()
                live.update(view.frame(), refresh=True)
    console.print(view.frame())


@dashboards_app.command()
def write(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made if it is missing.")],
    prometheus: _Prometheus = _PROMETHEUS,
) -> None:
    """Write the dashboards as files that Grafana reads when it starts: its provisioning.

    Copy FOLDER/provisioning into that of Grafana, /etc/grafana/provisioning, or start Grafana with
    GF_PATHS_PROVISIONING=FOLDER/provisioning.

    **Example**

        elastic dashboards write /etc/elastic-dashboards
    """
    from monitoring.provisioning import write_files

    for path in write_files(folder, prometheus):
        Console().print(str(path), soft_wrap=True)
