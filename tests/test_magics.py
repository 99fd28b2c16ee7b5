"""The magics in a real IPython shell, with real jobs on the local pool."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import jupyter_hybrid as hy
from jupyter_hybrid import launch, widgets
from jupyter_hybrid.backends.local import machine_cpus
from jupyter_hybrid.errors import CaptureError, ConfigError, JobNotFound, ResourceError
from jupyter_hybrid.magics import KINDS, cell_parser, split
from jupyter_hybrid.pool import default_store

Run = Callable[[str], Any]


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryManager.hist_file = ":memory:"
    config.InteractiveShell.colors = "nocolor"
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=config)
    try:
        shell.run_line_magic("load_ext", "jupyter_hybrid")
        yield shell
    finally:
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()


@pytest.fixture
def run(shell: InteractiveShell) -> Run:
    """Run a cell; return its value, or raise what it raised."""

    def run_cell(code: str) -> Any:
        result = shell.run_cell(code, store_history=True)
        result.raise_error()
        return result.result

    return run_cell


def submitted() -> int:
    return sum(default_store().count().values())


# --- a cell as a job ------------------------------------------------------------------------------------------------


def test_a_cell_runs_as_a_job_and_its_names_are_bound_when_the_result_is_asked_for(run: Run, shell: Any) -> None:
    run("x = 20\ndef double(value):\n    return 2 * value + offset\noffset = 2")
    job = run("%%local --out y, z --name 'the answer'\ny = double(x)\nz = y + 1")
    assert isinstance(job, hy.Job)
    assert job.spec.out == ("y", "z")
    assert job.name == "the answer"
    assert job.exception(60) is None
    assert "y" not in shell.user_ns
    assert run("_.result()") == {"y": 42, "z": 43}
    assert shell.user_ns["y"] == 42
    assert shell.user_ns["z"] == 43


def test_one_name_is_its_value(run: Run, shell: Any) -> None:
    run("%%local --out y --as fit\ny = [1, 2]")
    assert shell.user_ns["fit"].result(60) == [1, 2]
    assert shell.user_ns["y"] == [1, 2]


def test_without_out_all_assigned_names_come_back(run: Run, shell: Any) -> None:
    job = run("%%local\na = 1\n_b = 2\ndef c():\n    return 3")
    assert set(job.result(60)) == {"a", "c"}
    assert shell.user_ns["c"]() == 3


def test_the_job_is_the_value_of_the_cell_and_shown_once(run: Run, shell: Any, capsys: Any) -> None:
    job = run("%%local\na = 1")
    assert shell.user_ns["Out"][1] is job is shell.user_ns["_"]
    assert capsys.readouterr().out.count(f"(job {job.id})") == 1
    run("job = Out[1]")
    assert shell.user_ns["job"] is job
    assert run("%%local --as again\na = 1") is None
    assert capsys.readouterr().out.count(f"(job {shell.user_ns['again'].id})") == 1


def test_in_names_what_travels(run: Run) -> None:
    run("x, unused, broken = 1, 2, open('/dev/null')")
    job = run("%%local --in x,unused --out found\nfound = sorted(n for n in dir() if n in ('x', 'unused', 'broken'))")
    assert job.result(60) == ["unused", "x"]
    run("broken.close()")


def test_a_failing_cell_raises_its_own_exception(run: Run) -> None:
    job = run("%%local\nd = {}\nd['key']")
    with pytest.raises(KeyError, match="key"):
        job.result(60)
    assert [output["output_type"] for output in job.outputs()] == ["error"]
    assert "Cell In[1], line 2" in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(job.outputs()[0]["traceback"]))


def test_outputs_are_shown_as_they_were(run: Run, capsys: Any) -> None:
    job = run(
        "%%local\nprint('text')\nhandle = display({'text/plain': 'first'}, raw=True, display_id=True)\n"
        "handle.update({'text/plain': 'second'}, raw=True)\n1 / 0"
    )
    assert isinstance(job.exception(60), ZeroDivisionError)
    assert len(job.outputs()) == 4
    capsys.readouterr()
    run(f"import jupyter_hybrid as hy\nhy.job('{job.id}').outputs()")
    shown = capsys.readouterr()
    assert "text\nsecond\n" in shown.out
    assert "first" not in shown.out
    assert "ZeroDivisionError" in shown.err


def test_options_reach_the_job(run: Run) -> None:
    job = run(
        "%%local --cpus 2 --memory 300M --time 10min --priority=-3 --extra reservation=course --extra exclusive "
        "--directory /\na = __import__('os').getcwd()"
    )
    wanted = job.spec.resources
    assert (wanted.cpus, wanted.memory, wanted.time.total_seconds(), wanted.priority) == (2, 300 * 2**20, 600, -3)
    assert wanted.extra == {"reservation": "course", "exclusive": None}
    assert job.result(60) == "/"


def test_after_takes_variables_and_ids(run: Run) -> None:
    run("%%local --as first\na = 1")
    run("%%local --as second\nb = 1")
    run("%%local --as third\nc = 1")
    third = run("third")
    job = run(f"%%local --after first,second --after {third.id}\nd = 1")
    assert job.spec.after == (run("first").id, run("second").id, third.id)
    assert job.result(60) == 1


def test_variables_expand_on_the_line(run: Run) -> None:
    run("n, label = 3, 'my fit'")
    array = run('%%local --array seed=range($n) --name "{label}" --out y\ny = seed')
    assert array.name == "my fit"
    assert array.results(60) == [0, 1, 2]


def test_what_one_machine_does_not_have_is_ignored_and_told(run: Run, capsys: Any) -> None:
    for option, value in (("", 1), ("--bash", 0)):
        job = run(f"%%local --partition gpu --qos high {option}\ny=1")
        said = "partition, qos: ignored, such things do not exist on pool 'local' of kind 'local'"
        assert capsys.readouterr().out.count(said) == 1
        assert job.result(60) == value
    run("%%local\ny = 1").result(60)
    assert "ignored" not in capsys.readouterr().out


def test_a_relative_directory_is_that_of_the_notebook(run: Run, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    assert run("%%local --directory below\nimport os\nd = os.getcwd()").result(60) == str(tmp_path / "below")
    job = run("%%local --directory below --bash\npwd")
    job.result(60)
    assert job.logs() == f"{tmp_path / 'below'}\n"


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_an_array_runs_once_for_each_combination(run: Run, shell: Any) -> None:
    run("rates, seed = [0.1, 0.2], 'the notebook has this name too'")
    run("%%local --array seed=range(3) --array rate=rates --out score --as runs --batch 2\nscore = seed * rate")
    runs = shell.user_ns["runs"]
    assert isinstance(runs, hy.ArrayJob)
    expected = [seed * rate for seed in range(3) for rate in (0.1, 0.2)]
    assert runs.results(60) == expected == shell.user_ns["score"]
    assert shell.user_ns["seed"] == "the notebook has this name too"
    table = runs.to_dataframe().compute()
    assert list(table.columns) == ["seed", "rate", "score"]
    assert table.score.tolist() == expected
    assert table.seed.tolist() == [0, 0, 1, 1, 2, 2]


def test_several_names_of_an_array_become_lists(run: Run, shell: Any) -> None:
    array = run("%%local --array i=range(3) --out a,b\na, b = i, -i")
    assert array.results(60)[2] == {"a": 2, "b": -2}
    assert shell.user_ns["a"] == [0, 1, 2]
    assert shell.user_ns["b"] == [0, -1, -2]


@pytest.mark.parametrize(
    "text", ["i=[1, 2]", "'i=[1, 2]'", '"i=[1, 2]"', "i=(n for n in [1, 2])", "i={1: 0, 2: 0}", "i=ones_and_more"]
)
def test_values_of_an_array_are_python(run: Run, text: str) -> None:
    run("ones_and_more = [1, 2]")
    assert run(f"%%local --array {text} --out y\ny = i").results(60) == [1, 2]


def test_only_what_is_new_runs_with_cache(run: Run, capsys: Any) -> None:
    cell = "--out y --cache\ny = seed ** 2"
    first = run(f"%%local --array seed=range(4) {cell}")
    assert first.results(60) == [0, 1, 4, 9]
    second = run(f"%%local --array seed=range(6) {cell}  # the comment does not count")
    assert second.results(60) == [0, 1, 4, 9, 16, 25]
    assert launch.reused_tasks(second.run) == 4
    assert second.run.folder.attempt(1).tasks == ((4, 6),)
    run("%hybrid why _")
    assert "4 of 6 results were reused" in capsys.readouterr().out
    third = run(f"%%local --array seed=range(6) {cell}")
    assert third.done()
    assert not third.run.folder.attempts()


def test_a_plain_cell_is_cached_too(run: Run) -> None:
    run("x = 1")
    assert run("%%local --out y --cache\ny = x").result(60) == 1
    again = run("%%local --out y --cache\ny = x")
    assert launch.reused_tasks(again.run) == 1
    run("x = 2")
    changed = run("%%local --out y --cache\ny = x")
    assert changed.result(60) == 2
    assert changed.why() == [f"compared with job {again.id}: the variable 'x' changed"]


# --- scripts --------------------------------------------------------------------------------------------------------


def test_a_script_has_its_index_and_variables(run: Run) -> None:
    array = run(
        "%%local --bash --array word=['a b',\"it's\"]\n"
        'echo "$HYBRID_ARRAY_INDEX $SLURM_ARRAY_TASK_ID $word" > out-$HYBRID_ARRAY_INDEX'
    )
    assert array.results(60) == [0, 0]
    assert Path("out-0").read_text() == "0 0 a b\n"
    assert Path("out-1").read_text() == "1 1 it's\n"


def test_a_script_that_fails(run: Run) -> None:
    job = run("%%local --bash\necho said; exit 3")
    with pytest.raises(hy.HybridError, match="exited with status 3"):
        job.result(60)
    assert job.logs() == "said\n"


# --- waiting --------------------------------------------------------------------------------------------------------


def test_wait_binds_the_names_and_shows_the_outputs(run: Run, shell: Any, capsys: Any) -> None:
    run("%%local --out y --wait\nprint('on the node')\ny = 3\n'last'")
    assert shell.user_ns["y"] == 3
    out = capsys.readouterr().out
    assert "on the node\n'last'" in out
    assert "COMPLETED" in out


def test_wait_tells_in_a_terminal_why_nothing_happens(run: Run, capsys: Any, tmp_path: Path) -> None:
    blocker = run(
        f"%%local --cpus {machine_cpus()} --out y\nimport os, time\nopen('there', 'w').close()\n"
        "while not os.path.exists('go'):\n    time.sleep(0.01)\ny = 0"
    )
    end = time.monotonic() + 60
    while not Path("there").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    said = ""

    def release() -> None:
        nonlocal said
        while "waits for free slots" not in said and time.monotonic() < end:
            said += capsys.readouterr().out
            time.sleep(0.01)
        Path("go").touch()

    thread = threading.Thread(target=release)
    thread.start()
    run("%%local --out y --wait\ny = 1")
    thread.join()
    said += capsys.readouterr().out
    assert re.search(r"PENDING y on local .*: waits for free slots\n", said)
    assert said.index("waits for free slots") < said.index("COMPLETED")
    assert blocker.result(60) == 0


@pytest.mark.parametrize("array", ["", "--array i=[1,0]"])
def test_wait_for_a_failing_cell_shows_its_traceback_once(array: str, run: Run, shell: Any, capsys: Any) -> None:
    shell.user_ns["i"] = 0
    with pytest.raises(ZeroDivisionError):
        run(f"%%local --as job --wait {array}\nprint('before')\n1 / i")
    shown = re.sub(r"\x1b\[[\d;]*m", "", "".join(capsys.readouterr()))
    assert shown.count("Traceback (most recent call last)") == 1
    assert shown.count("----> 2 1 / i") == 1
    assert shown.count("ZeroDivisionError: division by zero") == 2  # with the reason in the job's line
    assert "cellmagic.py" not in shown
    assert "cellrun.py" not in shown
    assert array or "before" in shown


def test_wait_for_a_job_that_ends_badly_fails_in_one_line(run: Run, capsys: Any) -> None:
    with pytest.raises(hy.HybridError):
        run("%%local --as job --wait --time 1s\nimport time\ntime.sleep(600)")
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith(f"JobFailed: job {run('job').id} (")
    assert shown.out.count("retry(time=...)") == 1
    assert re.sub(r"\x1b\[[\d;]*m", "", shown.err).count("----> 2 time.sleep(600)") == 1  # where it was


def test_an_interrupt_ends_the_waiting_and_not_the_job(run: Run, shell: Any) -> None:
    # As in any kernel: a shell that starts the tests in the background has interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident or 0

    def waits() -> bool:
        codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[main])]
        return codes[0] is threading.Condition.wait.__code__ and widgets.wait.__code__ in codes

    def interrupt() -> None:
        end = time.monotonic() + 60
        while not waits() and time.monotonic() < end:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(
                "%%local --as job --out y --wait\nimport os, time\n"
                "while not os.path.exists('go'):\n    time.sleep(0.01)\ny = 1"
            )
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert not run("job").done()
    Path("go").touch()
    assert run("job").result(60) == 1


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "unknown option": ("%%local --mem 8G\nx = 1", UsageError, "unknown option --mem; did you mean '--memory'?"),
    "no option": ("%%local hpc\nx = 1", UsageError, "'hpc' belongs to no option"),
    "no value": ("%%local --cpus\nx = 1", UsageError, "argument --cpus: expected one argument"),
    "open quote": ("%%local --name 'a b\nx = 1", UsageError, "no closing quotation mark"),
    "memory": ("%%local --memory 8Q\nx = 1", ResourceError, "memory '8Q' is not an amount"),
    "time": ("%%local --time soon\nx = 1", ResourceError, "time 'soon' is not a duration"),
    "cpus": ("%%local --cpus many\nx = 1", ResourceError, "cpus 'many' is not a whole number"),
    "pool": ("%%local --pool locl\nx = 1", ConfigError, "no pool 'locl'; did you mean 'local'?"),
    "kind": ("%%slurm --pool local\nx = 1", UsageError, "pool 'local' is of kind 'local'; write %%local"),
    "missing": ("%%local\nx = datta", CaptureError, "'datta'; did you mean 'data'?"),
    "missing in": ("%%local --in datta\nx = 1", CaptureError, "--in names what the notebook does not have: 'datta'"),
    "unpicklable": ("%%local\nx = stream", CaptureError, "variable 'stream' .* cannot travel to the pool"),
    "oversized": ("%%local --limit 10K\nx = len(data)", CaptureError, "variable 'data' .* has .* the limit is"),
    "limit": ("%%local --limit much\nx = 1", ResourceError, "memory 'much' is not an amount"),
    "names": ("%%local --out 1x\nx = 1", UsageError, "--out: '1x' is not a name"),
    "as": ("%%local --as for\nx = 1", UsageError, "--as: 'for' is not a name"),
    "after": ("%%local --after nojob\nx = 1", JobNotFound, "nojob"),
    "batch": ("%%local --batch few --array i=range(3)\nx = i", UsageError, "--batch few"),
    "array name": ("%%local --array range(3)\nx = 1", UsageError, "is not a name of a variable"),
    "array equals": ("%%local --array i\nx = 1", UsageError, "write it like --array seed=range"),
    "array twice": ("%%local --array i=[1] --array i=[2]\nx = 1", UsageError, "--array i is given twice"),
    "array empty": ("%%local --array i=[]\nx = i", UsageError, "there is nothing in it"),
    "array error": ("%%local --array i=rang(3)\nx = i", UsageError, "NameError: name 'rang' is not defined"),
    "array syntax": ("%%local --array i=range(3\nx = i", UsageError, "SyntaxError"),
    "array scalar": ("%%local --array i=3\nx = i", UsageError, "TypeError: 'int' object is not iterable"),
    "array values": ("%%local --array i=[stream]\nx = 1", CaptureError, "the arguments of task 0, .* cannot travel"),
    "bash out": ("%%local --bash --out x\ntrue", UsageError, "--out is for cells of Python"),
    "verb": ("%hybrid jbos", UsageError, "no verb 'jbos'; did you mean 'jobs'?"),
    "verb option": ("%hybrid jobs --stat running", UsageError, "unknown option --stat; did you mean '--state'?"),
    "verb job": ("%hybrid logs nojob", JobNotFound, "nojob"),
    "state": (
        "%hybrid jobs --state runing",
        hy.HybridError,
        "did you mean 'RUNNING'? (states are NEW",
    ),
    "too many cpus": ("%%local --cpus 4096\nx = 1", ResourceError, "it asks for 4096 cpus, it has"),
    "too much memory": ("%%local --memory 900T\nx = 1", ResourceError, "it asks for memory 900T, it has"),
    "gpus": ("%%local --gpus 1\nx = 1", ResourceError, "it asks for 1 gpu, it has none"),
    "nodes": ("%%local --nodes 2 --dry-run\nx = 1", ResourceError, "it asks for 2 nodes, it is one machine"),
    "bash cpus": ("%%local --cpus 4096 --bash\ntrue", ResourceError, "it asks for 4096 cpus"),
    "directory": ("%%local --directory nosuch\nx = 1", hy.HybridError, "nosuch does not exist: make it"),
    "bash directory": ("%%local --bash --directory nosuch\ntrue", hy.HybridError, "nosuch does not exist"),
    "empty": ("%%local\n\n  # nothing\n", UsageError, "there is nothing to run in this cell"),
    "empty script": ("%%local --bash\n#!/bin/sh\n", UsageError, "there is nothing to run in this cell"),
    "out": ("%%local --out scores\nscore = 1", CaptureError, "does not assign: 'scores'; did you mean 'score'?"),
    "in": ("%%local --in prin\nx = 1", CaptureError, "--in names what the notebook does not have: 'prin'$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_clear_message(name: str, run: Run, capsys: Any) -> None:
    cell, kind, words = BAD[name]
    run("data = 'x' * 50_000\nstream = (n for n in data)")
    with pytest.raises(kind, match=words.replace("(", r"\(").replace("?", r"\?")):
        run(cell)
    shown = "".join(capsys.readouterr())
    assert f"{kind.__name__}: " in shown
    assert "Traceback" not in shown
    assert "cellmagic.py" not in shown
    assert submitted() == 0


@pytest.mark.parametrize("cell", ["for x in range(3)\n    print(x)", "x = (1,\n", "x = 1\nreturn x", "  a = 1\n b = 2"])
def test_a_syntax_error_is_shown_as_python_shows_it(cell: str, run: Run, capsys: Any) -> None:
    with pytest.raises(SyntaxError) as plain:
        run(cell)
    capsys.readouterr()
    with pytest.raises(CaptureError) as error:
        run(f"%%local\n{cell}")
    shown = "".join(capsys.readouterr())
    assert isinstance(error.value.__cause__, SyntaxError)
    assert f"{type(plain.value).__name__}: " in shown
    assert re.search(r"Cell In\[2\], line \d\n", shown)
    assert shown.count("Cell In") == 1
    assert "cellmagic.py" not in shown
    assert submitted() == 0


def test_a_dry_run_shows_script_and_variables_and_submits_nothing(run: Run, home: Path, capsys: Any) -> None:
    run("x, f = 'x' * 3000, len")
    assert run("%%local --dry-run --array i=range(5) --out y --memory 1G\ny = f(x) * i") is None
    out = capsys.readouterr().out
    assert "Nothing is submitted" in out
    assert "5 tasks" in out
    assert "x  str, 2.9 kB" in out
    assert "Gives back: y" in out
    assert "#!/bin/bash" in out
    assert submitted() == 0
    run("%%local --dry-run --bash\necho hello")
    assert "echo hello" in capsys.readouterr().out
    assert submitted() == 0
    assert not (home / "runs").exists() or all(name.startswith(".") for name in os.listdir(home / "runs"))


# --- %hybrid --------------------------------------------------------------------------------------------------------


def test_hybrid_shows_its_verbs(run: Run, capsys: Any) -> None:
    run("%hybrid")
    out = capsys.readouterr().out
    for verb in ("jobs", "pools", "logs", "cancel", "retry", "wait", "result", "script", "doctor", "why"):
        assert f"\n    {verb} " in out


def test_hybrid_verbs(run: Run, shell: Any, capsys: Any) -> None:
    run("%%local --as job --out y\nfor i in range(3):\n    print('line', i)\ny = 5")
    job = shell.user_ns["job"]
    run("%hybrid wait job")
    assert shell.user_ns.pop("y") == 5
    table = run("%hybrid jobs --state completed --limit 3")
    assert [row["id"] for row in table] == [job.id]
    assert run("%hybrid jobs --state failed,cancelled") == []
    assert "local" in [row["name"] for row in run("%hybrid pools")]
    capsys.readouterr()
    run(f"%hybrid logs {job.id[:6]} --tail 2")
    assert capsys.readouterr().out.startswith("line 1\nline 2\n")
    run(f"%hybrid result {job.id}")
    assert shell.user_ns["y"] == 5
    run("%hybrid script job")
    assert "#!/bin/bash" in capsys.readouterr().out
    run("%hybrid cancel job")
    assert f"job {job.id} had ended: COMPLETED" in capsys.readouterr().out


def test_cancel_and_retry(run: Run, shell: Any) -> None:
    run("%%local --as job --out y\nimport os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\ny = 7")
    job = shell.user_ns["job"]
    run("%hybrid cancel job")
    with pytest.raises((hy.HybridError, concurrent.futures.CancelledError)):
        job.result(60)
    assert job.state is hy.JobState.CANCELLED
    Path("go").touch()
    assert run("%hybrid retry job --memory 300M") is job
    assert job.result(60) == 7
    assert job.run.folder.attempts()[-1].resources.memory == 300 * 2**20


def test_there_is_nothing_to_retry(run: Run, capsys: Any) -> None:
    run("%%local --as job --out y\ny = 1")
    run("job").result(60)
    capsys.readouterr()
    assert run("%hybrid retry job") is None
    assert f"job {run('job').id}: nothing to run again, all results are intact" in capsys.readouterr().out
    assert len(run("job").run.folder.attempts()) == 1


def test_the_result_of_a_function_is_the_value_of_the_line(run: Run) -> None:
    job = hy.Executor("local").submit(pow, 2, 5)
    assert run(f"value = %hybrid result {job.id}") is None
    assert run("value") == 32


def test_a_cell_of_an_earlier_kernel_gives_its_names_to_this_one(run: Run, shell: Any) -> None:
    job = run("%%local --out y\ny = 1")
    job.exception(60)
    shell.reset()
    run(f"%hybrid result {job.id}")
    assert shell.user_ns["y"] == 1


# --- the line -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12)))
def test_words_are_quoted_as_in_a_shell(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("--array")]
    assert split(shlex.join(words)) == words


@given(st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_python_values_pass_whole(value: object) -> None:
    assert split(f"--wait --array x={value!r} --cpus 2") == ["--wait", "--array", f"x={value!r}", "--cpus", "2"]


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_every_option_and_an_example(kind: str, shell: Any) -> None:
    found = shell.object_inspect(f"%%{kind}")
    for option in cell_parser(kind).values:
        assert f"\n  {option}" in found["docstring"]
    assert f"%%{kind} --array seed=range(100) --out score --cache" in found["docstring"]


def test_loading_the_extension_imports_nothing_heavy() -> None:
    code = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell as S\n"
        "shell = S.instance(); before = set(sys.modules)\n"
        "shell.run_line_magic('load_ext', 'jupyter_hybrid')\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('jupyter_hybrid.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(out[0].split()) <= {
        "IPython",
        "jupyter_hybrid",
        "difflib",
        "shlex",
        "argparse",
        "gettext",
        "locale",
        "_locale",
    }
    assert set(out[1].split()) == {f"jupyter_hybrid.{name}" for name in ("completer", "errors", "magics")}
