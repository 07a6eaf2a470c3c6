"""The command line. Reads what the user typed, calls the face below, prints what came of it.

Never computes anything itself. Ray, torch and matplotlib are imported inside the commands that need
them, so that `elastic --help` answers at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from elastic.cli_experts import experts_app
from elastic.cli_monitoring import dashboards_app, top
from elastic.cli_serve import serve, swap
from elastic.core.errors import ConfigError, ElasticError

if TYPE_CHECKING:
    from elastic.core.config import JobConfig
    from elastic.core.faults import Fault
    from elastic.core.status import Status
    from elastic.report.diagnosis import Diagnosis

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that win over the job file: steps=500 workers.start=2 clip_norm=null",
        show_default=False,
    ),
]
_Running = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the job, or its run folder.")
]
_Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, or a job's name for its newest run.")
]
_Resumed = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, a job's name for its newest run, or where its checkpoints are stored.",
    ),
]

app = typer.Typer(
    name="elastic",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train PyTorch models on workers that come and go.

Faults, slow workers, joins and leaves change *when* a step finishes, never *what* it computes: two
runs of one job file end with the same parameters, bit for bit.

**Try it** (in two terminals)

    elastic train examples/stdlib_lm/job.yaml        # about a minute, 4 workers
    elastic status stdlib-lm                         # from the other terminal
    elastic scale stdlib-lm --workers 2              # the result stays the same
    elastic report stdlib-lm --html                  # see what happened
""",
)
simulate_app = typer.Typer(
    no_args_is_help=True, help="Run the real protocol, or straggler policies, in virtual time."
)
app.add_typer(simulate_app, name="simulate")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(experts_app, name="experts")
app.command()(top)
app.command()(serve)
app.command()(swap)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 1 for an error of a job, 2 for a command that makes no sense."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a task such as examples.x.task:Y lies where the user is
    try:
        app(args=list(arguments) if arguments is not None else None)
    except ElasticError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        message = Text("error: ", style="bold red")
        message.append("\n  ".join(["", *lines] if len(lines) > 1 else lines), style="not bold red")
        Console(stderr=True, soft_wrap=True).print(message)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(Text("interrupted", style="bold red"))
        raise SystemExit(130) from None


@app.command()
def train(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: _Overrides = None,
    faults: Annotated[
        Path | None,
        typer.Option(metavar="FAULTS.yaml", help="Faults to inject, to see that nothing changes."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run folder. [default: runs/NAME-YYYYmmdd-HHMMSS; in ~/ray_results in a Ray job]",
        ),
    ] = None,
) -> None:
    """Train a job, and show its progress.

    Everything it writes goes into the run folder: the resolved job, events, metrics, checkpoints,
    the result. A wrong job file gives all its errors at once, before anything starts.

    **Examples**

        elastic train job.yaml
        elastic train job.yaml steps=500 workers.start=2 task_args.size=10m
        elastic train job.yaml --faults faults.yaml --run-dir runs/with-faults

    **A job file**

        name: stdlib-lm
        task: examples.stdlib_lm.task:StdlibLM
        steps: 200
        batch: {micro_batches: 16, micro_batch_size: 2}
        workers: {start: 4, min: 1, max: 8, threads: 1}

    **A fault file**

        - {do: kill, at: {step: 5, point: after_grant}, target: worker-1}
        - {do: stop, at: {step: 9}, target: worker-2, for_s: 30}
    """
    from elastic.core.config import load_job
    from elastic.core.faults import load_faults
    from elastic.core.runs import RunFolder, new_run_dir

    config = load_job(job, overrides or ())
    _needs_task(config, job)
    schedule = load_faults(faults, num_steps=config.steps) if faults else ()
    if run_dir is None:
        run_dir = new_run_dir(config.name)
    elif RunFolder(run_dir).job_json.exists():
        raise ConfigError(
            f"--run-dir {run_dir}: holds a run already; go on with it by: elastic resume {run_dir}"
        )
    _run(config, run_dir, faults=schedule, resume=False)


