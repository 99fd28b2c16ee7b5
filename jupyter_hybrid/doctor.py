"""The doctor: checks each pool end to end, and says what to do about each failure."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import html
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from . import clean, config, process
from .errors import HybridError, PoolUnreachable, ResourceError, StoreError
from .executor import Executor
from .handles import Job
from .pool import Pool, default_store, get_pool
from .spec import Cause, JobState
from .store import network_file_system

TIMEOUT = 60.0
"""Seconds within which the round trip of a pool must come back."""
_END = 15.0
"""Seconds that a job which has its result, or was cancelled, is given to be seen as ended."""
_LITTLE_SPACE = 2**30
_CLOCK = 5.0

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"
_MARKS = {OK: "✓", WARNING: "!", FAILURE: "✗", SKIPPED: "-"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    pool : str or None
        Name of the pool; ``None`` for what all pools share.
    name : str
        What was looked at: ``configuration``, ``commands``, ``scheduler``, ``limits``, ``storage``, ``round trip``,
        ``python``, ``packages``, ``folder``, ``clock``.
    status : {"ok", "warning", "failure", "skipped"}
        How it went.
    text : str
        What was seen.
    advice : str
        What to do about it.
    """

    pool: str | None
    name: str
    status: str
    text: str
    advice: str = ""


