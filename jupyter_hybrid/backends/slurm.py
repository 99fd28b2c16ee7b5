"""Slurm 22.05 and newer, spoken to by its own commands.

Text formats are used, not ``--json``: they are the same in all versions, and a controller that cannot be reached is an
error in them, where ``squeue --json`` answers with an empty list and success. Times are asked for as seconds since the
epoch (``SLURM_TIME_FORMAT=%s``), which no time zone can spoil.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from ..errors import HybridError, PoolUnreachable, ResourceError, SubmitRejected, SubmitUnclear
from ..process import CommandMissing, CommandTimeout, Completed, run
from ..spec import Cause, JobState, Resources, format_time
from .base import Observation, PoolSnapshot, Submission
from .slurm_output import (
    SACCT_FORMAT,
    SINFO_FORMAT,
    SQUEUE_FORMAT,
    parse_config,
    parse_names,
    parse_sacct,
    parse_sinfo,
    parse_squeue,
)

# ----------------------------------------------------------------------------------------------------------- submitting

_EXTRA = re.compile(r"[a-z][a-z0-9-]*")
_OURS = frozenset(
    {"array", "chdir", "comment", "error", "help", "job-name", "open-mode", "output", "parsable", "quiet", "test-only"}
    | {"usage", "version", "wait", "wrap"}
)
"""Options of sbatch that would break what a submission promises."""


class SubmitLater(SubmitRejected):
    """Slurm refuses for now, because of what is in the queue; the same submission may be taken later."""

    temporary = True


def job_name(name: str, tag: str) -> str:
    """Return a Slurm job name: what is readable of `name` in ASCII, at most 40 characters, and the tag as suffix."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "_", plain)[:40].strip("_.-")
    return f"{readable or 'job'}.{tag}"


def submit_command(submission: Submission) -> list[str]:
    """Return the ``sbatch`` call of a submission.

    The job gets the environment of this process, as ever with Slurm (``--export`` is left alone: many sites' modules
    need the login environment). A negative priority becomes ``--nice``; a positive one has no effect, since Slurm
    lets only its operators raise a job above others. A walltime of 3 minutes or more is announced to the script by
    SIGUSR2, 60 s ahead (90 s from 10 minutes on; Slurm itself may be up to 60 s early).

    Raises
    ------
    ResourceError
        An option in ``resources.extra`` is no option name, or one that the submission itself sets.
    """
    wanted = submission.resources
    logs = str(submission.logs).replace("%", "%%")
    first = str(submission.first)
    argv = ["sbatch", "--parsable", f"--job-name={job_name(submission.name, submission.tag)}"]
    argv += [f"--comment={submission.tag}", "--open-mode=append", "--requeue"]
    # The directory of the script is on the pool's storage, which the submitting process's own need not be; a job
    # whose directory is missing on the node fails with 0:53 before its first line.
    argv += [f"--chdir={submission.script.parent}"]
    if submission.array or submission.count > 1:
        argv += [f"--array=0-{submission.count - 1}"]
        first = "%a" if submission.first == 0 else f"{first}+%a"
    argv += [f"--output={logs}/{first}.out", f"--nodes={wanted.nodes}"]
    argv += [f"--ntasks-per-node={wanted.tasks_per_node}", f"--cpus-per-task={wanted.cpus}"]
    if wanted.memory is not None:
        argv += [f"--mem={-(-wanted.memory // 2**20)}M"]
    if wanted.time is not None:
        argv += [f"--time={format_time(wanted.time)}"]
        if wanted.time >= timedelta(minutes=3):
            argv += [f"--signal=B:USR2@{90 if wanted.time > timedelta(minutes=10) else 60}"]
    if wanted.gpus:
        argv += [f"--gres=gpu:{wanted.gpus}"]
    for option in ("partition", "qos", "account", "constraint"):
        value = getattr(wanted, option)
        if value is not None:
            argv += [f"--{option}={value}"]
    if wanted.priority < 0:
        argv += [f"--nice={-wanted.priority}"]
    if submission.after:
        ids = ":".join(native_id.partition(";")[0] for native_id in submission.after)
        argv += [f"--dependency=afterok:{ids}", "--kill-on-invalid-dep=yes"]
    for key, value in wanted.extra.items():
        if not _EXTRA.fullmatch(key):
            raise ResourceError(f"extra option {key!r} is no name of an sbatch option; write it like 'reservation'")
        if key in _OURS or (key == "dependency" and submission.after):
            raise ResourceError(f"extra option {key!r} is set by jupyter_hybrid itself; leave it out")
        argv += [f"--{key}" if value is None else f"--{key}={value}"]
    return [*argv, str(submission.script)]


