"""Runs a notebook cell on a node in a real IPython shell and passes on all that it shows, as it appears.

This file is copied to the pool's storage and imported by the worker, where jupyter_hybrid may not be installed: no
relative import, the standard library only at import time, syntax of Python 3.8.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import copyreg
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_INTERVAL = 0.1
"""Seconds for which text is gathered before it is passed on."""


class Outputs:
    """Passes the outputs of the running cell on, in order, from any thread of this process."""

    def __init__(self) -> None:
        self.emit: Callable[[dict[str, Any]], None] | None = None
        self.lock = threading.RLock()
        self.name = ""
        self.pending: list[str] = []
        self.passed = 0.0
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None
        self.pid = os.getpid()
        self.shown = False  # whether an error was

    def text(self, name: str, text: str) -> None:
        """Pass text of a stream on at once, or together with what follows within the interval."""
        if self.emit is None or os.getpid() != self.pid:  # a forked child has the log only
            return
        with self.lock:
            if name != self.name:
                self.flush()
                self.name = name
            self.pending.append(text)
            if text.endswith("\n") and time.monotonic() - self.passed >= _INTERVAL:
                self.flush()
            else:
                self.wake.set()

    def flush(self) -> None:
        """Pass on the text gathered so far."""
        with self.lock:
            self.wake.clear()
            text, self.pending = "".join(self.pending), []
            if text and self.emit is not None:
                self.passed = time.monotonic()
                self.emit({"output_type": "stream", "name": self.name, "text": text})

    def pass_on(self, output: dict[str, Any]) -> None:
        """Pass an output on after the text before it."""
        if os.getpid() == self.pid:
            with self.lock:
                self.flush()
                self.shown = self.shown or output["output_type"] == "error"
                if self.emit is not None:
                    self.emit(output)

    def watch(self) -> None:
        """Flush what is left after each interval; runs in a thread of its own."""
        while True:
            self.wake.wait()
            time.sleep(_INTERVAL)
            self.flush()

    @contextlib.contextmanager
    def to(self, emit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Pass everything on to `emit` while the body runs, standard output and standard error included."""
        self.pid = os.getpid()
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.watch, name="outputs", daemon=True)
            self.thread.start()
        self.emit, self.shown = emit, False
        saved = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _OUT.over(saved[0]), _ERR.over(saved[1])
        try:
            yield
        finally:
            with self.lock:
                self.flush()
                self.emit = None
            sys.stdout, sys.stderr = saved


class Stream(io.TextIOBase):
    """Standard output or error of a cell: written to the log as well as passed on."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, outputs: Outputs) -> None:
        self._name = name
        self._outputs = outputs
        self._real: Any = None

    def over(self, real: Any) -> Stream:
        """Write through to this stream from now on."""
        if real is not self:
            self._real = real
        return self

    @property
    def name(self) -> str:  # noqa: D102
        return f"<{self._name}>"

    @property
    def buffer(self) -> Any:
        """The bytes below: what is written there reaches the log only."""
        return self._real.buffer

    def writable(self) -> bool:  # noqa: D102
        return True

    def fileno(self) -> int:  # noqa: D102
        return int(self._real.fileno())

    def write(self, text: str) -> int:  # noqa: D102
        if not isinstance(text, str):
            raise TypeError("write() argument must be str, not " + type(text).__name__)
        try:
            self._real.write(text)
        except UnicodeEncodeError:  # the log's encoding is the node's
            self._real.write(text.encode("ascii", "backslashreplace").decode())
        if "\n" in text:
            self._real.flush()
        self._outputs.text(self._name, text)
        return len(text)

    def flush(self) -> None:  # noqa: D102
        if self._real is not None:
            self._real.flush()

    def close(self) -> None:
        """Stay open: the next cell uses it too."""


_OUTPUTS = Outputs()
_OUT = Stream("stdout", _OUTPUTS)
_ERR = Stream("stderr", _OUTPUTS)
_SHELL: list[Any] = []  # at most one


def run_cell(payload: dict[str, Any], item: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a cell and return the variables it gives back.

    Parameters
    ----------
    payload : dict
        ``source``, ``inputs``, ``out``, ``explicit_out``, ``title`` as captured in the notebook; ``anchor`` is a
        function whose globals are those of the functions among the inputs.
    item : dict
        Further variables, of this task alone.
    emit : callable
        Gets each output as a dict in nbformat's form, plus ``clear_output`` and ``update_display_data``.

    Raises
    ------
    BaseException
        What the cell raised, after its traceback was shown.
    NameError
        A name that was asked for is not assigned at the end.
    """
    with _OUTPUTS.to(emit):
        shell = start()
        variables = _variables(payload)
        variables.update(payload["inputs"])
        variables.update(item)
        directory = os.getcwd()
        try:
            _run(shell, payload["source"], variables, payload.get("title") or "")
        finally:
            with contextlib.suppress(OSError):
                os.chdir(directory)
        return _results(variables, payload)


