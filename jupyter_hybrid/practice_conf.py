"""The files of a practice cluster: slurm.conf, slurmdbd.conf, keys and folders."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .practice import PracticeSlurm

RECORD = "practice.json"


def write_files(
    cluster: PracticeSlurm,
    megabytes: int,
    preemption: bool,
    cgroups: bool,
    settings: Mapping[str, str | int],
    extra_conf: str,
) -> None:
    """Empty a cluster's folder and write what its daemons need; see :func:`jupyter_hybrid.practice.slurm_up`."""
    folder = cluster.folder
    # First and kept throughout: a folder without it is taken for somebody's own and is not touched.
    (folder / RECORD).write_text(json.dumps({**asdict(cluster), "folder": str(folder)}))
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != RECORD:
            entry.unlink()
    folder.chmod(0o755)
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
    if cgroups:
        values |= {"TaskPlugin": "task/cgroup", "JobAcctGatherParams": "NoShared"}
        limits: dict[str, str | int] = {"ConstrainRAMSpace": "yes", "ConstrainSwapSpace": "yes", "AllowedSwapSpace": 0}
        (folder / "cgroup.conf").write_text(_lines(limits))
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
            "AccountingStoragePass": str(folder / "munge.sock"),
        }
    else:
        history = {"JobCompType": "jobcomp/filetxt", "JobCompLoc": str(log / "jobs.log")}
    return {
        "ClusterName": cluster.name.lower(),
        "SlurmctldHost": f"{_host()}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": user(),
        "SlurmdUser": user(),
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
        "CommunicationParameters": "NoInAddrAny",
        "SlurmUser": user(),
        "LogFile": str(folder / "log" / "slurmdbd.log"),
        "PidFile": str(folder / "state" / "slurmdbd.pid"),
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": user(),
        "StorageLoc": "slurm_acct_db",
    }


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


def user() -> str:
    """Return the name of the user all daemons run as."""
    return pwd.getpwuid(os.getuid()).pw_name