def parse_submit(out: str) -> str | None:
    """Return the native id (``id`` or ``id;cluster``) that ``sbatch --parsable`` printed, under any site banner."""
    found = re.findall(r"^\d+(?:;[\w.-]+)?$", out, re.MULTILINE)
    return found[-1] if found else None


_UNCLEAR = re.compile(r"timed out|Zero Bytes|Unexpected message|reset by peer|Transport endpoint|Broken pipe")
_UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|standby mode|configuration source|fetch_config|slurm\.conf"
    r"|[Aa]uthentication (?:error|credential)|[Mm]unge"
)
_TEMPORARY = re.compile(
    r"SubmitJob\w*Limit|temporarily un(?:able|available)|job queue full|I/O error writing|creation temporarily denied"
)
_ADVICE = (
    (r"[Ii]nvalid partition", "`sinfo -s` lists the partitions"),
    (r"Invalid account", "`sacctmgr show assoc user=$USER` lists your accounts"),
    (r"Invalid qos", "`sacctmgr show qos` lists them"),
    (r"Invalid feature", "`sinfo -o '%n %f'` lists the features a constraint may name"),
    (r"job array spec", "the array is larger than the site allows (MaxArraySize, max_array_tasks)"),
    (r"SubmitJob\w*Limit", "the account or QOS may have only so many jobs in the queue; it can be taken later"),
    (r"node configuration is not available", "no node has that many cpus, gpus or that much memory"),
)


def submit_error(completed: Completed) -> HybridError:
    """Return the exception for an ``sbatch`` that gave no id: refused, not reached, or broken off half-way."""
    words = re.sub(r"^sbatch: (?:error: |fatal: )?", "", completed.words, flags=re.MULTILINE)
    if completed.code <= 0 or _UNCLEAR.search(words):
        return SubmitUnclear(f"Slurm broke off during the submission: {words}")
    if _UNREACHABLE.search(words):
        return PoolUnreachable(f"Slurm cannot be reached: {words}")
    advice = next((text for pattern, text in _ADVICE if re.search(pattern, words)), "")
    kind = SubmitLater if _TEMPORARY.search(words) else SubmitRejected
    return kind(f"Slurm refused the job: {words}" + (f"\n({advice})" if advice else ""))


# -------------------------------------------------------------------------------------------------------------- backend

_SUBMIT_TIMEOUT = 60.0
_TIMEOUT = 30.0
"""Seconds; a controller that is down or hangs costs Slurm's commands 10 to 20 s before they say so."""
_ACCOUNTING_PAUSE = 60.0
"""Seconds without another try after the accounting database has failed to answer."""
_ACCOUNTING_LAG = (0.1, 0.2, 0.4, 0.8)
_HARMLESS = re.compile(r"Invalid job id|already (?:completing|completed|finished)|has already finished")
_RANGES = 500
_WATCHED = 100
"""Submissions remembered beyond those that were asked for last."""


def available(env: Mapping[str, str] | None = None) -> str | None:
    """Return Slurm's version if its commands are on PATH and find their configuration, else None."""
    try:
        done = run(["sbatch", "--version"], env=env, timeout=_TIMEOUT)
    except PoolUnreachable:
        return None
    return done.out.split()[-1] if done.code == 0 and done.out.strip() else None


def order_error(completed: Completed) -> HybridError | None:
    """Return the exception for a ``scancel`` or ``scontrol`` that failed; None if the job has only ended already."""
    if completed.code == 0:
        return None
    command, words = " ".join(completed.argv), completed.words
    if _UNREACHABLE.search(words) or _UNCLEAR.search(words):
        return PoolUnreachable(f"{command} did not reach Slurm: {words}")
    return None if _HARMLESS.search(words) else HybridError(f"Slurm refused {command}: {words}")