@app.command()
def resume(run: _Resumed, overrides: _Overrides = None) -> None:
    """Go on with a run from its newest checkpoint, to the bit as if it had never ended.

    The number of workers may change; what the model computes may not. Where the run folder was lost
    with its machine, the folder or URI of its checkpoints does: the rest gets a new run folder.

    **Examples**

        elastic resume runs/stdlib-lm-20250131-120000
        elastic resume stdlib-lm workers.start=2 steps=400
        elastic resume s3://bucket/stdlib-lm
    """
    from elastic.core.config import load_job
    from elastic.core.runs import find_run, new_run_dir

    begun = _job_of_checkpoints(run)
    if begun is not None:
        config = load_job(begun, overrides or ())
        _needs_task(config, Path(run))
        _run(config, new_run_dir(config.name), faults=(), resume=True)
        return
    folder = find_run(run, running=False)
    if folder.is_running():
        raise ConfigError(f"{folder.path}: this job is still running; elastic stop {run} ends it")
    config = load_job(folder.job_json, overrides or ())
    _needs_task(config, folder.job_json)
    _run(config, folder.path, faults=(), resume=True)


@app.command()
def status(name: _Running) -> None:
    """Say how a running job is doing.

    **Example**

        elastic status stdlib-lm
    """
    from elastic.progress import event_line, numbers_line

    now = _status_of(name)
    console = Console()
    console.print(Text(f"{now.phase}, step {now.step} of {now.num_steps}", style="bold"))
    console.print(numbers_line(now))
    console.print(Text(f"   aggregator {now.aggregator}"))
    console.print(Text(f"   run folder {now.run_dir}"), soft_wrap=True)
    for event in now.events[-8:]:
        console.print(event_line(event, float(now.events[0]["time_s"])))


@app.command()
def scale(
    name: _Running,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, metavar="N", help="Workers wanted.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", "-n", min=1, metavar="N", help="Hosts wanted.")
    ] = None,
) -> None:
    """Change the number of workers of a running job, between workers.min and workers.max, or of
    the hosts that it runs on, between nodes.min and nodes.max.

    New workers join as soon as they have started; those that leave finish what they hold. Ray's
    autoscaler, if the cluster has one, is asked for hosts that are missing; those that leave do so
    as planned. The result of the job does not change.

    **Example**

        elastic scale stdlib-lm --workers 6

        elastic scale stdlib-lm --workers 24 --nodes 3
    """
    from elastic.handle import connect

    if workers is None and nodes is None:
        raise typer.BadParameter("needs --workers N or --nodes N, or both")
    handle = connect(name)
    before = handle.status()
    handle.scale(workers, nodes)
    changes = []
    if workers is not None:
        changes.append(f"{before.target_workers} → {workers} workers")
    if nodes is not None:
        changes.append(f"{before.target_nodes} → {nodes} nodes")
    Console().print(f"{name}: {', '.join(changes)}", soft_wrap=True)


@app.command()
def undo(
    name: _Running,
    culprit: Annotated[
        str, typer.Argument(metavar="CULPRIT", help="As verdicts name it: 'worker 3'; or all.")
    ] = "all",
) -> None:
    """Take back what monitoring.steering did about a verdict on a worker, node or link.

    A worker that was replaced is gone, and its place is taken: but nothing of the kind is done to
    that culprit again by itself, and what was done counts against no budget any more.

    **Example**

        elastic undo stdlib-lm "worker 3"
    """
    from elastic.handle import connect

    for what in connect(name).undo(culprit):
        Console().print(f"{name}: not any more: {what}", soft_wrap=True)


@app.command()
def stop(name: _Running) -> None:
    """Stop a running job: it finishes the step and writes a checkpoint.

    `elastic resume` goes on from there.

    **Example**

        elastic stop stdlib-lm
    """
    from elastic.handle import connect

    handle = connect(name)
    run_dir = handle.status().run_dir
    handle.stop()
    Console().print(
        f"{name}: stops after this step; go on by: elastic resume {run_dir}", soft_wrap=True
    )


@app.command()
def report(
    run: _Run,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page to zoom into, not a picture.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="[default: RUN/report.png or RUN/report.html]"
        ),
    ] = None,
) -> None:
    """Show what happened in a run: its loss, its step times, what each worker did when, and faults.

    Works on finished and on running jobs; do it again to see what came since.

    By default a picture of the whole run, with its most eventful seconds enlarged. With `--html` a
    page with everything: curves of the loss, metrics, evaluations, step time, throughput, workers
    and generations, around a timeline of every micro-batch and every fault, to zoom and to move in;
    the events, the settings and the result. It is one file that asks no network for anything: open
    it in a browser, attach it to a mail. Of very long runs it keeps what stands out, and says what
    it left out.

    **Examples**

        elastic report stdlib-lm                            # newest run of the job: RUN/report.png
        elastic report stdlib-lm --html                     # RUN/report.html
        elastic report runs/with-faults --html -o faults.html
    """
    from elastic.core.runs import find_run

    folder = find_run(run, running=False)
    if html:
        from elastic.report.page import write_page

        path = write_page(folder.path, output)
    else:
        from elastic.report.picture import draw_picture

        path = draw_picture(folder.path, output)
    Console().print(str(path), soft_wrap=True)