class Report:
    """What the doctor found; shown as text with marks, or as a table in a notebook.

    Attributes
    ----------
    checks : tuple of Check
        In the order in which they were made.
    """

    def __init__(self, checks: Iterable[Check]) -> None:
        self.checks = tuple(checks)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; a warning is no failure."""
        return all(check.status != FAILURE for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"ok": …, "checks": [{"pool", "name", "status", "text", "advice"}, …]}``."""
        return {"ok": self.ok, "checks": [dataclasses.asdict(check) for check in self.checks]}

    def _summary(self) -> str:
        pools = {check.pool for check in self.checks if check.pool is not None}
        bad = {check.pool for check in self.checks if check.status == FAILURE}
        warnings = sum(check.status == WARNING for check in self.checks)
        if bad:
            broken = sorted(name for name in bad if name is not None)
            text = f"not working: {', '.join(broken)}" if broken else "the configuration is wrong"
        else:
            text = f"{len(pools)} pool{'s' * (len(pools) != 1)} working"
        return text + (f", {warnings} warning{'s' * (warnings != 1)}" if warnings else "")

    def __repr__(self) -> str:
        lines: list[str] = []
        pool: str | None = None
        for check in self.checks:
            if check.pool != pool:
                pool = check.pool
                lines += ["", f"pool {pool}"]
            first, *rest = check.text.splitlines() or [""]
            lines.append(f"  {_MARKS[check.status]} {check.name:<13} {first}".rstrip())
            lines += [f"      {line}" for line in rest]
            lines += [f"      → {line}" for line in check.advice.splitlines()]
        return "\n".join([*lines, "", self._summary()]).lstrip("\n")

    def _repr_html_(self) -> str:
        rows = []
        for check in self.checks:
            text = html.escape(check.text)
            if check.advice:
                text += f"\n<b>→ {html.escape(check.advice)}</b>"
            cells = (html.escape(check.pool or ""), _MARKS[check.status], html.escape(check.name))
            left = "style='text-align:left;white-space:pre-wrap'"
            rows.append("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in (*cells, text)) + "</tr>")
        return f"<table><tbody>{''.join(rows)}</tbody></table><p>{html.escape(self._summary())}</p>"


def run(
    names: Iterable[str] | None = None, timeout: float = TIMEOUT, tell: Callable[[str], object] | None = None
) -> Report:
    """Check pools end to end, with a real job on each; one pool's failure does not stop the others.

    Parameters
    ----------
    names : iterable of str, optional
        Pools; all of them by default.
    timeout : float
        Seconds within which the job of a pool must come back. One that does not is cancelled.
    tell : callable, optional
        Called with a few words whenever something new is looked at.

    Raises
    ------
    ConfigError
        One of `names` is no pool.
    """
    say = tell or (lambda words: None)
    wanted = list(names or ())
    try:
        loaded = config.load()
        store = default_store().path
    except HybridError as error:
        advice = "set JUPYTER_HYBRID_HOME to a folder that you can write to" if isinstance(error, StoreError) else ""
        return Report([Check(None, "configuration", FAILURE, str(error), advice)])
    for name in wanted:
        loaded.pool(name)
    files = ", ".join(map(str, loaded.files)) or "no configuration file; pools are the built-in ones"
    checks = [Check(None, "configuration", OK, files), Check(None, "Store", OK, str(store))]
    for name in wanted or loaded.pools:
        say(f"{name}: configuration")
        try:
            for check in _check_pool(get_pool(name), timeout, say):
                checks.append(check)  # noqa: PERF402  what was found before an error counts
        except (HybridError, OSError) as error:
            checks.append(Check(name, "pool", FAILURE, str(error)))
    return Report(checks)


def _check_pool(pool: Pool, timeout: float, say: Callable[[str], object]) -> Iterator[Check]:
    yield Check(pool.name, "configuration", OK, f"{pool.kind}, {_where(pool)}")
    commands = _commands(pool)
    if commands is not None:
        yield commands
    say(f"{pool.name}: asking the scheduler")
    reachable = False
    for check in _scheduler(pool):
        reachable = reachable or (check.name == "scheduler" and check.status == OK)
        yield check
    storage = _storage(pool)
    yield storage
    if not reachable or storage.status == FAILURE:
        why = "the storage cannot be written" if reachable else "the scheduler does not answer"
        yield Check(pool.name, "round trip", SKIPPED, why)
        return
    say(f"{pool.name}: a job there and back")
    yield from _round_trip(pool, timeout)


def _where(pool: Pool) -> str:
    return "built in" if pool.config.source == config.BUILT_IN else pool.config.source


def _entry(pool: Pool, key: str) -> str:
    """Return where a key of the pool's configuration is, or would go."""
    if pool.config.source == config.BUILT_IN:
        return f"'{key}:' of pool {pool.name!r} (define it in hybrid.yaml)"
    return f"'{key}:' of pool {pool.name!r} ({pool.config.source})"


# --- scheduler ------------------------------------------------------------------------------------------------------

_COMMANDS: Mapping[str, tuple[str, ...]] = {"slurm": ("sbatch", "squeue", "scancel", "scontrol", "sinfo")}


def _commands(pool: Pool) -> Check | None:
    needed = _COMMANDS.get(pool.kind, ())
    if not needed:
        return None
    path = pool.config.env.get("PATH", os.environ.get("PATH"))
    found = {command: shutil.which(command, path=path) for command in needed}
    missing = [command for command, place in found.items() if place is None]
    if missing:
        advice = (
            "load the site's module before Jupyter starts, or give their folder as "
            f"PATH under {_entry(pool, 'env')}; run Jupyter where jobs can be submitted (a login node)"
        )
        return Check(pool.name, "commands", FAILURE, f"not on PATH: {', '.join(missing)}", advice)
    folders = ", ".join(sorted({os.path.dirname(place) for place in found.values() if place is not None}))
    return Check(pool.name, "commands", OK, f"{', '.join(needed)} in {folders}")


def _scheduler(pool: Pool) -> Iterator[Check]:
    store = default_store()
    begun = time.monotonic()
    try:
        snapshot = pool.ask_snapshot(store)
    except PoolUnreachable as error:
        since = store.pool(pool.name).unreachable_since or time.time()
        text = f"unreachable since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}: {error}"
        if isinstance(error, process.CommandMissing):
            advice = "see 'commands' above"
        else:
            advice = "jobs wait and lose nothing; if it lasts, ask the site's operators"
            advice += ", or check SLURM_CONF under " + _entry(pool, "env") if pool.kind == "slurm" else ""
        yield Check(pool.name, "scheduler", FAILURE, text, advice)
        return
    seconds = time.monotonic() - begun
    version = f"version {snapshot.version}, " if snapshot.version else ""
    text = f"{version}{snapshot.nodes} node{'s' * (snapshot.nodes != 1)}, "
    text += f"{snapshot.free_cpus} of {snapshot.total_cpus} cpus free, "
    text += f"{snapshot.free_gpus} of {snapshot.total_gpus} gpus free, " if snapshot.total_gpus else ""
    text += f"{snapshot.queued} queued, {snapshot.running} running; answered in {1000 * seconds:.0f} ms"
    yield Check(pool.name, "scheduler", OK, text)
    limits = [f"arrays of up to {snapshot.max_array} elements"] if snapshot.max_array else []
    limits += [f"up to {pool.config.limits.max_jobs} jobs in the queue"] if pool.config.limits.max_jobs else []
    limits += _slurm_limits(pool) if pool.kind == "slurm" else []
    if limits:
        yield Check(pool.name, "limits", OK, ", ".join(limits))


def _slurm_limits(pool: Pool) -> list[str]:
    from .backends.slurm_output import parse_config

    done = process.run(["scontrol", "show", "config"], env=pool.config.env)
    said = parse_config(done.out)
    if not said:
        return []
    if said.get("AccountingStorageType", "").endswith("slurmdbd"):
        return ["accounting database"]
    kept = said.get("MinJobAge", "some time").replace(" sec", " s")
    return [f"no accounting database: Slurm forgets a job {kept} after its end, its run folder does not"]


# --- storage --------------------------------------------------------------------------------------------------------


def _storage(pool: Pool) -> Check:
    root = pool.storage.root
    advice = f"set {_entry(pool, 'storage')} to a folder that you can write to and that the nodes share"
    made = not os.path.exists(root)
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(root).free
    except OSError as error:
        return Check(pool.name, "storage", FAILURE, f"{root} cannot be written: {error.strerror}", advice)
    shared = network_file_system(root)
    kind = "on a network file system" if shared else "on a disk of this machine"
    text = f"{root}, {kind}, {free / 2**30:.1f} GB free" + ("; it was not there and has been made" if made else "")
    if free < _LITTLE_SPACE:
        return Check(pool.name, "storage", WARNING, text, "free space: jupyter hybrid clean")
    if made and not shared and pool.kind != "local":
        advice = f"if the nodes do not see it, remove it and {advice}"
        return Check(pool.name, "storage", WARNING, text, advice)
    return Check(pool.name, "storage", OK, text)


# --- round trip -----------------------------------------------------------------------------------------------------

_PACKAGES = {
    "cloudpickle": "cloudpickle", "IPython": "ipython", "xxhash": "xxhash", "numpy": "numpy", "pandas": "pandas",
    "jupyter_hybrid": "jupyter_hybrid",
}  # fmt: skip
_CELLS = "IPython"
"""Functions run without it on the node, cells do not."""


def probe(packages: Mapping[str, str], root: str, directory: str) -> dict[str, Any]:
    """Return what a node says of itself; travels by value, so that the package need not be there."""
    import importlib.metadata
    import importlib.util
    import os
    import socket
    import sys
    import time

    begun = time.time()
    versions: dict[str, str | None] = {}
    for module, distribution in packages.items():
        versions[module] = None
        if importlib.util.find_spec(module) is not None:
            try:
                versions[module] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                versions[module] = "?"
    return {
        "host": socket.gethostname(),
        "python": "{}.{}.{}".format(*sys.version_info),
        "executable": sys.executable,
        "versions": versions,
        "storage": os.path.isdir(root),
        "directory": os.path.isdir(directory),
        "time": begun,
    }


def _round_trip(pool: Pool, timeout: float) -> Iterator[Check]:
    import cloudpickle

    # A short walltime starts sooner where the scheduler fills gaps.
    walltime = min(pool.config.resources.time or timedelta(minutes=10), timedelta(minutes=10))
    directory = os.getcwd()
    arguments = (_PACKAGES, str(pool.storage.root), directory)
    before, begun = time.time(), time.monotonic()
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        job = Executor(pool.name, name="doctor", time=walltime).submit(probe, *arguments)
    except ResourceError as error:
        yield Check(pool.name, "round trip", FAILURE, str(error), f"change {_entry(pool, 'resources')}")
        return
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    try:
        said = job.result(timeout)
    except (TimeoutError, concurrent.futures.TimeoutError):
        yield _late(pool, job, timeout)
    except concurrent.futures.CancelledError:
        yield Check(pool.name, "round trip", FAILURE, f"job {job.id} was cancelled by somebody else", "run it again")
    except Exception as error:  # noqa: BLE001  whatever goes wrong there is what was looked for
        yield _failed(pool, job, error)
    else:
        seconds, after = time.monotonic() - begun, time.time()
        yield from _from_node(pool, said, seconds, said["time"] - after, said["time"] - before)
        _remove(job)


def _ended(job: Job) -> bool:
    """Wait until the Store has the end of a job, for a bounded time; return whether it has."""
    deadline = time.monotonic() + _END
    while not job.state.final:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _remove(job: Job) -> None:
    if _ended(job):  # who follows an unfinished job would be led astray
        clean.remove(job.row())


def _late(pool: Pool, job: Job, timeout: float) -> Check:
    row = job.row()
    words = f"{row.state}, {row.reason}" if row.reason else str(row.state)
    text = f"no result within {timeout:g} s: job {job.id} was {words}"
    with contextlib.suppress(HybridError):
        job.cancel()
    gone = _ended(job)
    text += "; it was cancelled" if gone else "; its cancellation has not been seen to the end yet"
    if row.state in (JobState.NEW, JobState.PENDING):
        advice = (
            f"a busy queue, or a request that cannot start: try --timeout 10min, or change {_entry(pool, 'resources')}"
        )
    else:
        advice = (
            f"the node is slow, or the run folder comes back late: try --timeout 5min; jupyter hybrid logs {job.id}"
        )
    if gone and job.state is JobState.CANCELLED and row.started is None:
        clean.remove(job.row())
    return Check(pool.name, "round trip", FAILURE, text, advice)


def _failed(pool: Pool, job: Job, error: Exception) -> Check:
    _ended(job)
    text = str(error) if isinstance(error, HybridError) else f"{type(error).__name__}: {error}"
    text, _, log = text.partition("\nEnd of the log:\n")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("→"))  # the doctor knows better
    if "see the log" in text:
        text += f"\n{log}"
    return Check(pool.name, "round trip", FAILURE, text, _advice(pool, text, getattr(error, "cause", None), job.id))