class SlurmBackend:
    """Slurm, through ``sbatch squeue sacct scancel scontrol sinfo`` of this machine.

    Parameters
    ----------
    env : mapping of str to str, optional
        Variables for those commands on top of this process's own, e.g. ``SLURM_CONF``.
    user : str, optional
        Whose jobs to look at; the caller's own by default.
    """

    kind = "slurm"
    index_variable = "SLURM_ARRAY_TASK_ID"
    idempotent = False

    def __init__(self, env: Mapping[str, str] | None = None, user: str | None = None) -> None:
        self._env = dict(env or {})
        self._jobs_of = "--me" if user is None else f"--user={user}"
        self._account_of = [] if user is None else [f"--user={user}"]
        self._configs: dict[str, dict[str, str]] = {}
        self._watched: dict[str, _Watch] = {}
        self._accounting_from = 0.0

    def submit(self, submission: Submission) -> str:
        """Hand one submission to ``sbatch``; see :func:`submit_command` for how, :class:`SubmitLater` for a full queue.

        A dependency on a job that Slurm has forgotten (MinJobAge, 5 minutes by default, after its end) counts as
        fulfilled, however that job ended: `after` should name unfinished jobs only.
        """
        asked = time.monotonic()
        try:
            done = self._run(submit_command(submission), timeout=_SUBMIT_TIMEOUT)
        except CommandTimeout as error:
            raise SubmitUnclear(str(error)) from error
        native_id = parse_submit(done.out) if done.code == 0 else None
        if native_id is None:
            raise submit_error(done)
        array = submission.array or submission.count > 1
        indices: Iterable[int | None] = range(submission.count) if array else (None,)
        self._watched[native_id] = _Watch(asked, dict.fromkeys(indices, JobState.PENDING))
        return native_id

    def find(self, tags: Iterable[str]) -> Mapping[str, str]:
        """Return the native id of each tag among the user's jobs of the last 30 days.

        Where there is an accounting database it must answer too, if ``squeue`` does not know all: a job that ended
        while nobody looked, or went to another cluster (``extra={"clusters": …}``, which takes such a database),
        would be submitted a second time otherwise.
        """
        wanted = set(tags)
        if not wanted:
            return {}
        found = parse_names(self._ask("squeue", "-h", "-t", "all", self._jobs_of, "-o", "%F|%T|%r|%j"), wanted)
        if wanted - found.keys() and self._accounting(""):
            command = ["sacct", "-n", "-P", "-X", "-L", "-S", "now-30days", *self._account_of]
            past = self._ask(*command, "--format=Cluster,JobID,State,NodeList,JobName")
            found = {**parse_names(past, wanted, self._config("").get("ClusterName", "")), **found}
        return found

    def query(self, native_ids: Sequence[str]) -> Sequence[Observation]:
        """Return what Slurm says of these submissions: one ``squeue``, and one ``sacct`` if that can add something.

        ``sacct`` is asked of what ``squeue`` no longer lists, and of what has just ended, for an OOM kill inside a
        step, the CPU time and the peak memory; these two may come with one of the next answers only, or never.
        Where ``squeue`` lists a batch it has the last word: a requeued job shows its past end in ``sacct``.
        """
        seen: list[Observation] = []
        for cluster in sorted({native_id.partition(";")[2] for native_id in native_ids}):
            seen += self._query(cluster, [i for i in dict.fromkeys(native_ids) if i.partition(";")[2] == cluster])
        return seen

    def _query(self, cluster: str, native_ids: Sequence[str]) -> Iterator[Observation]:
        asked = time.monotonic()
        command = ["squeue", *_on(cluster), "-h", "-t", "all", self._jobs_of, "-O", SQUEUE_FORMAT]
        listed: dict[str, dict[int | None, Observation]] = {native_id.partition(";")[0]: {} for native_id in native_ids}
        for batch in parse_squeue(self._ask(*command)):
            if batch.native_id in listed:
                listed[batch.native_id][batch.index] = batch
        # The ones asked for now come last; the first are forgotten.
        watches = {native_id: self._watched.pop(native_id, _Watch()) for native_id in native_ids}
        self._watched.update(watches)
        for native_id in list(self._watched)[: -len(watches) - _WATCHED]:
            self._watched.pop(native_id, None)
        questions: list[str] = []
        for native_id in native_ids:
            number = native_id.partition(";")[0]
            now, watch = listed[number], watches[native_id]
            self._note_removed(cluster, watch, now)
            new = watch.asked is None
            missing = watch.open.keys() - now.keys() - watch.ended.keys()
            settled = watch.measure > 0 and all(batch.state.final for batch in now.values())
            if missing or settled or not (now or watch.ended) or (new and None not in now):
                questions.append(number)
            else:
                failed = [i for i in watch.open if i in now and now[i].cause is Cause.USER_ERROR]
                questions += [f"{number}_{i}" for i in failed] if len(failed) <= _RANGES else [number]
        account = self._ended(cluster, questions, listed)
        for native_id in native_ids:
            number = native_id.partition(";")[0]
            now, watch = listed[number], watches[native_id]
            unlisted = dict(watch.open)
            known = account.get(number, {})
            if all(batch.state.final for batch in now.values()):
                watch.measure = watch.measure - 1 if any(i not in known or not known[i].state.final for i in now) else 0
            for index, batch in known.items():
                if index in now:
                    now[index] = _measured(now[index], batch)
                elif batch.state.final:
                    watch.ended[index] = batch
                else:
                    unlisted[index] = JobState.UNKNOWN
            watch.ended = {index: batch for index, batch in watch.ended.items() if index not in now}
            watch.open = {i: JobState.UNKNOWN for i in unlisted if i not in now and i not in watch.ended}
            watch.open.update({i: batch.state for i, batch in now.items() if not batch.state.final})
            if watch.asked is not None or asked >= self._accounting_from:
                watch.asked = asked
            for batch in (*watch.ended.values(), *now.values()):
                yield replace(batch, native_id=native_id)

    def _note_removed(self, cluster: str, watch: _Watch, now: Mapping[int | None, Observation]) -> None:
        """Note the array elements that were cancelled while they waited.

        Slurm keeps no record of them, neither in ``squeue`` nor in ``sacct``. But an ended element stays listed for
        MinJobAge: one that waited a shorter time ago, and is missing among its listed siblings, never ran.
        """
        waited = [i for i, state in watch.open.items() if i not in now and state is JobState.PENDING]
        if not waited or not now or watch.asked is None:
            return
        kept = float(self._config(cluster).get("MinJobAge", "0").split(" ")[0])
        if time.monotonic() - watch.asked < kept:
            reason = "CANCELLED while it waited"
            for i in waited:
                watch.ended[i] = Observation("", i, JobState.CANCELLED, Cause.CANCELLED, reason)

    def _ended(
        self, cluster: str, questions: Sequence[str], listed: Mapping[str, Mapping[int | None, Observation]]
    ) -> Mapping[str, Mapping[int | None, Observation]]:
        """Return what accounting knows of these jobs and elements; nothing if there is none or it does not answer.

        The database hears of an end a moment after ``squeue`` shows it. Where a job has failed that is waited for: the
        answer may be that it was an OOM kill, and the failure is told once.
        """
        if not questions or time.monotonic() < self._accounting_from or not self._accounting(cluster):
            return {}
        asked = {question.partition("_")[0] for question in questions}
        failed = {(n, i) for n in asked for i, batch in listed[n].items() if batch.cause is Cause.USER_ERROR}
        for pause in (*_ACCOUNTING_LAG, None):
            known: dict[str, dict[int | None, Observation]] = {}
            try:
                for start in range(0, len(questions), 5000):
                    jobs = ["-j", ",".join(questions[start : start + 5000]), f"--format={SACCT_FORMAT}"]
                    out = self._ask("sacct", *_on(cluster), "-D", "-n", "-P", *self._account_of, *jobs)
                    for (number, index), batch in parse_sacct(out).items():
                        known.setdefault(number, {})[index] = batch
            except PoolUnreachable:
                self._accounting_from = time.monotonic() + _ACCOUNTING_PAUSE
                break
            told = {(number, i) for number in known for i, batch in known[number].items() if batch.state.final}
            if pause is None or failed <= told:
                break
            time.sleep(pause)
        return known

    def cancel(self, native_id: str, indices: Sequence[int] | None = None) -> None:
        """Cancel a submission, or only these array indices; what has ended already is no error."""
        number, _, cluster = native_id.partition(";")
        targets = [number] if indices is None else [f"{number}_[{part}]" for part in ranges(indices)]
        if targets:
            self._order("scancel", *_on(cluster), *targets)

    def check(self, resources: Resources) -> list[str]:
        """Return nothing: Slurm alone knows what it has, and it has a meaning for all of it."""
        return []

    def hold(self, native_id: str) -> None:
        """Keep a waiting submission from starting; a running one goes on, and is held if it is requeued."""
        number, _, cluster = native_id.partition(";")
        self._order("scontrol", *_on(cluster), "uhold", number)

    def release(self, native_id: str) -> None:
        """Undo :meth:`hold`."""
        number, _, cluster = native_id.partition(";")
        self._order("scontrol", *_on(cluster), "release", number)

    def snapshot(self) -> PoolSnapshot:
        """Return the capacity of all partitions now, and the queue of all users as far as the site shows it."""
        config = self._config("")
        tasks = re.search(r"max_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
        size = int(config.get("MaxArraySize", "1001"))
        states = self._ask("squeue", "-h", "-r", "-o", "%T").split()
        return replace(
            parse_sinfo(self._ask("sinfo", "-h", "-N", "-O", SINFO_FORMAT)),
            queued=states.count("PENDING"),
            running=states.count("RUNNING"),
            # MaxArraySize bounds the index, which starts at 0: so many elements, and not one less.
            max_array=min(size, int(tasks[1])) if tasks else size,
            version=config.get("SLURM_VERSION", ""),
        )

    def _config(self, cluster: str) -> Mapping[str, str]:
        if cluster not in self._configs:
            self._configs[cluster] = parse_config(self._ask("scontrol", *_on(cluster), "show", "config"))
        return self._configs[cluster]

    def _accounting(self, cluster: str) -> bool:
        return self._config(cluster).get("AccountingStorageType", "").endswith("slurmdbd")

    def _ask(self, *argv: str) -> str:
        """Return what a command prints; every failure, also one with exit status 0, is :class:`PoolUnreachable`."""
        done = self._run(argv, SLURM_TIME_FORMAT="%s", SLURM_BITSTR_LEN="0")  # 0: array indices are not cut
        if done.code != 0 or _UNREACHABLE.search(done.err) or _UNCLEAR.search(done.err):
            raise PoolUnreachable(f"{argv[0]} gave no answer: {done.words}")
        return done.out

    def _order(self, *argv: str) -> None:
        error = order_error(self._run(argv))
        if error is not None:
            raise error

    def _run(self, argv: Sequence[str], timeout: float = _TIMEOUT, **variables: str) -> Completed:
        unset = [part for name in foreign_variables({**os.environ, **self._env}) for part in ("-u", name)]
        command = ["env", *unset, *argv] if unset else argv
        done = run(command, env={**self._env, **variables}, timeout=timeout)
        if unset and done.code == 127:
            raise CommandMissing(f"command {argv[0]!r} is not on PATH of this machine")
        return done


@dataclass
class _Watch:
    """What is known of one submission from answer to answer.

    `asked` is when the last answer was asked for (monotonic), `open` has the batches unfinished in it, `ended` those
    that have ended and that ``squeue`` lists no longer; `measure` is how often to ask accounting once all have ended.
    """

    asked: float | None = None
    open: dict[int | None, JobState] = field(default_factory=dict)
    ended: dict[int | None, Observation] = field(default_factory=dict)
    measure: int = 3


def _on(cluster: str) -> list[str]:
    return ["-M", cluster] if cluster else []


def _measured(batch: Observation, account: Observation | None) -> Observation:
    if account is None or not batch.state.final or not account.state.final:
        return batch
    oom = batch.cause is Cause.USER_ERROR and account.cause is Cause.OUT_OF_MEMORY
    return replace(
        batch,
        cause=Cause.OUT_OF_MEMORY if oom else batch.cause,
        cpu_seconds=account.cpu_seconds,
        peak_memory=account.peak_memory,
    )


def ranges(indices: Iterable[int]) -> list[str]:
    """Return array indices as Slurm writes them (``"0-3,7"``), in parts that fit a command line."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return [",".join(words[start : start + _RANGES]) for start in range(0, len(words), _RANGES)]


def foreign_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that would change what Slurm's commands do, and that no one set for this package.

    A user's ``SQUEUE_PARTITION`` hides jobs, and a kernel that itself runs in a Slurm job would hand that job's
    ``SLURM_*`` on to every job it submits.
    """
    inside = "SLURM_JOB_ID" in environ
    prefixes = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", *(("SLURM_", "SLURMD_", "SRUN_") if inside else ()))
    names = ("SBATCH_ARRAY_INX", "SBATCH_WAIT")
    ours = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return [name for name in environ if name not in ours and (name.startswith(prefixes) or name in names)]