@app.command()
def diagnose(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, a job's name for its newest run, or a trace: .parquet or .csv.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="[default: RUN/diagnosis.png, or beside a trace]"
        ),
    ] = None,
) -> None:
    """Say what slowed a run or stopped it: when, who, why, and how much time each cause cost.

    Prints where the time went (the parts add up to the wall time), then the causes, and draws
    workers by time: who computed longer than its peers when. Works on finished and on running jobs.

    A **trace** of any other framework does, too: a Parquet or CSV file with the columns worker,
    step, operation, start, end, and if there are any role and micro_batch. Operations are compute,
    forward, backward, optimizer, send, receive, allreduce, allgather, reducescatter, alltoall,
    barrier, recompute, wait, evaluate, checkpoint, recover, start; times are seconds of one clock.

    **Examples**

        elastic diagnose stdlib-lm
        elastic diagnose runs/with-faults -o why.png
        elastic diagnose trace.parquet
    """
    from elastic.report.diagnosis import diagnose as find_causes
    from elastic.report.diagnosis import diagnose_trace
    from elastic.report.heatmap import draw_heatmap

    if Path(run).suffix in (".parquet", ".csv"):
        from elastic.report.trace import read_trace

        found, title = diagnose_trace(read_trace(Path(run))), Path(run).name
        default = Path(run).with_suffix(".png")
    else:
        from elastic.core.runs import find_run
        from elastic.report.story import read_story

        folder = find_run(run, running=False)
        found, title = find_causes(read_story(folder.path)), folder.path.name
        default = folder.diagnosis_png
    _print_diagnosis(found)
    Console().print(str(draw_heatmap(found, title, output or default)), soft_wrap=True)


@simulate_app.command()
def protocol(
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Try seeds 0 to N-1.")] = 1000,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Try this seed alone.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Go on through the seeds for so long, whatever --seeds says."),
    ] = None,
) -> None:
    """Try random schedules of faults on the step protocol, and check its invariants.

    The same worker, aggregator and coordinator code as in a real job, in virtual time: messages
    delayed and repeated, processes killed, stopped and resumed at any point. A seed decides
    everything; the first schedule that breaks an invariant is shrunk, printed, and gives exit
    code 1.

    **Examples**

        elastic simulate protocol --seeds 10000
        elastic simulate protocol --minutes 5
        elastic simulate protocol --seed 4711        # again, to look at it
    """
    from elastic.core.simulator.search import search

    console, start_s = Console(), time.monotonic()
    numbers: Iterable[int] = range(seeds)
    if seed is not None:
        numbers, minutes = (seed,), None
    elif minutes is not None:
        numbers = itertools.count()
    with console.status("starting") as spinner:
        tried = search(
            numbers,
            processes=1 if seed is not None else len(os.sched_getaffinity(0)),
            deadline_s=60 * minutes if minutes is not None else None,
            found=lambda num: spinner.update(f"{num} schedules, no violation"),
        )
    if tried.failure is not None:
        number = tried.failure.schedule.seed
        console.print(Text(f"seed {number} breaks the protocol", style="bold red"))
        console.print(Text(str(tried.failure)), soft_wrap=True)
        raise typer.Exit(1)
    took_s = time.monotonic() - start_s
    per_minute = 60 * tried.num_schedules / took_s
    console.print(
        f"{tried.num_schedules} schedules with {tried.num_faults} faults in {took_s:.1f} s"
        f" ({per_minute:,.0f} a minute), no violation"
    )


