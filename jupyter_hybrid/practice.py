"""The practice cluster: a real Slurm of several nodes on this one machine, run by an ordinary user.

Every daemon is the distribution's own and listens on the loopback interface only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HybridError
from .practice_conf import RECORD, user, write_files
from .practice_processes import children, end, end_all, find_processes, role
from .process import CommandTimeout, Completed, run, spawn
from .spec import parse_memory

_START_TIMEOUT = 120.0
_COMMANDS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "squeue", "scancel", "scontrol")
_ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")
_DAEMON_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # an ordinary user's PATH lacks them


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
        found = {role(process): process.pid for process in reversed(find_processes(self.conf))}
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
            end_all(self.conf, self.name)
            with contextlib.suppress(FileNotFoundError):
                _fragment_path(self.name).unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop_controller(self) -> None:
        """End slurmctld only; jobs go on running. :meth:`start_controller` undoes it."""
        end(lambda: [p for p in find_processes(self.conf) if p.name == "slurmctld"], signal.SIGTERM, "slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._start("slurmctld", ["slurmctld"])
        self._wait(lambda: _UNKNOWN.isdisjoint(self._node_states().values()), "slurmctld does not answer", "slurmctld")

    def kill_node(self, name: str) -> None:
        """Kill slurmd and every job process of a node with SIGKILL, as if its power had gone."""
        self._known(name)
        end(lambda: [p for p in find_processes(self.conf) if p.node == name], signal.SIGKILL, name)

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
        states = dict(line.split() for line in listed.out.splitlines()) if listed.code == 0 else {}
        return {node: states.get(node, "unknown") for node in self.node_names}

    def _call(self, argv: Sequence[str], daemon: str, **variables: str) -> Completed:
        try:
            done = run(argv, env={"PATH": _search_path(), **self.env, **variables}, timeout=_START_TIMEOUT)
        except CommandTimeout as error:
            raise HybridError(f"{error}{_tail(self._log(daemon))}") from None
        if done.code != 0:
            raise HybridError(f"{argv[0]} failed: {done.words}{_tail(self._log(daemon))}")
        return done

    def _start(self, daemon: str, argv: Sequence[str], **variables: str) -> None:
        """Start a daemon that puts itself into the background, unless it runs."""
        if not any(role(process) == daemon for process in find_processes(self.conf)):
            self._call(argv, daemon, **variables)

    def _wait(self, reached: Callable[[], bool], complaint: str, *daemons: str) -> None:
        """Wait for a condition, as long as the daemons it depends on are alive."""
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            alive = {role(process) for process in find_processes(self.conf)}
            # First, because Slurm's commands wait many seconds for a controller that is not there.
            if dead := [daemon for daemon in daemons if daemon not in alive]:
                raise HybridError(f"{complaint}: {dead[0]} has ended{_tail(self._log(dead[0]))}")
            if reached():
                return
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
            return all(state == "idle" for state in states.values())

        self._wait(idle, "the nodes do not get idle", "slurmctld", *self.node_names)

    def _start_accounting(self) -> None:
        database, log = self.folder / "database", self._log("mariadbd")
        options = ["--no-defaults", f"--datadir={database / 'data'}", f"--user={user()}"]
        self._call(["mariadb-install-db", *options, "--skip-test-db"], "mariadbd")
        # The socket lies in a folder that nobody else can enter, which stands for passwords.
        address = database / "s"
        server = ["mariadbd", *options, "--skip-networking", "--skip-grant-tables", f"--socket={address}"]
        server += [f"--pid-file={database / 'mariadbd.pid'}", "--innodb-flush-log-at-trx-commit=2"]
        child = spawn(server, log=log, env={"PATH": _search_path(), **self.env})
        children.append(child)

        def shows() -> bool:
            # Linux shows a program's environment only a moment after it has started.
            return child.poll() is not None or any(process.name == "mariadbd" for process in find_processes(self.conf))

        self._wait(shows, "the database does not start")
        self._wait(lambda: _accepts(address), "the database does not answer", "mariadbd")
        self._start("slurmdbd", ["slurmdbd"], MYSQL_UNIX_PORT=str(address))
        add = ["sacctmgr", "-i", "add", "cluster", self.name.lower()]
        self._wait(lambda: run(add, env=self.env).code == 0, "slurmdbd does not answer", "slurmdbd")


_UNKNOWN = frozenset({"unk", "unk*", "unknown"})
_USABLE = frozenset({"idle", "mix", "alloc", "comp"})


def slurm_up(
    name: str = "practice",
    *,
    nodes: int | None = None,
    cpus: int | None = None,
    memory: str = "16G",
    folder: str | os.PathLike[str] | None = None,
    accounting: bool = False,
    preemption: bool = False,
    cgroups: bool = False,
    settings: Mapping[str, str | int] | None = None,
    extra_conf: str = "",
    register: bool = True,
) -> PracticeSlurm:
    """Start a practice cluster and wait until all its nodes are idle; one that is up already is returned.

    Partitions: ``main`` (the default, 7 days) and ``short`` (5 minutes), on all nodes.

    Parameters
    ----------
    name : str
        Name of the cluster and of its pool.
    nodes : int, optional
        Number of nodes (default 4).
    cpus : int, optional
        CPU cores of each node as Slurm counts them (default 8); may be more than the machine has.
    memory : str
        Memory of each node as Slurm counts it; a job gets an equal share for each CPU unless it asks otherwise.
    folder : path, optional
        Where its files go; default ``$XDG_STATE_HOME/jupyter_hybrid/practice/<name>``.
    accounting : bool
        Whether to run slurmdbd with a private MariaDB.
    preemption : bool
        Whether to add the partitions ``low`` and ``high``: jobs of ``high`` requeue those of ``low``.
    cgroups : bool
        Whether the kernel enforces memory limits, so that Slurm itself reports ``OUT_OF_MEMORY``; needs root, and no
        other such cluster on the machine. Otherwise Slurm looks once a second, and a killed job is ``FAILED``, 0:9.
    settings : mapping, optional
        Settings of slurm.conf on top of the practice cluster's own, e.g. ``{"MaxArraySize": 101}``.
    extra_conf : str
        Further lines of slurm.conf.
    register : bool
        Whether to make it a pool in the user's configuration.

    Raises
    ------
    HybridError
        Packages are missing, the folder cannot be used, one that is up already is not as asked for, or a daemon does
        not start; then the message ends with its log.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise HybridError(f"practice cluster name {name!r} must be letters, digits, '-' and '_'")
    path = _default_folder(name) if folder is None else Path(folder).absolute()
    cluster = PracticeSlurm(name, path, 4 if nodes is None else nodes, 8 if cpus is None else cpus, accounting)
    if cluster.nodes < 1 or cluster.cpus < 1:
        raise HybridError(f"a practice cluster needs at least one node and one cpu, not nodes={nodes}, cpus={cpus}")
    megabytes = parse_memory(memory) // 1024**2
    _require(accounting)
    # Slurm's step daemons fail when the path of their socket does not fit into the kernel's 107 bytes.
    longest = len(os.fsencode(path / f"node{cluster.nodes}" / f"node{cluster.nodes}_9999999.4294967291"))
    if longest > 107:
        raise HybridError(
            f"folder {path} is {longest - 107} characters too long for Slurm's sockets; give a shorter one"
        )
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if (path / RECORD).exists():
            running = None
            with contextlib.suppress(HybridError):  # an interrupted start may have left half a record
                running = slurm_load(path)
            if running is not None and running.status()["up"]:
                _must_be(running, nodes, cpus, accounting)
                return running
            end_all(cluster.conf, name)
        elif any(path.iterdir()):
            raise HybridError(f"folder {path} is not empty and holds no practice cluster; give another one")
        try:
            write_files(cluster, megabytes, preemption, cgroups, settings or {}, extra_conf)
            cluster.start()
            if register:
                _register(cluster)
        except BaseException:
            end(lambda: find_processes(cluster.conf), signal.SIGKILL, name)
            raise
    return cluster


