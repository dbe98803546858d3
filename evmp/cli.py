"""The command line: argv to a job, to an exit code. The only place that prints results or exits."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from evmp import __version__, logs
from evmp.errors import ConfigError, EvmpError, Interrupted

if TYPE_CHECKING:
    from evmp.plan import Plan
    from evmp.report import Report
    from evmp.sbatch import Kind

EXAMPLES = """
\b
Examples:
  evmp --config job.yaml                     run the job, or go on with it
  evmp --config job.yaml --check             say what would be done, and do one batch of it
  evmp --config job.yaml -Dbatch_size=32     with another value for a key
  evmp --config job.yaml --fresh             forget what was done, and start over
  evmp --config job.yaml --worker 0/4        do a quarter of it, others being done elsewhere
  evmp --config job.yaml --retry-failed      do the failed rows of a finished job again
  evmp export torchvision:resnet18 model     make a model package; see evmp export --help
  evmp status --config job.yaml --watch      say how far it is, from anywhere
  evmp sbatch --config job.yaml --nodes 4    print a script for Slurm; see evmp sbatch --help

\b
Exit codes:
  0 done                         3 could not start: model, input, output
  1 too many rows failed         4 a stage kept dying
  2 bad job file or arguments    130, 143 stopped by a signal; run again to resume
  70 a bug in evmp
"""

_KINDS = {
    "ConfigError": "bad job",
    "SourceError": "input",
    "SinkError": "output",
    "ModelError": "model",
    "CredentialsError": "credentials",
    "TooManyFailures": "failed",
    "WorkerDied": "gave up",
}


EXPORT_EXAMPLES = """
\b
Examples:
  evmp export torchvision:resnet50 out/resnet50
  evmp export torchvision:resnet18 out/cats --weights cats.pth --labels cats.txt --classes 2
  evmp export torchvision:resnet18 out/features --features layer4,fc=logits
  evmp export timm:efficientnet_lite0 out/lite0
  evmp export yolo.onnx out/yolo --type detector -Doutput.boxes.layout=box_classes
"""

SBATCH_EXAMPLES = """
\b
Examples:
  evmp sbatch --config job.yaml --nodes 4                    print the script
  evmp sbatch --config job.yaml --nodes 4 --submit           submit it, and a report behind it
  evmp sbatch --config job.yaml --nodes 4 --submit -- --time=4:00:00 --partition=gpu
  evmp sbatch --config job.yaml --nodes 4 --kind tasks -DcpuRequired=800
"""

STATUS_EXAMPLES = """
\b
Examples:
  evmp status --config job.yaml            say how far the job is
  evmp status --config job.yaml --watch    say it again and again, until it is done

\b
Exit codes:
  0 said so; with --watch, the job is done
  1 with --watch: the job has failed, or nobody works on it any more
  2, 3 bad job file; the staging place cannot be read, or is damaged
