"""Scripts that run a job on a Slurm cluster.

Slurm starts workers, and fills up those that nodes have taken along; which rows are done, and by
whom, is the ledger's alone to say. So a script has little to do: start a worker with what Slurm has
given, start it again where it was killed, and let it commit and go on later where its time is over.

`config/slurm/` holds what `script` makes of the job in config/demo.yaml.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from evmp.errors import ConfigError, Problem

if TYPE_CHECKING:
    from evmp.job import Job

Kind = Literal["array", "tasks", "report"]

_DOES: Final[dict[Kind, str]] = {
    "array": "One worker of an evmp job in each element of an array",
    "tasks": "The workers of an evmp job as the tasks of one Slurm job",
    "report": "Does what the workers of an evmp job have left, publishes, and says how it went",
}
_LOG: Final[dict[Kind, str]] = {"array": "%x-%A_%a", "tasks": "%x-%j", "report": "%x-report-%j"}

_HEAD: Final = """\
#!/bin/bash
# {does}, made by:
#   {made_by}
{options}

worker=({worker})
"""

_LOOP: Final = """\

leave= # once somebody wants us to: end, or requeue
trap 'leave=end' TERM # Slurm has told the worker, too, and requeues what it preempts
trap 'leave=requeue; {tell}' USR1 # the time is nearly over: commit, and go on later

# Errors would be the same again. What a signal has killed, by lack of memory perhaps, is not.
code=143
starts=0
until [[ $leave ]] || ((code < 128 || starts++ == 20)); do
    "${{worker[@]}}" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    code=$?
    [[ $leave ]] || ((code < 128)) || {{ echo "evmp: killed, $code; again" >&2; sleep 1; }}
done
if [[ $leave == requeue ]] && ((code >= 128 && ${{SLURM_RESTART_COUNT:-0}} < 1000)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
{last}exit "$code"
"""


def script(
    job: Job,
    kind: Kind,
    n_nodes: int,
    *,
    settings: Sequence[str],
    options: Sequence[str] = (),
    evmp: Sequence[str] = ("evmp",),
) -> str:
    """Return a batch script.

    Args:
        n_nodes: elements of the array, or nodes of the tasks.
        settings: what the job is made of: `--config job.yaml`, and overrides of its keys.
        options: further options of sbatch, which count more than ours.
        evmp: the command on the nodes.

    Raises:
        ConfigError: an option is none, or may not be set.
    """
    alone = ["-Dnum_worker=1"] * (kind == "report" or n_nodes == 1)
    worker, tell, last = shlex.join([*evmp, *settings, *alone]), 'kill -TERM "$pid"', ""
    if kind == "tasks":
        # Since 22.05 srun must be told again what sbatch knows.
        srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --no-kill --label'
        worker = f"{srun} {worker}"
        tell = 'scancel --signal=TERM "$SLURM_JOB_ID"'
    if kind == "report":
        last = shlex.join([*evmp, "status", *settings]) + "\n"
    call = ["evmp", "sbatch", *settings, "--nodes", str(n_nodes), "--kind", kind]
    made_by = shlex.join([*call, *["--"] * bool(options), *options])
    lines = [*_resources(job, kind, n_nodes), *_lines(kind, n_nodes, options)]
    head = _HEAD.format(
        does=_DOES[kind],
        made_by=made_by.replace("\n", " "),
        options="\n".join(f"#SBATCH {line}" for line in lines),
        worker=worker,
    )
    return head + _LOOP.format(tell=tell, last=last)


def submit(script: str, *options: str) -> str:
    """Hand a script to sbatch, with options that count more than those in it.

    Returns: the id of the job.

    Raises:
        ConfigError: when there is no sbatch, or it refuses; says why.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=script, capture_output=True, text=True
        )
    except OSError as error:
        raise ConfigError(
            f"sbatch cannot be started: {error.strerror}; submit from a machine of the cluster"
        ) from None
    if done.returncode:
        raise ConfigError(f"sbatch has refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _resources(job: Job, kind: Kind, n_nodes: int) -> list[str]:
    n_gpus = 0 if job.device == "cpu" else -(-job.gpuRequired // 100)
    places = {
        "array": [f"--array=0-{n_nodes - 1}", "--nodes=1", "--ntasks=1"],
        "tasks": [f"--nodes={n_nodes}", "--ntasks-per-node=1", "--no-kill"],
        "report": ["--nodes=1", "--ntasks=1"],
    }[kind]
    per = "task" if kind == "tasks" else "node"
    return [
        "--job-name=evmp",
        *places,
        f"--cpus-per-task={max(1, job.cpuRequired // 100)}",
        *([f"--gpus-per-{per}={n_gpus}"] if n_gpus else []),
        f"--output={_LOG[kind]}.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
    ]


def _lines(kind: Kind, n_nodes: int, words: Sequence[str]) -> list[str]:
    """Return one line for each option with its value, quoted for sbatch.

    Raises:
        ConfigError: see `script`.
    """
    options: list[list[str]] = []
    problems = []
    for word in words:
        if not word.isprintable():
            problems.append(Problem("not printable", repr(word), "sbatch option"))
        elif word.startswith("-"):
            options.append([word])
        elif options:
            options[-1].append(word)
        else:
            problems.append(Problem("expected an option, such as --time=4:00:00", word, "sbatch"))
    lines = []
    for option in options:
        elements = _elements(option)
        if elements is None or kind == "array":
            lines.append(shlex.join(option))
        if elements is not None and not re.fullmatch(rf"0-{n_nodes - 1}%[1-9]\d*", elements):
            remedy = f"say it with --nodes; --array=0-{n_nodes - 1}%2 would let two run at once"
            problems.append(Problem(remedy, option[0], "sbatch option"))
    if problems:
        raise ConfigError(*problems)
    return lines


def _elements(option: Sequence[str]) -> str | None:
    """Return what an option says of the array's elements; None where it is another one."""
    name, _, value = option[0].partition("=")
    if len(name) > len("--a") and "--array".startswith(name):  # any beginning of it will do
        return value or "".join(option[1:])
    short = re.fullmatch(r"-[HIOQVWhksv]*a(.*)", option[0])  # flags may stand before it
    return (short[1] or "".join(option[1:])) if short else None