def _variables(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a namespace without traces of earlier tasks: the one the functions among the inputs read, if any."""
    anchor = payload.get("anchor")
    if anchor is None:
        return {}
    shared: dict[str, Any] = anchor.__globals__
    pristine = payload.setdefault("pristine", dict(shared))
    shared.clear()
    shared.update(pristine)
    return shared


def _run(shell: Any, source: str, variables: dict[str, Any], title: str) -> None:
    shell.user_module, shell.user_ns = shell.prepare_user_module(None, variables)
    given = dict(variables)
    shell.user_ns_hidden.clear()
    shell.execution_count = 1
    history = shell.history_manager
    history.reset(new_session=False)
    history.input_hist_parsed[:] = [""]
    history.input_hist_raw[:] = [""]
    shell.init_user_ns()
    variables.update(given)  # a variable of the notebook may be called `open` or `In`
    shell.init_sys_modules()
    shell.compile.reset_compiler_flags()
    shell.compile.title = title
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To exit: use")
        result = shell.run_cell(source, store_history=True)
    error = result.error_before_exec or result.error_in_exec
    if error is not None and not _OUTPUTS.shown and not _ends_well(error):
        # IPython prints exception groups and wrong magics itself; the output still says that the cell failed.
        _OUTPUTS.pass_on(_error(type(error), error, []))
    if isinstance(error, SystemExit):
        if not _ends_well(error):
            raise RuntimeError(f"the cell called sys.exit({error.code!r})") from error
    elif error is not None:
        raise error


def _ends_well(error: BaseException | None) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _error(kind: Any, value: Any, lines: list[str]) -> dict[str, Any]:
    return {"output_type": "error", "ename": kind.__name__, "evalue": str(value), "traceback": lines}


def _results(variables: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    found = {name: variables[name] for name in payload["out"] if name in variables}
    missing = [name for name in payload["out"] if name not in variables]
    if payload["explicit_out"]:
        if missing:
            raise NameError(f"the cell ended without assigning {', '.join(map(repr, missing))}, which --out names")
        return found
    for name in missing:
        _say(f"{name!r} is not given back: the cell ended without assigning it")
    for name, value in list(found.items()):
        reason = _unpicklable(value)
        if reason:
            _say(f"{name!r} is not given back, it is a {type(value).__name__}: {reason}")
            del found[name]
    return found


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


def _unpicklable(value: Any) -> str:
    """Return why a value cannot be given back, or an empty text; arrays are not copied to find out."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return ""
    import cloudpickle

    try:
        cloudpickle.Pickler(_Nowhere(), protocol=5, buffer_callback=lambda buffer: None).dump(value)
    except Exception as error:  # noqa: BLE001  user classes may raise anything while they are pickled
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def start() -> Any:
    """Return this process's IPython shell; its first start leaves the home folder alone and keeps no history file.

    Functions that use magics find the shell when they are unpickled: call this before a payload is loaded.
    """
    if not _SHELL:
        from IPython.core.interactiveshell import InteractiveShell

        InteractiveShell.clear_instance()
        folder = tempfile.mkdtemp(prefix="ipython-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        shell_class = _shell_class()
        # A function of the cell that uses magics refers to the shell: in the notebook to the one there.
        copyreg.pickle(shell_class, lambda shell: (InteractiveShell.instance, ()))
        _SHELL.append(shell_class.instance(ipython_dir=folder, config=_config()))
    return _SHELL[0]


def _config() -> Any:
    from traitlets.config import Config

    inline = "module://matplotlib_inline.backend_inline"
    if importlib.util.find_spec("matplotlib_inline") is not None:
        os.environ["MPLBACKEND"] = inline
    elif os.environ.get("MPLBACKEND") == inline:  # inherited from the notebook's kernel
        os.environ["MPLBACKEND"] = "agg"
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryManager.hist_file = ":memory:"
    return config


def _shell_class() -> Any:
    """Return IPython's shell with its outputs passed on; defined here because IPython is imported late."""
    from IPython.core.compilerop import CachingCompiler
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    class Compiler(CachingCompiler):  # type: ignore[misc]
        title = ""

        def format_code_name(self, name: str) -> tuple[str, str] | None:
            if self.title and name in self._filename_map:
                return "Cell", self.title
            found: tuple[str, str] | None = super().format_code_name(name)
            return found

    class Publisher(DisplayPublisher):  # type: ignore[misc]
        def publish(
            self,
            data: dict[str, Any],
            metadata: dict[str, Any] | None = None,
            source: Any = None,
            *,
            transient: dict[str, Any] | None = None,
            update: bool = False,
            **_: Any,
        ) -> None:
            output = {
                "output_type": "update_display_data" if update else "display_data",
                "data": _encoded(data),
                "metadata": metadata or {},
            }
            if transient:
                output["transient"] = transient
            _OUTPUTS.pass_on(output)

        def clear_output(self, wait: bool = False) -> None:
            _OUTPUTS.pass_on({"output_type": "clear_output", "wait": wait})

    class Hook(DisplayHook):  # type: ignore[misc]
        def write_output_prompt(self) -> None:
            pass

        def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
            _OUTPUTS.pass_on(
                {
                    "output_type": "execute_result",
                    "execution_count": self.prompt_count,
                    "data": _encoded(format_dict),
                    "metadata": md_dict or {},
                }
            )

        def finish_displayhook(self) -> None:
            self._is_active = False

    class Shell(InteractiveShell):  # type: ignore[misc]
        compiler_class = Compiler
        displayhook_class = Hook
        display_pub_class = Publisher

        def ask_exit(self) -> None:
            raise SystemExit(0)

        def enable_gui(self, gui: Any = None) -> None:
            """Do nothing: ``%matplotlib inline`` asks for it, and a node has no windows."""

        def showtraceback(self, *args: Any, **kwargs: Any) -> None:
            error = sys.exc_info()[1]
            if not _ends_well(error):
                super().showtraceback(*args, **kwargs)

        def _showtraceback(self, etype: Any, evalue: Any, stb: list[str]) -> None:
            _OUTPUTS.pass_on(_error(etype, evalue, list(stb)))

    return Shell


def _encoded(data: dict[str, Any]) -> dict[str, Any]:
    """Return a MIME bundle as nbformat has it: binary data in base64."""
    return {
        mime: base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
        for mime, value in data.items()
    }
