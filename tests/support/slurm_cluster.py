"""A private SLURM: a real slurmctld and real slurmd's on this host, in one folder, ended by their pids.

    with Cluster(folder) as cluster:
        job = cluster.run("sbatch", "--parsable", "--wrap=hostname").strip()

Nothing outside the folder is read or written. The cluster has its own munge key and socket,
configuration and state. The nodes share this host's cores but claim to have many, so that several
jobs run at the same time. Their GPUs are terminal devices, which is enough for SLURM to count them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2", "n3")
KILL_WAIT_S = 240
GRACE_S = 300
"""Both times are long. Nothing waits for them unless the machine is so busy that a save takes that long."""

CONF = """\
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait_s}
CompleteWait=0
MinJobAge=600
ReturnToService=2
SlurmdTimeout=600
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES PreemptMode=OFF PriorityTier=1
PartitionName=low Nodes=ALL GraceTime=0 PriorityTier=1
PartitionName=low_with_grace Nodes=ALL GraceTime={grace_s} PriorityTier=1
PartitionName=high Nodes=ALL PreemptMode=OFF PriorityTier=9
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
    "CPUs=32 RealMemory=1000 Gres=gpu:4 State=UNKNOWN"
)
GRES = "NodeName=n[1-3] Name=gpu File=/dev/tty[1-4]\n"


def missing_programs() -> list[str]:
    """Return the programs that a private cluster needs and this host lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A running cluster. ``close`` ends the jobs and the daemons, whatever state they are in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(self, *command: str, check: bool = True, timeout_s: float = 60) -> str:
        """Run a command of SLURM and return its output."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """End jobs, daemons and their children. May be called at any time and repeatedly."""
        if len(self._daemons) > 1:
            self.run("scancel", "--signal=KILL", "--full", "--user", str(os.getuid()), check=False)
            self.run("scancel", "--user", str(os.getuid()), check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
        self._end_orphans()

    def _end_orphans(self) -> None:
        """End ``slurmstepd`` and its children, which outlive slurmd. They are found by their environment."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            if pid == os.getpid():
                continue
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mark in environ:
                    os.kill(pid, signal.SIGKILL)
            except OSError:  # the process has ended, or belongs to another user
                continue

    def _start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        (self.folder / "gres.conf").write_text(GRES)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                folder=self.folder,
                user=_user(),
                controller_port=ports[0],
                nodes="\n".join(
                    NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True)
                ),
                kill_wait_s=KILL_WAIT_S,
                grace_s=GRACE_S,
            )
        )
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        for name in ("socket", "pid-file", "log-file", "seed-file"):
            munge.append(f"--{name}={self.folder}/munge.{name.removesuffix('-file')}")
        self._daemon(*munge)
        self.wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_for(self._is_ready, "slurmctld and slurmd")

    def _is_ready(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
        return states.split() == ["idle"] * len(NODES)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{len(self._daemons)}.{command[0]}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=self.folder,
                )
            )

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        """Return when ``condition`` holds. At a time-out, raise RuntimeError with the logs of all daemons."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                    for path in sorted(self.folder.iterdir())
                    if path.suffix in (".out", ".log")
                )
                raise RuntimeError(f"not in time: {what} (ended: {ended})\n{logs}")
            time.sleep(0.05)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
