"""The commands `elastic serve` and `elastic swap`. Never computes anything itself."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.text import Text

from elastic.core.errors import ConfigError


def serve(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="REPO|CONFIG.yaml", help="A model repository's folder, or a file of settings."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that win: port=9000 placement.mode=distributed batching.fixed=true",
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print what `serve deploy` takes, and start nothing."),
    ] = False,
    new_key: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help="Print a new API key and its settings."),
    ] = None,
) -> None:
    """Serve experts behind their router: HTTP APIs, and a page to generate with.

    Watches the repository's folder: new versions of experts and router, added and removed experts
    are taken over without dropping a request. Runs until Ctrl-C, beside training jobs where there
    are any.

    **Examples**

        elastic serve models/digits
        elastic serve models/digits placement.mode=distributed placement.expert_replicas=2
        elastic serve serving.yaml port=9000
        elastic serve --new-key alice                    # then put what it prints under keys:
        elastic serve serving.yaml --print-config > deploy.yaml && serve deploy deploy.yaml
    """
    if new_key is not None:
        _print_key(new_key)
        return
    if source is None:
        raise typer.BadParameter("needs REPO or CONFIG.yaml; elastic serve --help says more")
    from serve.settings import load_serving

    settings = load_serving(source, overrides or ())
    from serve.launch import Deployed, config, place, start, told_prometheus

    if print_config:
        resolved = settings.model_copy(update={"repository": settings.repository.resolve()})
        text = yaml.safe_dump(config(resolved, place(settings).mode), sort_keys=False)
        typer.echo(text, nl=False)
        return
    from ray import serve as ray_serve

    from elastic.cluster import local_cluster

    console = Console()
    with local_cluster(), contextlib.suppress(KeyboardInterrupt):
        placed = place(settings)
        console.print(Text(f"{placed.mode}: {placed.reason}"))
        start(settings)
        deployed = Deployed(settings, placed.mode)
        try:
            where = f"http://{settings.host}:{settings.port}"
            console.print(Text(f"{deployed.name} answers at {where}  (Ctrl-C ends it)"))
            with told_prometheus(deployed.name, settings):
                while True:
                    time.sleep(settings.poll_s)
                    deployed.step()
        finally:
            deployed.stop()
            if not ray_serve.status().applications:
                ray_serve.shutdown()  # type: ignore[no-untyped-call]


def _print_key(name: str) -> None:
    from serve.keys import new_key

    key, digest = new_key()
    console = Console()
    console.print(Text("The key, shown only now: ").append(key, style="bold"), soft_wrap=True)
    console.print(Text("Its settings:"))
    typer.echo(yaml.safe_dump({"keys": [{"name": name, "sha256": digest}]}), nl=False)


def swap(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="A model repository.")],
    expert: Annotated[str, typer.Argument(metavar="EXPERT|router", help="What is replaced.")],
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder or checkpoint, whose newest good one counts."
        ),
    ],
    averaged: Annotated[
        bool, typer.Option("--averaged", help="The average that a job with ema keeps.")
    ] = False,
) -> None:
    """Put what a training job has trained so far into a repository, as a new version.

    The job may still run. Whoever serves the repository takes the version over without dropping a
    request; the old one stays in the folder until it is pruned.

    **Examples**

        elastic swap models/digits expert-2 runs/expert-2
        elastic swap models/digits router s3://bucket/router --averaged
    """
    from elastic.core.experts.repository import Repository
    from elastic.core.trained import load_model

    found = Repository.open(repository)
    is_router = expert == "router"
    module = found.load_router() if is_router else found.load_expert(expert)
    if is_router and found.manifest.router.outputs != found.names:
        outputs = ", ".join(found.manifest.router.outputs)
        raise ConfigError(f"{repository}: the router's outputs are {outputs}; needs a new router")
    weights = load_model(run, module, averaged=averaged).state_dict()
    changed = found.replace_router(weights) if is_router else found.replace_expert(expert, weights)
    entry = changed.manifest.router if is_router else changed.expert(expert)
    Console().print(f"{repository}: {expert} is version {entry.version} now", soft_wrap=True)