def _must_be(running: PracticeSlurm, nodes: int | None, cpus: int | None, accounting: bool) -> None:
    """Refuse a cluster that is up and is not what is asked for."""
    differs = nodes not in (None, running.nodes) or cpus not in (None, running.cpus)
    if differs or (accounting and not running.accounting):
        database = "with" if running.accounting else "without"
        option = "" if running.name == "practice" else f" --name {running.name}"
        raise HybridError(
            f"practice cluster {running.name!r} is up already, with {running.nodes} nodes of {running.cpus} cpus, "
            f"{database} accounting; end it first (jupyter hybrid practice slurm down{option}), or use another name"
        )


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
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, ValueError):
        start = "start one with: jupyter hybrid practice slurm up"
        raise HybridError(f"there is no practice cluster in {folder}; {start}") from None
    return PracticeSlurm(**{**record, "folder": Path(record["folder"])})


def slurm_down(name: str | os.PathLike[str] = "practice") -> None:
    """End the practice cluster of a name, or of a folder; see :meth:`PracticeSlurm.down`."""
    slurm_load(name).down()


def _default_folder(name: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "jupyter_hybrid" / "practice" / name


def missing_commands(accounting: bool = False) -> list[str]:
    """Return the commands that a practice Slurm needs and that are not installed."""
    needed = [*_COMMANDS, *(_ACCOUNTING_COMMANDS if accounting else ())]
    return [command for command in needed if shutil.which(command, path=_search_path()) is None]


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), *_DAEMON_FOLDERS])


def _require(accounting: bool) -> None:
    if missing := missing_commands(accounting):
        packages = "slurm-wlm slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
        raise HybridError(
            f"a practice Slurm needs commands that are not installed: {', '.join(missing)}; "
            f"install them with: sudo apt-get install --no-install-recommends {packages}"
        )


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