def _advice(pool: Pool, text: str, cause: object, job_id: str) -> str:
    version = "{}.{}".format(*sys.version_info)
    here = f"here it is {sys.executable}"
    missing = re.search(r"No module named '([\w.]+)'", text)
    if missing is not None or "no xxhash" in text:
        name = "xxhash" if missing is None else missing[1].partition(".")[0]
        return f"{name} is missing on the node: {pool.python} -m pip install {_PACKAGES.get(name, name)}"
    if "cannot be unpickled here" in text:
        versions = probe(_PACKAGES, "", "")["versions"]
        wanted = f"cloudpickle=={versions['cloudpickle']}"
        return f"the node's cloudpickle (or numpy) is of another series: {pool.python} -m pip install {wanted}"
    if "is not there on the node" in text:
        key = "container" if pool.config.container else "python"
        wanted = "a program that the nodes have" if pool.config.container else f"a Python {version} that the nodes have"
        return f"{_entry(pool, key)} → {wanted} ({here})"
    if "the worker's Python is" in text:
        return f"{_entry(pool, 'python')} → a Python {version} on the nodes, of the same minor version ({here})"
    if "exit status 73" in text:
        return f"the node does not see {pool.storage.root}: set {_entry(pool, 'storage')} to a folder that nodes share"
    if cause is Cause.SUBMIT_REJECTED:
        return f"change {_entry(pool, 'resources')}: partition, account, qos, memory, time"
    if cause is Cause.OUT_OF_MEMORY:
        return f"give more memory under {_entry(pool, 'resources')}"
    return f"jupyter hybrid logs {job_id}; jupyter hybrid script {job_id}; {_entry(pool, 'prologue')} runs before it"


