"""The practice cluster: a real Slurm of several nodes on this one machine, run by an ordinary user.

Every daemon is the distribution's own and listens on the loopback interface only. All processes of a cluster carry
``SLURM_CONF=<its slurm.conf>`` in their environment, the jobs' processes too. That, and no list of numbers that could
be stale, is how they are found again after whatever has happened to the process that started them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from .errors import HybridError
from .job import parse_memory
from .process import CommandTimeout, Completed, run, spawn

_START_TIMEOUT = 120.0
_STOP_TIMEOUT = 30.0
_RECORD = "practice.json"
_PACKAGES = {
    "slurm-wlm": ("slurmctld", "slurmd"),
    "slurm-client": ("sinfo", "sbatch", "squeue", "scancel", "scontrol"),
    "munge": ("munged",),
    "slurmdbd": ("slurmdbd",),
    "mariadb-server": ("mariadbd", "mariadb-install-db"),
}
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmdbd", "mariadbd")
_children: list[Popen[bytes]] = []  # Kept so that an ended database server is reaped, not left as a zombie.


@dataclass(frozen=True)
class PracticeSlurm:
    """A practice cluster that is up, or was.

    Parameters
    ----------
    name : str
        Its name, which is also the name of its pool.
    folder : pathlib.Path
        Where its configuration, logs and state are.
    nodes : int
        Number of nodes, ``node1`` to ``node<nodes>``.
    cpus : int
        CPU cores of each node, as Slurm counts them.
    accounting : bool
        Whether it has an accounting database.
    """

    name: str
    folder: Path
    nodes: int
    cpus: int
    accounting: bool = False

    @property
    def conf(self) -> Path:
        """Path of its slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """Variables that make Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def node_names(self) -> list[str]:
        """Names of its nodes."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def pool_fragment(self) -> dict[str, Any]:
        """Return its part of a pool configuration."""
        return {"pools": {self.name: {"kind": "slurm", "env": self.env}}}

    def status(self) -> dict[str, Any]:
        """Return its daemons with their process ids, and its nodes with their states.

        Returns
        -------
        dict
            ``up``; ``daemons``: mapping of ``munged``, ``slurmctld``, ``node1`` … to ``{"pid", "alive"}``;
            ``nodes``: mapping of node name to Slurm's state (``"unknown"`` while the controller does not answer).
        """
        found = {_role(process): process.pid for process in reversed(_processes(self.conf))}
        daemons = {
            name: {"pid": found.get(name), "alive": name in found} for name in (*self._services(), *self.node_names)
        }
        nodes = dict.fromkeys(self.node_names, "unknown")
        if daemons["slurmctld"]["alive"]:
            with contextlib.suppress(HybridError):
                nodes.update(self._node_states())
        up = all(daemon["alive"] for daemon in daemons.values())
        return {"name": self.name, "folder": str(self.folder), "up": up, "daemons": daemons, "nodes": nodes}

    def down(self) -> None:
        """End all its processes, jobs included, remove its pool from the configuration, and delete its folder."""
        with _locked(self.folder):
            _end(lambda: _processes(self.conf), signal.SIGTERM, self.name)
            with contextlib.suppress(FileNotFoundError):
                _fragment_path(self.name).unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop_controller(self) -> None:
        """End slurmctld only; jobs go on running. :meth:`start_controller` undoes it."""
        _end(lambda: [p for p in _processes(self.conf) if p.name == "slurmctld"], signal.SIGTERM, "slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._start("slurmctld", ["slurmctld"])
        self._wait(lambda: bool(self._node_states()), "slurmctld does not answer", "slurmctld")

    def kill_node(self, name: str) -> None:
        """Kill slurmd and every job process of a node with SIGKILL, as if its power had gone."""
        self._known(name)
        _end(lambda: [p for p in _processes(self.conf) if p.node == name], signal.SIGKILL, name)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, and wait until the controller sees it."""
        self._known(name)
        self._start(name, ["slurmd", "-N", name], SLURMD_NODENAME=name)
        self._wait(lambda: self._node_states().get(name) in _USABLE, f"{name} does not register", name)

    def _known(self, node: str) -> None:
        if node not in self.node_names:
            raise HybridError(
                f"practice cluster {self.name!r} has no node {node!r}; it has {', '.join(self.node_names)}"
            )

    def _services(self) -> tuple[str, ...]:
        return ("munged", *(("mariadbd", "slurmdbd") if self.accounting else ()), "slurmctld")

    def _log(self, daemon: str) -> Path:
        return self.folder / "log" / f"{daemon}.log"

    def _node_states(self) -> dict[str, str]:
        """Return each node's state, with Slurm's mark ``*`` for a node that does not answer."""
        listed = run(["sinfo", "-h", "-N", "-o", "%N %t"], env=self.env, timeout=30)
        return dict(line.split() for line in listed.out.splitlines()) if listed.code == 0 else {}

    def _call(self, argv: Sequence[str], daemon: str, **variables: str) -> Completed:
        try:
            done = run(argv, env={**self.env, **variables}, timeout=_START_TIMEOUT)
        except CommandTimeout as error:
            raise HybridError(f"{error}{_tail(self._log(daemon))}") from None
        if done.code != 0:
            raise HybridError(f"{argv[0]} failed: {done.words}{_tail(self._log(daemon))}")
        return done

    def _start(self, daemon: str, argv: Sequence[str], **variables: str) -> None:
        """Start a daemon that puts itself into the background, unless it runs."""
        if not any(_role(process) == daemon for process in _processes(self.conf)):
            self._call(argv, daemon, **variables)

    def _wait(self, reached: Callable[[], bool], complaint: str, *daemons: str) -> None:
        """Wait for a condition, as long as the daemons it depends on are alive."""
        deadline = time.monotonic() + _START_TIMEOUT
        while not reached():
            alive = {_role(process) for process in _processes(self.conf)}
            dead = [daemon for daemon in daemons if daemon not in alive]
            if dead and not reached():
                raise HybridError(f"{complaint}: {dead[0]} has ended{_tail(self._log(dead[0]))}")
            if time.monotonic() > deadline:
                tails = "".join(_tail(self._log(daemon)) for daemon in daemons)
                raise HybridError(f"{complaint} within {_START_TIMEOUT:g} s{tails}")
            time.sleep(0.02)

    def start(self) -> None:
        """Start the daemons that do not run, and wait until all nodes are idle."""
        folder = self.folder
        files = {
            "key-file": folder / "munge.key",
            "socket": folder / "munge.sock",
            "pid-file": folder / "state" / "munged.pid",
            "log-file": self._log("munged"),
            "seed-file": folder / "state" / "munge.seed",
        }
        # --force: the folder may lie below one that others can write to, such as /tmp.
        self._start("munged", ["munged", "--force", *(f"--{option}={path}" for option, path in files.items())])
        if self.accounting:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld"])
        for node in self.node_names:
            self._start(node, ["slurmd", "-N", node], SLURMD_NODENAME=node)

        def idle() -> bool:
            states = self._node_states()
            return all(states.get(node) == "idle" for node in self.node_names)

        self._wait(idle, "the nodes do not get idle", "slurmctld", *self.node_names)

    def _start_accounting(self) -> None:
        database, log = self.folder / "database", self._log("mariadbd")
        options = ["--no-defaults", f"--datadir={database / 'data'}", f"--user={_user()}"]
        self._call(["mariadb-install-db", *options, "--skip-test-db"], "mariadbd")
        # The socket lies in a folder that nobody else can enter, which stands for passwords.
        address = database / "s"
        server = ["mariadbd", *options, "--skip-networking", "--skip-grant-tables", f"--socket={address}"]
        server += [f"--pid-file={database / 'mariadbd.pid'}", "--innodb-flush-log-at-trx-commit=2"]
        _children.append(spawn(server, log=log, env=self.env))
        self._wait(lambda: _accepts(address), "the database does not answer", "mariadbd")
        self._start("slurmdbd", ["slurmdbd"], MYSQL_UNIX_PORT=str(address))
        add = ["sacctmgr", "-i", "add", "cluster", self.name.lower()]
        self._wait(lambda: run(add, env=self.env).code == 0, "slurmdbd does not answer", "slurmdbd")


_USABLE = frozenset({"idle", "mix", "alloc", "comp"})


def slurm_up(
    name: str = "practice",
    *,
    nodes: int = 4,
    cpus: int = 8,
    memory: str = "16G",
    folder: str | os.PathLike[str] | None = None,
    accounting: bool = False,
    preemption: bool = False,
    settings: Mapping[str, str | int] | None = None,
    extra_conf: str = "",
    register: bool = True,
) -> PracticeSlurm:
    """Start a practice cluster and wait until all its nodes are idle; one that is up already is returned as it is.

    Partitions: ``main`` (the default, 7 days) and ``short`` (5 minutes), on all nodes.

    Parameters
    ----------
    name : str
        Name of the cluster and of its pool.
    nodes : int
        Number of nodes.
    cpus : int
        CPU cores of each node as Slurm counts them; may be more than the machine has.
    memory : str
        Memory of each node as Slurm counts it; a job gets an equal share for each CPU unless it asks otherwise.
    folder : path, optional
        Where its files go; default ``$XDG_STATE_HOME/jupyter_hybrid/practice/<name>``.
    accounting : bool
        Whether to run slurmdbd with a private MariaDB.
    preemption : bool
        Whether to add the partitions ``low`` and ``high``: jobs of ``high`` requeue those of ``low``.
    settings : mapping, optional
        Settings of slurm.conf on top of the practice cluster's own, e.g. ``{"MaxArraySize": 101}``.
    extra_conf : str
        Further lines of slurm.conf.
    register : bool
        Whether to make it a pool in the user's configuration.

    Raises
    ------
    HybridError
        Packages are missing, the folder cannot be used, or a daemon does not start; the message ends with its log.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise HybridError(f"practice cluster name {name!r} must be letters, digits, '-' and '_'")
    if nodes < 1 or cpus < 1:
        raise HybridError(f"a practice cluster needs at least one node and one cpu, not nodes={nodes}, cpus={cpus}")
    megabytes = parse_memory(memory) // 1024**2
    _require(accounting)
    path = _default_folder(name) if folder is None else Path(folder).absolute()
    cluster = PracticeSlurm(name, path, nodes, cpus, accounting)
    # Slurm's step daemons fail when the path of their socket does not fit into the kernel's 107 bytes.
    longest = len(os.fsencode(path / f"node{nodes}" / f"node{nodes}_9999999.4294967291"))
    if longest > 107:
        raise HybridError(
            f"folder {path} is {longest - 107} characters too long for Slurm's sockets; give a shorter one"
        )
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if (path / _RECORD).exists():
            running = slurm_load(path)
            if running.status()["up"]:
                return running
            _end(lambda: _processes(cluster.conf), signal.SIGTERM, name)
        elif any(path.iterdir()):
            raise HybridError(f"folder {path} is not empty and holds no practice cluster; give another one")
        try:
            _write_files(cluster, megabytes, preemption, settings or {}, extra_conf)
            cluster.start()
            if register:
                _register(cluster)
        except BaseException:
            _end(lambda: _processes(cluster.conf), signal.SIGKILL, name)
            raise
    return cluster


def slurm_load(name: str | os.PathLike[str] = "practice") -> PracticeSlurm:
    """Return the practice cluster of a name, or of a folder, that an earlier process has started.

    Raises
    ------
    HybridError
        There is none.
    """
    text = os.fspath(name)
    folder = Path(text).absolute() if os.sep in text else _default_folder(text)
    try:
        record = json.loads((folder / _RECORD).read_text())
    except FileNotFoundError:
        start = "start one with: jupyter hybrid practice slurm up"
        raise HybridError(f"there is no practice cluster in {folder}; {start}") from None
    return PracticeSlurm(**{**record, "folder": Path(record["folder"])})


def slurm_down(name: str | os.PathLike[str] = "practice") -> None:
    """End the practice cluster of a name, or of a folder; see :meth:`PracticeSlurm.down`."""
    slurm_load(name).down()


def _default_folder(name: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "jupyter_hybrid" / "practice" / name


def _require(accounting: bool) -> None:
    # Debian keeps daemons in /usr/sbin, which an ordinary user's PATH lacks.
    path = os.environ.get("PATH", "")
    missing: dict[str, list[str]] = {}
    for package, commands in _PACKAGES.items():
        if accounting or package not in ("slurmdbd", "mariadb-server"):
            missing[package] = [command for command in commands if shutil.which(command, path=path) is None]
    absent = [command for commands in missing.values() for command in commands]
    if absent:
        packages = "slurm-wlm slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
        raise HybridError(
            f"a practice Slurm needs commands that are not on PATH: {', '.join(absent)}; "
            f"install them with: sudo apt-get install --no-install-recommends {packages}"
        )


def _write_files(
    cluster: PracticeSlurm, megabytes: int, preemption: bool, settings: Mapping[str, str | int], extra_conf: str
) -> None:
    folder = cluster.folder
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder.chmod(0o755)
    record = {**asdict(cluster), "folder": str(folder)}
    (folder / _RECORD).write_text(json.dumps(record))
    for name in ("log", "state", *cluster.node_names):
        (folder / name).mkdir()
    _private(folder / "munge.key", os.urandom(1024))
    ports = _free_ports(cluster.nodes + 2)
    if cluster.accounting:
        (folder / "database").mkdir(mode=0o700)
        _private(folder / "slurmdbd.conf", _lines(_slurmdbd_settings(cluster, ports[1])).encode())
    values = _slurm_settings(cluster, ports[0], ports[1], max(1, megabytes // cluster.cpus))
    partitions = [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=7-00:00:00 State=UP",
        "PartitionName=short Nodes=ALL MaxTime=5 State=UP",
    ]
    if preemption:
        values |= {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
        partitions += [
            "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE MaxTime=7-00:00:00 State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=7-00:00:00 State=UP",
        ]
    machine = [
        f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={cluster.cpus} RealMemory={megabytes}"
        for node, port in zip(cluster.node_names, ports[2:], strict=True)
    ]
    text = _lines({**values, **settings}) + "\n".join([*machine, *partitions, extra_conf, ""])
    cluster.conf.write_text(text)


def _slurm_settings(cluster: PracticeSlurm, port: int, database_port: int, share: int) -> dict[str, str | int]:
    folder, log = cluster.folder, cluster.folder / "log"
    if cluster.accounting:
        history: dict[str, str | int] = {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": database_port,
        }
    else:
        history = {"JobCompType": "jobcomp/filetxt", "JobCompLoc": str(log / "jobs.log")}
    return {
        "ClusterName": cluster.name.lower(),
        "SlurmctldHost": f"{_host()}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": _user(),
        "SlurmdUser": _user(),
        "AuthType": "auth/munge",
        # A requeued job waits for as long as its credential was valid, two minutes by default.
        "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=10",
        "CredType": "cred/munge",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "SlurmdParameters": "config_overrides",
        # Without a default a job takes a whole node's memory, and arrays run one task at a time.
        "DefMemPerCPU": share,
        "SchedulerParameters": "sched_min_interval=100000,bf_interval=2,batch_sched_delay=0,sched_interval=2,"
        "default_queue_depth=2000",
        "MaxArraySize": 1001,
        "MaxJobCount": 100000,
        "MinJobAge": 300,
        "ReturnToService": 2,
        "SlurmdTimeout": 10,
        "MessageTimeout": 10,
        "KillWait": 5,
        "OverTimeLimit": 0,
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": "task=1",
        "JobAcctGatherParams": "OverMemoryKill",
        **history,
        "StateSaveLocation": str(folder / "state"),
        "SlurmctldPidFile": str(folder / "state" / "slurmctld.pid"),
        "SlurmctldLogFile": str(log / "slurmctld.log"),
        "SlurmdPidFile": str(folder / "state" / "%n.pid"),
        "SlurmdLogFile": str(log / "%n.log"),
        "SlurmdSpoolDir": str(folder / "%n"),
    }


def _slurmdbd_settings(cluster: PracticeSlurm, port: int) -> dict[str, str | int]:
    folder = cluster.folder
    return {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.sock'}",
        "DbdHost": _host(),
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": _user(),
        "LogFile": str(folder / "log" / "slurmdbd.log"),
        "PidFile": str(folder / "state" / "slurmdbd.pid"),
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": _user(),
        "StorageLoc": "slurm_acct_db",
    }


def _accepts(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


def _register(cluster: PracticeSlurm) -> None:
    import yaml

    path = _fragment_path(cluster.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(cluster.pool_fragment()))


def _fragment_path(name: str) -> Path:
    from jupyter_core.paths import jupyter_config_dir

    return Path(jupyter_config_dir()) / "hybrid.d" / f"practice-{name}.yaml"


def _free_ports(count: int) -> list[int]:
    """Return ports nobody listens on, below the range the kernel hands out for outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports += [port] if port not in ports else []
    return ports


def _private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _lines(values: Mapping[str, str | int]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _tail(log: Path, lines: int = 15) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join([f"\n--- end of {log}:", *text.splitlines()[-lines:]])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two processes from starting or ending one cluster at a time; the lock goes with the folder."""
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise HybridError(f"there is no practice cluster in {folder} any more") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                    yield
                    return
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Process:
    pid: int
    name: str
    node: str | None


def _role(process: _Process) -> str:
    return process.node if process.name == "slurmd" and process.node else process.name


def _inspect(pid: int, conf: Path) -> _Process | None:
    """Return what a process is if it is the cluster's: one of its daemons, or started by a job on one of its nodes."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
            variables = {key: value for key, _, value in pairs}
        if variables.get(b"SLURM_CONF") != os.fsencode(conf):
            return None
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:  # it has ended, or is another user's
        return None
    name = program.removesuffix(" (deleted)").removesuffix("-wlm")
    node = variables.get(b"SLURMD_NODENAME")
    if name not in _DAEMONS and node is None:
        return None  # a shell or a kernel of the user that merely talks to the cluster
    return _Process(pid, name, None if node is None else node.decode(errors="replace"))


def _processes(conf: Path) -> list[_Process]:
    found = (_inspect(int(entry), conf) for entry in os.listdir("/proc") if entry.isdigit())
    return [process for process in found if process is not None]


def _end(find: Callable[[], list[_Process]], first: signal.Signals, what: str) -> None:
    """End the processes that `find` finds, and what they start meanwhile: first politely, after 5 s with SIGKILL."""
    begin = time.monotonic()
    while processes := find():
        elapsed = time.monotonic() - begin
        if elapsed > _STOP_TIMEOUT:
            left = ", ".join(f"{process.name} ({process.pid})" for process in processes)
            raise HybridError(f"could not end {what}: {left}")
        _signal_and_wait(processes, first if elapsed < 5 else signal.SIGKILL, 5.0)
    for child in _children[:]:
        if child.poll() is not None:
            _children.remove(child)


def _signal_and_wait(processes: list[_Process], number: signal.Signals, timeout: float) -> None:
    waiting: dict[int, int] = {}
    poll = select.poll()
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                waiting[descriptor] = process.pid
                poll.register(descriptor, select.POLLIN)
                signal.pidfd_send_signal(descriptor, number)
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                del waiting[descriptor]
                os.close(descriptor)
    finally:
        for descriptor in waiting:
            os.close(descriptor)