"""
WATCH_SECONDS = 5.0

HELP_NAMES = {"help_option_names": ["-h", "--help"]}


@click.group(epilog=EXAMPLES, context_settings=HELP_NAMES, invoke_without_command=True)
@click.option("--config", "config", metavar="JOB.YAML", help="The job file.")
@click.option(
    "-D", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the job file."
)
@click.option("--check", is_flag=True, help="Validate everything, run one batch, print the plan.")
@click.option("--fresh", is_flag=True, help="Start over, and replace a result that is there.")
@click.option("--retry-failed", is_flag=True, help="Do the failed rows of a finished job again.")
@click.option(
    "--worker",
    metavar="K/N",
    default="",
    help="Be worker K of 0 to N-1; without it, what Slurm or the like says, or all of them.",
)
@click.option("--quiet", is_flag=True, help="No progress and no summary, only what went wrong.")
@click.version_option(__version__, prog_name="evmp", message="%(prog)s %(version)s")
@click.pass_context
def command(
    context: click.Context,
    config: str | None,
    overrides: tuple[str, ...],
    check: bool,
    fresh: bool,
    retry_failed: bool,
    worker: str,
    quiet: bool,
) -> None:
    """Predict every row of a table, or every file of a list, as the job file says.

    One result per input row, in input order. A row that fails becomes an error row; a job that is
    stopped or killed goes on where it was when the same command is run again.
    """
    if context.invoked_subcommand:
        if config is not None:
            raise click.UsageError(f"--config does not go with {context.invoked_subcommand}")
        return
    if config is None:
        raise click.UsageError("Missing option '--config'.")
    if retry_failed and (fresh or check):
        raise click.UsageError("--retry-failed does not go with --fresh or --check")
    from evmp.job import load_job
    from evmp.plan import make_plan
    from evmp.progress import Quiet, open_display
    from evmp.rank import find_rank
    from evmp.run import Run

    job = load_job(config, overrides)
    rank = find_rank(job, worker)
    if rank and (fresh or retry_failed):
        raise click.UsageError(
            f"--fresh and --retry-failed are for the whole job, and this is {rank}; add "
            "--worker 0/1 to make it the only one"
        )
    level = logging.WARNING if quiet else logging.INFO
    logs.to_stderr(level)
    plan = make_plan(job, rank)
    if check:
        from evmp.check import check_job

        Run(plan, Quiet(), fresh=fresh).finished()
        click.echo(check_job(plan))
        return
    settings = [*(f"-D{it}" for it in overrides), *(["--worker", worker] if worker else [])]
    resume = shlex.join(["evmp", "--config", config, *settings])
    display = open_display(quiet=quiet)
    logs.send_to(display.emit, level)
    run = Run(plan, display, fresh=fresh, retry=retry_failed)
    try:
        report = run.run()
    finally:
        display.close()
    if quiet:
        return
    if report is None:
        record = run.finished() or {}
        _say(
            f"already done: {record.get('rows')} rows, {record.get('failed')} failed, in "
            f"{plan.target.uri}; {resume} --fresh does it again"
        )
    else:
        _summarise(plan, report)


@command.command("status", epilog=STATUS_EXAMPLES, context_settings=HELP_NAMES)
@click.option("--config", metavar="JOB.YAML", required=True, help="The job file.")
@click.option("-D", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of it.")
@click.option("--watch", is_flag=True, help="Look again every few seconds, until the job is done.")
@click.option("--json", "is_json", is_flag=True, help="Print one line of JSON for each look.")
def status(config: str, overrides: tuple[str, ...], watch: bool, is_json: bool) -> None:
    """Say how far a job is, wherever it runs.

    Rows done and failed, blocks leased and by whom, the rate, and when it will be done. Everything
    is read from the staging place, which must be in reach; nothing is changed. Who watches a job on
    which nobody works for 12 times lease_seconds is told so, and waits no longer.
    """
    from evmp.job import load_job
    from evmp.status import Observer

    observer = Observer(load_job(config, overrides))
    while True:
        seen = observer.look()
        click.echo(seen.as_json() if is_json else seen.in_words())
        if not watch or seen.state == "done":
            return
        if seen.is_given_up:
            sys.exit(1)
        time.sleep(WATCH_SECONDS)
        if not is_json:
            click.echo()


@command.command("export", epilog=EXPORT_EXAMPLES, context_settings=HELP_NAMES)
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--type", "model_type", metavar="TYPE", default="", help="The model_type.")
@click.option(
    "--weights",
    metavar="FILE|NAME",
    default="",
    help="A checkpoint, a name of torchvision's, none.",
)
@click.option("--features", metavar="A,B=NAME", default="", help="What a network shall return.")
@click.option(
    "--classes",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="How many a network tells apart.",
)
@click.option("--labels", metavar="FILE", default="", help="The class names, one a line.")
@click.option("-D", "settings", metavar="KEY=VALUE", multiple=True, help="Set a key of model.yaml.")
@click.option("--force", is_flag=True, help="Replace a package that is there, the whole folder.")
def export(
    source: str,
    folder: Path,
    model_type: str,
    weights: str,
    features: str,
    classes: int,
    labels: str,
    settings: tuple[str, ...],
    force: bool,
) -> None:
    """Make a model package FOLDER of SOURCE, and run it once.

    SOURCE is a TorchScript archive, a program of torch.export, an ONNX model, or the name of a
    network: torchvision:NAME or timm:NAME, whose preprocessing and labels go into model.yaml.
    """
    from evmp.export import Request, export

    nodes = tuple(it.strip() for it in features.split(",") if it.strip())
    request = Request(source, model_type, weights, nodes, classes, labels, settings)
    try:
        click.echo(export(request, folder, force=force))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


@command.command("sbatch", epilog=SBATCH_EXAMPLES, context_settings=HELP_NAMES)
@click.option("--config", metavar="JOB.YAML", required=True, help="The job file.")
@click.option("-D", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of it.")
@click.option(
    "--nodes",
    metavar="N",
    type=click.IntRange(1),
    help="How many nodes, a worker on each; as many as num_worker if left out.",
)
@click.option(
    "--kind",
    type=click.Choice(["array", "tasks", "report"]),
    default="array",
    show_default=True,
    help="An array of single nodes, one job of many tasks, or what comes behind either.",
)
@click.option("--submit", "is_submitted", is_flag=True, help="Submit it, and a report behind it.")
@click.argument("options", metavar="[-- OPTION OF SBATCH...]", nargs=-1, type=click.UNPROCESSED)
def sbatch(
    config: str,
    overrides: tuple[str, ...],
    nodes: int | None,
    kind: Kind,
    is_submitted: bool,
    options: tuple[str, ...],
) -> None:
    """Print the script that runs the job on a Slurm cluster, or submit it.

    CPUs and GPUs of a worker are those of the keys cpuRequired and gpuRequired.
    """
    from evmp.job import load_job
    from evmp.sbatch import script, submit

    job = load_job(config, overrides)
    settings = ["--config", config, *(f"-D{it}" for it in overrides)]
    fill = partial(
        script,
        job,
        n_nodes=nodes or job.num_worker,
        settings=settings,
        options=options,
        evmp=_own_command(),
    )
    if not is_submitted:
        click.echo(fill(kind=kind), nl=False)
        return
    first = submit(fill(kind=kind))
    click.echo(f"submitted {first}")
    if kind != "report":
        report = submit(fill(kind="report"), f"--dependency=afterany:{first}")
        click.echo(f"submitted {report}, which reports once {first} has ended")
        watch = shlex.join(["evmp", "status", *settings, "--watch"])
        click.echo(f"{watch} says how far it is")
        click.echo(f"scancel {first} {report} cancels both")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    # numpy's BLAS would start threads when it is imported, and this process is about to fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGUSR1, lambda signum, frame: _interrupt(signal.SIGTERM, frame))
    try:
        command.main(argv, prog_name="evmp", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except EvmpError as error:
        _say(_in_words(error))
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        _say(f"evmp {__version__} has a bug; please report what is above. Run again to resume.")
        sys.exit(EvmpError.exit_code)
    sys.exit(0)


def _own_command() -> list[str]:
    """Return how this command was called, without arguments."""
    called = Path(sys.argv[0])
    if called.name != "evmp":
        return [sys.executable, "-m", "evmp"]
    return ["evmp" if shutil.which("evmp") == str(called) else str(called.absolute())]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _in_words(error: EvmpError) -> str:
    lines = str(error).splitlines()
    kind = _KINDS.get(type(error).__name__)
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"{len(error.problems)} problems:", *(f"  {line}" for line in lines)])
    return f"{kind}: {error}" if kind else str(error)


def _say(text: str) -> None:
    logs.say(f"evmp: {text}")


def _summarise(plan: Plan, report: Report) -> None:
    from rich.console import Console

    from evmp.report import Reasons

    console = Console(stderr=True)
    console.print(report.table())
    rate = report.new_rows / max(report.seconds, 1e-9)
    failed = f", {report.failed} failed" if report.failed else ""
    shown = plan.target.uri.removeprefix(f"{Path.cwd()}/")
    reasons: Any = Reasons()
    reasons.merge([report.reasons])
    for line in reasons.in_words():
        _say(f"failed: {line}")
    again = f", {report.rows} of them again" if report.kept else ""
    done, result = "done", f"result in {shown}"
    if not report.is_published:
        done, result = f"{plan.rank} is done", "the last worker to finish makes the result"
    _say(
        f"{done}: {report.rows + report.kept} rows{again}{failed}, {report.seconds:.1f} s, "
        f"{rate:.1f} rows/s; {result}"
    )
