"""`scripts/testbed`: hosts on one machine, by hand. Only reads what was typed and shows what is."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.hosts import NEEDS_ROOT, Direction, Host, HostError
from scripts.testbed import SOON_NOTICED, Settings, Testbed, has_raylet

app = typer.Typer(
    name="scripts/testbed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""A Ray cluster of several hosts on this machine, to cut, slow, freeze and kill.

A host is a set of namespaces with its own network, processes, `/dev/shm` and `/tmp/ray`; all other
files are those of the machine. h1 is the head. Needs root.

    scripts/testbed up 3
    scripts/testbed run h1 -- elastic train examples/stdlib_lm/job.yaml
    scripts/testbed kill h2      # from another terminal
    scripts/testbed status
    scripts/testbed down
""",
)

_Context = typer.Context
_HostName = Annotated[str, typer.Argument(metavar="HOST", help="h1, h2, ...")]
_Peer = Annotated[
    str | None, typer.Option(metavar="HOST", help="Only between the two; all others reach both.")
]


def main() -> None:
    """Entry point. Exits with 1 for what cannot be done, 2 for a command that makes no sense."""
    try:
        app()
    except HostError as error:
        message = Text("error: ", style="bold red").append(str(error), style="not bold red")
        Console(stderr=True, soft_wrap=True).print(message)
        raise SystemExit(1) from None


@app.callback()
def _choose(
    context: _Context,
    name: Annotated[str, typer.Option(help="Which testbed; there may be several.")] = "testbed",
) -> None:
    if os.geteuid() != 0:
        raise HostError(NEEDS_ROOT)
    context.obj = Testbed(name)


@app.command()
def up(
    context: _Context,
    num_hosts: Annotated[int, typer.Argument(metavar="N", help="How many hosts.", min=1)],
    cpus: Annotated[int, typer.Option(help="Cores of each host, as Ray counts.", min=0)] = 2,
    system_config: Annotated[
        str, typer.Option(help="Ray's internal settings. {} is Ray's own: a dead host costs 60 s.")
    ] = json.dumps(SOON_NOTICED),
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="With Ray's dashboard, for `ray job submit`.")
    ] = False,
) -> None:
    """Make N hosts with Ray on each. RAY_* variables count for all of them."""
    settings = Settings(cpus=cpus, system_config=_parsed(system_config), dashboard=dashboard)
    context.obj.up(num_hosts, settings)
    status(context)


def _parsed(system_config: str) -> dict[str, Any]:
    try:
        parsed = json.loads(system_config)
    except json.JSONDecodeError as error:
        raise HostError(f"--system-config {system_config!r} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise HostError(f"--system-config {system_config!r} is not an object of names and values")
    return parsed


@app.command()
def status(context: _Context) -> None:
    """Show the hosts, and what Ray thinks of them."""
    bed: Testbed = context.obj
    bed.host("h1")  # or say that there is none
    table = Table("host", "address", "is", "link", "raylet", "for Ray", "processes")
    try:
        alive = bed.alive()
    except HostError:  # the table says why: the head is down, or has no raylet
        alive = None
    for host in bed.hosts:
        verdict = "?" if alive is None else "alive" if host.name in alive else "dead"
        raylet = "runs" if has_raylet(host) else "none"
        count = str(len([one for one in host.processes() if one.own_pid is not None]))
        table.add_row(host.name, host.address, _is(host), _link(host), raylet, verdict, count)
    Console().print(table)


def _is(host: Host) -> str:
    return "frozen" if host.is_frozen else "up" if host.is_up else "down"


def _link(host: Host) -> str:
    if host.is_cut:
        return "cut"
    rate = host.rate_bytes_per_s
    return "fast" if rate is None else f"{rate * 8 / 1e6:g} Mbit/s"


@app.command()
def down(context: _Context) -> None:
    """Take everything away: hosts, processes, network, files."""
    context.obj.down()


@app.command()
def add(context: _Context) -> None:
    """Add one more host, which joins the cluster."""
    Console().print(context.obj.add().name)


@app.command()
def start(context: _Context, host: _HostName) -> None:
    """Start Ray on a host that was killed, or whose raylet gave up after a cut or a freeze."""
    context.obj.start(context.obj.host(host))


@app.command()
def kill(context: _Context, host: _HostName) -> None:
    """SIGKILL all processes of a host. Its shared memory is gone, its /tmp/ray stays."""
    context.obj.host(host).kill()


@app.command()
def cut(context: _Context, host: _HostName, peer: _Peer = None) -> None:
    """Pull a host's cable: what is sent gets lost, and nobody is told."""
    if peer is None:
        context.obj.host(host).cut()
    else:
        context.obj.host(host).part(context.obj.host(peer))


@app.command()
def join(context: _Context, host: _HostName, peer: _Peer = None) -> None:
    """Plug a host's cable in again. Its raylet ends if it was given up meanwhile: `start` it."""
    if peer is None:
        context.obj.host(host).join()
    else:
        context.obj.host(host).meet(context.obj.host(peer))


@app.command()
def slow(
    context: _Context,
    host: _HostName,
    rate: Annotated[str, typer.Argument(metavar="RATE", help="200mbit, 1gbit, ...")],
    direction: Annotated[
        Direction, typer.Option(help="Of its link: what it sends, what it receives, or both.")
    ] = "both",
    peer: _Peer = None,
) -> None:
    """Limit a host's link, or only what goes between it and a peer, which is both directions."""
    if peer is None:
        context.obj.host(host).slow(rate, direction)
    elif direction != "both":
        raise HostError(f"--direction {direction} is of a host's whole link; leave out --peer")
    else:
        context.obj.host(host).slow_to(context.obj.host(peer), rate)


@app.command()
def fast(context: _Context, host: _HostName, peer: _Peer = None) -> None:
    """Take the limit of a host's link away."""
    if peer is None:
        context.obj.host(host).fast()
    else:
        context.obj.host(host).fast_to(context.obj.host(peer))


@app.command()
def freeze(context: _Context, host: _HostName) -> None:
    """SIGSTOP all processes of a host."""
    context.obj.host(host).freeze()


@app.command()
def thaw(context: _Context, host: _HostName) -> None:
    """SIGCONT all processes of a host. Its raylet ends if it was given up meanwhile: `start` it."""
    context.obj.host(host).thaw()


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    context: _Context,
    host: _HostName,
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
) -> None:
    """Run a command on a host, where RAY_ADDRESS names the cluster. `run h2 -- bash` is a shell."""
    bed: Testbed = context.obj
    command = bed.host(host).command(*words)
    os.execvpe(command[0], command, bed.environment())


if __name__ == "__main__":
    main()