@simulate_app.command()
def stragglers(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TRACE|MODEL",
            help="An .npz file with delays, or gilbert-elliott[:p_slow=0.05,p_ok=0.9,...].",
        ),
    ],
    policies: Annotated[
        str, typer.Option(metavar="A,B,...", help="Such as uncoded,frc/3,m_sgc/1/2/16,auto.")
    ] = "",
    workers: Annotated[int, typer.Option(min=2, help="Of a model; a trace has its own.")] = 256,
    gradients: Annotated[int, typer.Option(min=20, help="Global batches to compute.")] = 480,
    fixed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a task's time that its load leaves as is.")
    ] = 0.5,
    alpha: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Instead: what a whole batch adds to a delay."),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="At which the delays were seen. [default: 1/workers]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.png", help="The plot.")
    ] = Path("stragglers.png"),
) -> None:
    """Compare what can be done about stragglers: a table, and a plot of time against policy.

    Recorded rounds are drawn again in blocks, to make up as many as are needed. `auto` probes,
    chooses and reconsiders as in a real run; its probe counts.

    **Examples**

        elastic simulate stragglers gilbert-elliott --fixed 0.9
        elastic simulate stragglers gilbert-elliott:p_slow=0.1,p_ok=0.2 --policies frc/1,auto
        elastic simulate stragglers delays.npz --alpha 1.12 --load 0
    """
    from rich.table import Table

    from elastic.core.simulator.stragglers import POLICIES, compare, make_delays, read_delays
    from elastic.report.straggler_picture import draw_times

    console = Console()
    seconds = read_delays(source, num_rounds=gradients + 20, num_workers=workers, seed=seed)
    delays = make_delays(seconds, load=load, fixed=fixed, rate_s=alpha)
    names = policies.split(",") if policies else list(POLICIES)
    with console.status("simulating"):
        outcomes = compare(names, delays, gradients, seed)
    table = Table(box=None, header_style="bold")
    table.add_column("policy")
    for title in ("total s", "/ first", "median round s", "longest round s", "load", "lost"):
        table.add_column(title, justify="right")
    for one in outcomes:
        ratio = one.total_s / outcomes[0].total_s
        numbers = (one.total_s, ratio, one.median_s, one.longest_s, one.load, one.lost)
        table.add_row(one.policy, *(f"{number:.3g}" for number in numbers))
    console.print(table)
    for one in outcomes:
        if one.reason:
            console.print(Text(f"{one.policy}: {one.reason}"), soft_wrap=True)
    title = f"{gradients} gradients, {delays.num_workers} workers, {Path(source).name}"
    console.print(f"plot: {draw_times(outcomes, output, title)}")


def _print_diagnosis(found: Diagnosis) -> None:
    """Where the time went, and why."""
    from elastic.report.diagnosis import MOST_TOLD
    from monitoring.account import PARTS

    console, account = Console(), found.account
    console.print(Text(f"{account.wall_s:.1f} s, goodput {account.goodput:.1%}", style="bold"))
    for part, seconds in account.seconds.items():
        if seconds > 0:
            console.print(
                f"{seconds:10.2f} s {account.share(part):6.1%}  {part}: {PARTS[part]}",
                highlight=False,
            )
    shown = found.causes[:MOST_TOLD]
    console.print(Text("what slowed it down" if shown else "nothing slowed it down", style="bold"))
    for one in shown:
        head = f"{one.cost_s:10.2f} s  at {one.begin_s:.1f} s, step {one.step}: "
        console.print(Text(f"{head}{one.what}. {one.reason}"), soft_wrap=True)
    if len(found.causes) > len(shown):
        console.print(f"             and {len(found.causes) - len(shown)} more")


def _status_of(name: str) -> Status:
    """From the run folder, at once; from the job, by way of Ray, if it lies elsewhere."""
    from elastic.core.runs import find_run
    from elastic.core.status import read_status

    with contextlib.suppress(ConfigError):
        if (written := read_status(find_run(name))) is not None:
            return written
    from elastic.handle import connect

    return connect(name).status()


def _job_of_checkpoints(location: str) -> dict[str, Any] | None:
    """The job whose checkpoints lie at an absolute path or a URI; None if that is a run's name."""
    from elastic.core.storage import is_uri

    is_run = (Path(location) / "job.json").exists() or not Path(location).is_absolute()
    if is_run and not is_uri(location):
        return None
    from elastic.core.checkpoint import job_of, latest_checkpoint

    if not is_uri(location) and latest_checkpoint(location) is None:
        return None
    job = job_of(location)
    return {**job, "checkpoint": {**job["checkpoint"], "storage": location}}


def _needs_task(config: JobConfig, path: Path) -> None:
    if not config.task:
        raise ConfigError(f"{path}: task: missing; needs package.module:Class")


def _run(config: JobConfig, run_dir: Path, *, faults: tuple[Fault, ...], resume: bool) -> None:
    """Run a job to its end behind a live display."""
    from elastic.driver import run_job
    from elastic.progress import make_progress, print_summary

    console = Console()
    with make_progress(console, config.name) as progress:
        result = run_job(
            config, run_dir=run_dir, faults=faults, resume=resume, on_status=progress.show
        )
    print_summary(console, run_dir, result.metrics, result.events)