def _from_node(pool: Pool, said: Mapping[str, Any], seconds: float, low: float, high: float) -> Iterator[Check]:
    """Yield what is to be said of the answer; the node's clock is between `low` and `high` seconds ahead of ours."""
    yield Check(pool.name, "round trip", OK, f"call to result in {seconds:.2f} s, by node {said['host']}")
    yield _same_python(pool, said)
    yield _packages(pool, said)
    if said["directory"]:
        yield Check(pool.name, "folder", OK, "the node sees the storage and the current folder")
    else:
        text = f"the node sees the storage, but not the current folder {os.getcwd()}"
        yield Check(pool.name, "folder", WARNING, text, "modules and files of this folder are missing in jobs: move it")
    if low > _CLOCK or high < -_CLOCK:
        ahead = f"{low:.0f} s ahead" if low > 0 else f"{-high:.0f} s behind"
        text = f"the node's clock is at least {ahead}"
        yield Check(pool.name, "clock", WARNING, text, "times of jobs are shown wrongly: have the clocks set (NTP)")
    else:
        yield Check(pool.name, "clock", OK, f"agrees to within {max(abs(low), abs(high)):.2f} s")


def _same_python(pool: Pool, said: Mapping[str, Any]) -> Check:
    here = "{}.{}.{}".format(*sys.version_info)
    text = f"{said['python']}, {said['executable']}"
    if said["python"] != here:
        text += f" (here: {here})"
    return Check(pool.name, "python", OK, text)  # the worker refuses another minor version


def _packages(pool: Pool, said: Mapping[str, Any]) -> Check:
    here = probe(_PACKAGES, "", "")["versions"]
    there: dict[str, str | None] = said["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in there.items() if version is not None)
    install = f"{said['executable']} -m pip install"
    if there[_CELLS] is None:
        text = f"{listed}; no {_CELLS}: functions run, cells do not"
        advice = f"{_CELLS} is missing on the node: {install} {_PACKAGES[_CELLS]}"
        return Check(pool.name, "packages", FAILURE, text, advice)
    differ, needed = [], []
    for name, version in here.items():
        if name == "jupyter_hybrid" or version == there[name]:
            continue  # the worker brings what it needs of this package
        if version is not None and (there[name] is None or _series(name, version) != _series(name, there[name])):
            differ.append(f"{name} {version} here, {there[name] or 'missing'} there")
            needed.append(f"{_PACKAGES[name]}=={version}")
    if differ:
        advice = f"values of these packages may not travel: {install} {' '.join(needed)}"
        return Check(pool.name, "packages", WARNING, f"{listed}\n{'; '.join(differ)}", advice)
    return Check(pool.name, "packages", OK, listed)


def _series(name: str, version: str | None) -> str:
    """Return the part of a version that pickles depend on."""
    parts = (version or "").split(".")
    return ".".join(parts[: 1 if name in ("xxhash", "cloudpickle", "IPython") else 2])
