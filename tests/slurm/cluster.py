"""A Slurm cluster of several nodes on this machine: the real daemons, on loopback, without cgroups.

Every node is a slurmd of its own with two CPUs, two GPUs, which are names for /dev/null, and a
folder for temporary files. Nodes that do not answer are noticed in seconds, and what ran there may
start again as soon, for which a real cluster takes minutes. Two partitions: jobs in `urgent` drive
those in `usual` away.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil
import pytest

INSTALL: Final = Path(__file__).with_name("install")
PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
NODES: Final = ("n1", "n2", "n3")
SECONDS: Final = 120.0  # that a wait may take

PROLOG: Final = """\
#!/bin/sh
mkdir -p {folder}/tmp.$SLURMD_NODENAME
echo export TMPDIR={folder}/tmp.$SLURMD_NODENAME
"""
CONF: Final = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/done.txt
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=5
SlurmdTimeout=2
MessageTimeout=2
TCPTimeout=2
KillWait={grace}
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
{nodes}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 State=UP
"""


class Cluster:
    """A running cluster.

    Args:
        folder: for its sockets, logs and state.
        grace: seconds between the signal and the kill of what is preempted or cancelled.
    """

    def __init__(self, folder: Path, grace: int) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        folder.chmod(0o755)  # munged wants everybody to reach its socket
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        user = psutil.Process().username()
        (folder / "slurm.conf").write_text(
            CONF.format(folder=folder, host=host, ports=ports, nodes=nodes, user=user, grace=grace)
        )
        for gpu in ("gpu0", "gpu1"):
            (folder / gpu).symlink_to("/dev/null")
        gpus = f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-1]\n"
        (folder / "gres.conf").write_text(gpus)
        (folder / "state").mkdir()
        (folder / "prolog").write_text(PROLOG.format(folder=folder))
        (folder / "prolog").chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        usual = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**usual, "PATH": PATH, "SLURM_CONF": str(self._folder / "slurm.conf")}

    # --- daemons ------------------------------------------------------------------------------

    def open(self, nodes: tuple[str, ...]) -> None:
        """Start the cluster, with those nodes up."""
        key, sock = self._folder / "key", self._folder / "munge"
        self.call("mungekey", "--create", f"--keyfile={key}")
        at = {"socket": sock, "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "seed"}
        options = [f"--{name}={self._folder / file}" for name, file in at.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until(sock.exists)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in nodes:
            self.join(node)

    def join(self, node: str) -> None:
        """Start a node, and wait until jobs may run there."""
        self._spool(node).mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-c", "-N", node, folder=self._spool(node))
        wait_until(lambda: self._state(node) in ("idle", "mixed", "allocated"))

    def crash(self, node: str) -> None:
        """Kill a node: its slurmd, and every process of jobs there."""
        self._end(node, signal.SIGKILL)
        self._kill_jobs(node)

    def _kill_jobs(self, node: str) -> None:
        while processes := self._processes(node):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=SECONDS)

    def lose(self, node: str) -> None:
        """Kill a node's slurmd alone: Slurm takes the node for dead, and its jobs run on."""
        self._end(node, signal.SIGKILL)

    def close(self) -> None:
        """End all daemons and all jobs."""
        for name in reversed(list(self._daemons)):
            self._end(name, signal.SIGKILL if name in NODES else signal.SIGTERM)
        for node in NODES:
            self._kill_jobs(node)

    def _start(self, name: str, *command: str, folder: Path | None = None) -> None:
        with open(self._folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                cwd=folder or self._folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )

    def _end(self, name: str, signum: int) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signum)
        daemon.wait()

    def _state(self, node: str) -> str:
        with suppress(subprocess.CalledProcessError):  # not up yet
            return self.call("sinfo", "-h", "-N", "-n", node, "-p", "usual", "-o", "%T").strip()
        return ""

    # --- jobs ---------------------------------------------------------------------------------

    def call(self, *command: str) -> str:
        """Call a command of Slurm's, such as scancel, and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, command: str, *options: str) -> str:
        """Submit a shell's command, and return the job's id."""
        options = ("--parsable", "--output=/dev/null", *options)
        return self.call("sbatch", *options, f"--wrap={command}").strip()

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING; `7_1` is an element of the array 7."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        """Return how often a job was requeued."""
        return int(self._field(job, "Restarts"))

    def node_of(self, job: str) -> str:
        """Return the node where a job runs, or has run last."""
        return self._field(job, "NodeList")

    def command(self, job: str, node: str = "") -> psutil.Process | None:
        """Return the command in Python that a job runs, on that node if one is named."""
        number = self._field(job, "JobId")
        for process in psutil.process_iter():
            if self._variable(process, "SLURM_JOB_ID") != number:
                continue
            if node and self._variable(process, "SLURMD_NODENAME") != node:
                continue
            with suppress(psutil.Error):
                parent = process.parent()
                if _is_python(process) and not (parent and _is_python(parent)):
                    return process
        return None

    def _processes(self, node: str) -> list[psutil.Process]:
        """Return the processes of jobs on a node, behind those that watch over them.

        The latter have no environment that could be read, but their node's folder.
        """
        watchers, own = [], []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self._spool(node)):
                    watchers.append(process)
                elif self._variable(process, "SLURMD_NODENAME") == node:
                    own.append(process)
        return watchers + own

    def _spool(self, node: str) -> Path:
        return self._folder / f"spool.{node}"

    def _variable(self, process: psutil.Process, name: str) -> str:
        """Return a variable of a process's environment where it belongs to this cluster."""
        with suppress(psutil.Error):
            variables: Mapping[str, str] = process.environ()
            if variables.get("SLURM_CONF") == str(self._folder / "slurm.conf"):
                return variables.get(name, "")
        return ""

    def _field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", job))
        return found[1] if found else ""


def require_slurm() -> None:
    """Skip the test where Slurm neither is nor can be installed, or fail it where it must be."""
    done = subprocess.run([INSTALL], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        reason = f"NO REAL SLURM WAS TESTED: {done.stdout.strip()}"
        if os.environ.get("EVMP_REQUIRE_SLURM") == "1":
            pytest.fail(f"{reason}, although EVMP_REQUIRE_SLURM=1")
        pytest.skip(reason)


@contextmanager
def run_cluster(nodes: tuple[str, ...] = NODES, *, grace: int = 2) -> Iterator[Cluster]:
    """Run a cluster with those of its nodes up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        cluster = Cluster(folder, grace)
        stack.callback(cluster.close)
        cluster.open(nodes)
        yield cluster


def wait_until(is_so: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s"
        time.sleep(0.1)


def _is_python(process: psutil.Process) -> bool:
    return process.cmdline()[:1] == [sys.executable]


def free_ports(n: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for it in sockets:
            it.bind(("127.0.0.1", 0))
        return [it.getsockname()[1] for it in sockets]
