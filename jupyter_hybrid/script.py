"""The job script: exactly what a scheduler gets. Pure; every value is quoted."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from .spec import JobSpec

# Id of the submission in a running batch: of a plain job, and of an array. By the variable of the array index, since a
# job may be submitted from inside another scheduler's job, or an array's element, and inherit its variables.
_NATIVE = {
    "HYBRID_ARRAY_INDEX": ("${HYBRID_LOCAL_JOB:-}", "${HYBRID_LOCAL_JOB:-}"),
    "SLURM_ARRAY_TASK_ID": ("${SLURM_JOB_ID:-}", "${SLURM_ARRAY_JOB_ID:-}"),
}
_ANY_NATIVE = "${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-${PBS_JOBID:-${HYBRID_LOCAL_JOB:-}}}}"

_EAGER = 4


def _pulled(index_variable: str) -> list[str]:
    """Return lines that end a batch of a pulled array at once when the others have claimed all tasks.

    Prologue and Python take their time, all the more where many batches load them at once from one file system. So all
    but the first batches wait a moment: short tasks are done by then.
    """
    return [
        f'[ "${{{index_variable}:-0}}" -lt {_EAGER} ] || sleep 0.2',
        'if [ -e "claims/$HYBRID_ATTEMPT-all" ] && [ ! -L "status/$HYBRID_BATCH.owner" ]; then',
        """  printf '{"e":"end","t":%(%s)T,"why":"done"}\\n' -1 >> "status/$HYBRID_BATCH.jsonl" && exit 0""",
        "fi",
    ]


def render(
    spec: JobSpec, folder: Path, worker: Path, attempt: int, first: int, index_variable: str, array: bool, pull: bool
) -> str:
    """Return the script of one submission.

    Parameters
    ----------
    spec : JobSpec
        The job. Of its settings: python, prologue, environment, container, directory.
    folder : pathlib.Path
        Its run folder.
    worker : pathlib.Path
        The worker's folder, see :attr:`jupyter_hybrid.storage.Storage.worker`.
    attempt : int
        Round.
    first : int
        Number of the first batch of the submission.
    index_variable : str
        Variable with the array index, which the scheduler sets.
    array : bool
        Whether it is submitted as an array; a plain job must not read an index that it has inherited.
    pull : bool
        Whether its batches claim tasks as they get free.
    """
    settings = spec.settings
    python = settings["python"]
    directory = settings.get("directory") or str(folder)
    lines = [
        "#!/bin/bash",
        f"# jupyter_hybrid job {spec.id}, attempt {attempt}: {json.dumps(spec.name)}",
        f"export HYBRID_ID={quote(spec.id)} HYBRID_FOLDER={quote(str(folder))} HYBRID_ATTEMPT={attempt}",
        f'export HYBRID_NATIVE_ID="{_NATIVE.get(index_variable, (_ANY_NATIVE, _ANY_NATIVE))[array]}"',
        f"export HYBRID_BATCH=$(({first} + ${{{index_variable}:-0}}))" if array else f"export HYBRID_BATCH={first}",
        'cd "$HYBRID_FOLDER" || exit 73  # the storage cannot be seen from this node',
        *(_pulled(index_variable) if array and pull else ()),
        f"cd {quote(directory)} || echo 'jupyter_hybrid: this folder is not on the node' >&2",
    ]
    lines += [f"export {name}={quote(value)}" for name, value in settings.get("environment", {}).items()]
    lines += settings.get("prologue", ())
    command = [quote(python)]
    container = settings.get("container")
    if container:
        binds = [str(folder.parent), directory, *container.get("bind", ())]
        options = " ".join(f"--bind {quote(bind)}" for bind in dict.fromkeys(binds))
        command = [container["kind"], "exec", options, quote(container["image"]), *command]
    missing = (
        f"{container['kind']} is not there on the node: load it in 'prologue:' of the pool"
        if container
        else f"{python} is not there on the node: set 'python:' of the pool"
    )
    lines += [
        f"command -v {command[0]} > /dev/null || {{  # said in the run folder, where the notebook finds it",
        f"  echo {quote(missing)} >&2",
        '  printf \'{"e":"end","t":%s,"why":"infrastructure","err":%s}\\n\' "$(date +%s)" '
        + quote(json.dumps(missing))
        + " \\",
        '    >> "$HYBRID_FOLDER/status/$HYBRID_BATCH.jsonl"',
        "  exit 70",
        "}",
        f'exec {" ".join(command)} {quote(str(worker / "batch.py"))} {quote(str(folder))} {attempt} "$HYBRID_BATCH"',
    ]
    return "\n".join(lines) + "\n"
