"""The commands `elastic experts ...`: the way from one data set to a model repository.

Never computes anything itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from elastic.experts.config import ExpertsConfig

experts_app = typer.Typer(
    no_args_is_help=True,
    help="""Experts trained apart, and a router over them: docs/experts.md.

One file says all: `partition`, `train`, `router`, `evaluate`, `pack`, in this order, each again
where it was cut short. `elastic serve FOLDER/repository` then serves them.
""",
)

_File = Annotated[Path, typer.Argument(metavar="EXPERTS.yaml", help="The experts file.")]
_Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that win over the file: partition.num_experts=8 expert.steps=500",
        show_default=False,
    ),
]


@experts_app.command()
def partition(file: _File, settings: _Settings = None) -> None:
    """Cut the data set into one for each expert, and one that nobody trains on.

    Rows that are alike go together: k-means in two steps, over pixels, words, a column, or what a
    function of yours makes of them. The data is read in batches: it may be larger than memory.

    **Example**

        elastic experts partition examples/digits_experts/experts.yaml
    """
    from elastic.experts.partition import partition as cut

    config = _load(file, settings)
    for name, num in cut(config)["rows"].items():
        _tell(f"{name:<12} {num:>9,} rows")
    _tell(str(config.root / "partition"))


@experts_app.command()
def train(file: _File, settings: _Settings = None) -> None:
    """Train each expert alone, and the monolith that they are compared with.

    Each is an elastic job, an island: nothing is exchanged between them. As many run at once as
    there is room for (islands.cpus each). One that is lost begins again at its newest checkpoint
    and delays only itself; so does this command where it was ended.

    **Example**

        elastic experts train examples/digits_experts/experts.yaml islands.workers=2
    """
    from elastic.experts.jobs import expert_jobs
    from elastic.experts.partition import read_partition
    from elastic.experts.training import train as train_all

    config = _load(file, settings)
    read_partition(config)
    train_all(expert_jobs(config), config.islands, _tell)


@experts_app.command()
def router(file: _File, settings: _Settings = None) -> None:
    """Train the router: which expert's subset is a noisy image, a text so far, an input from?

    An elastic job too, on all subsets in the proportions that they have.

    **Example**

        elastic experts router examples/digits_experts/experts.yaml
    """
    from elastic.experts.jobs import router_jobs
    from elastic.experts.partition import read_partition
    from elastic.experts.training import train as train_all

    config = _load(file, settings)
    read_partition(config)
    train_all(router_jobs(config), config.islands, _tell)


@experts_app.command()
def evaluate(file: _File, settings: _Settings = None) -> None:
    """Choose the selection policy on validation data, and compare on test data.

    Arms: the monolith of the same operations, the chosen policy, all experts, top-1, top-2, a mass
    threshold, the expert of a subset drawn beforehand, one drawn at every step; and nulls, which
    must do worse: all alike, experts swapped, subsets drawn by lot. Of images also bars that need
    no network. Writes evaluation.json, table.md and pictures into FOLDER/evaluation.

    **Example**

        elastic experts evaluate examples/digits_experts/experts.yaml
    """
    from elastic.experts.evaluation import evaluate as measure
    from elastic.experts.pictures import draw
    from elastic.experts.table import render

    config = _load(file, settings)
    found = measure(config, _tell)
    table = config.root / "evaluation" / "table.md"
    table.write_text(render(found), encoding="utf-8")
    _tell(table.read_text(encoding="utf-8"))
    for path in (table, *draw(config, found)):
        _tell(str(path))


@experts_app.command()
def pack(
    file: _File,
    settings: _Settings = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Whose models; by default the first seed's.")
    ] = None,
) -> None:
    """Write the model repository that `elastic serve` takes: experts, router, chosen policy.

    Done again it adds new versions, which a server that runs takes up.

    **Example**

        elastic experts pack examples/digits_experts/experts.yaml
    """
    from elastic.experts.packing import pack as write

    config = _load(file, settings)
    repository = write(config, config.seeds[0] if seed is None else seed)
    for one in repository.manifest.experts:
        _tell(f"{one.name:<12} version {one.version}, {one.num_parameters:,} parameters")
    _tell(str(repository.path))


def _load(file: Path, settings: list[str] | None) -> ExpertsConfig:
    from elastic.experts.config import load_experts

    return load_experts(file, settings or ())


def _tell(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False)
