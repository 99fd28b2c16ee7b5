"""Keeps the cards in a notebook up to date: one thread for all, woken by the jobs themselves; no scheduler is asked."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from ..handles import ArrayJob, Handle, Job
from ..run import Run
from . import card as _card

if TYPE_CHECKING:
    from .buttons import Buttons

log = logging.getLogger(__name__)

_APART = 0.5
"""Least seconds between two updates."""
_MOST = 4 << 20
"""Bytes of outputs that are shown under a card; the rest is in ``job.outputs()``."""


class Card:
    """One job as shown under one cell."""

    def __init__(self, job: Job | ArrayJob, label: str, outputs: bool) -> None:
        from IPython import get_ipython

        self.job, self.label = job, label
        self.shell: Any = get_ipython()
        self.kernel = hasattr(self.shell, "kernel")
        self.parent: Any = self.shell.get_parent() if self.kernel else {}
        self.cell = _cell(self.shell)
        self.display_id = f"hybrid-{uuid.uuid4().hex}"
        self.outputs = _Outputs(self) if outputs and job.spec.kind == "cell" and not job.spec.array else None
        self.buttons: Buttons | None = None
        self.lock = threading.RLock()
        self.building = threading.Lock()  # ipywidgets takes long to load: the card does not wait for it
        self.shown = ""
        self.said = (job.row().state, job.row().reason)  # in a terminal
        self.waiting = False  # whether the kernel does nothing but wait for the job
        self.publish(update=False)
        job.run.listeners.append(self._news)

    def publish(self, update: bool) -> None:
        """Publish the card, if it has changed."""
        with self.lock:
            html = _card.html(self.job, self.label)
            if html != self.shown:
                self.shown = html
                self.shell.display_pub.publish(
                    _card.bundle(self.job, self.label), transient={"display_id": self.display_id}, update=update
                )

    def _news(self, run: Run) -> None:
        if self.kernel:
            _refresher.add(self)
        elif self.waiting:  # else there may be a prompt, into which nothing may be written
            self._say()

    def _say(self) -> None:
        """Write a line into a terminal if state or reason have changed."""
        row = _card.now(self.job)
        with self.lock:
            if not row.state.final and self.said != (row.state, row.reason):
                self.said = (row.state, row.reason)
                sys.stdout.write(_card.text(self.job) + "\n")
                sys.stdout.flush()

    def refresh(self) -> bool:
        """Bring all up to date; return whether the job may still change."""
        ended = _card.now(self.job).state.final
        if not self.kernel:
            if ended:
                sys.stdout.write(_card.text(self.job) + "\n")
                if self.job.spec.kind == "script":
                    sys.stdout.write(self.job.logs())
        else:
            self.publish(update=True)
            with self.building:
                self._show_buttons()
        with self.lock:
            if self.outputs is not None and (self.kernel or ended):
                self.outputs.show_new()
        return self.kernel and not self.job.row().state.final

    def withhold_error(self) -> None:
        """Keep an error that comes from now on for :meth:`settle_error`."""
        with self.lock:
            if self.outputs is not None:
                self.outputs.withholds = True

    def settle_error(self, raised: bool) -> list[str]:
        """Return the traceback of an error that was kept, for it is raised now; or else show it as it would have been.

        The list is empty if there is none.
        """
        with self.lock:
            if self.outputs is None:
                return []
            error, self.outputs.error, self.outputs.withholds = self.outputs.error, None, False
            if error is not None and not raised:
                self.outputs.show(error)
            return list(error["traceback"]) if error is not None and raised else []

    def _show_buttons(self) -> None:
        if self.buttons is None:
            # A front end that can ask its user something has a user, who can press a button.
            if not (self.parent.get("content") or {}).get("allow_stdin"):
                return
            from .buttons import Buttons

            self.buttons = Buttons(self.job)
            self.send("display_data", data=self.buttons.bundle(), metadata={}, transient={})
        self.buttons.refresh(self.waiting)

    def send(self, kind: str, **content: Any) -> None:
        """Send an output to the cell of this card, whichever cell is running now."""
        publisher = self.shell.display_pub
        publisher.session.send(publisher.pub_socket, kind, content, parent=self.parent, ident=kind.encode())


class _Outputs:
    """Shows what a job's cell displays, in order, below its card."""

    def __init__(self, shown_by: Card) -> None:
        self.card = weakref.proxy(shown_by)
        self.folder = shown_by.job.run.folder.path / "outputs"
        self.read: dict[str, int] = {}
        self.total = 0
        self.slots: list[str] = []  # displays that can be updated, in order
        self.used = 0  # of them, how many show something
        self.withholds = False  # whether an error is kept for who waits for the job, and raises it
        self.error: dict[str, Any] | None = None

    def show_new(self) -> None:
        """Show what has come since the last time."""
        for output in _merged(self._new()):
            self.show(output)

    def _new(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("*.jsonl"), key=lambda path: int(path.stem)):
            start = self.read.get(path.name, 0)
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self.read[path.name] = start + whole
            for line in data[:whole].splitlines():
                self.total += len(line)
                if self.total > _MOST and self.total - len(line) <= _MOST:
                    more = f"… more than {_MOST >> 20} MB; job.outputs() has the rest\n"
                    found.append({"output_type": "stream", "name": "stderr", "text": more})
                elif self.total <= _MOST:
                    with contextlib.suppress(ValueError):  # a line that a full disk has cut short
                        found.append(json.loads(line)["output"])
        return found

    def show(self, output: dict[str, Any]) -> None:
        """Show one output."""
        kind = output["output_type"]
        if kind == "clear_output":
            self._clear()
        elif kind == "error" and self.withholds:
            self.error = output
        elif not self.card.kernel:
            _print(self.card.shell, output)
        elif kind == "stream":
            self.card.send("stream", name=output["name"], text=output["text"])
        elif kind == "error":
            names = ("ename", "evalue", "traceback")
            self.card.send("error", **{name: output[name] for name in names})
        else:
            self._display(output, kind == "update_display_data")

    def _display(self, output: dict[str, Any], update: bool) -> None:
        own = (output.get("transient") or {}).get("display_id")
        if own is not None:
            display_id = f"{self.card.display_id}-{own}"
        elif self.used < len(self.slots):  # a place that was cleared
            display_id, update = self.slots[self.used], True
        else:
            display_id = f"{self.card.display_id}-{len(self.slots)}"
        if own is None:
            if not update:
                self.slots.append(display_id)
            self.used += 1
        self.card.send(
            "update_display_data" if update else "display_data",
            data=output["data"],
            metadata=output.get("metadata") or {},
            transient={"display_id": display_id},
        )

    def _clear(self) -> None:
        """Empty the displays for reuse; text of streams cannot be taken back, and the card must not go."""
        for display_id in self.slots[: self.used]:
            self.card.send(
                "update_display_data", data={"text/html": ""}, metadata={}, transient={"display_id": display_id}
            )
        self.used = 0


def _merged(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return outputs with the texts of one stream in a row joined, and without what is cleared at once."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == "clear_output":
            found = [output]
        elif output["output_type"] == "stream" == last.get("output_type") and output["name"] == last["name"]:
            found[-1] = {**last, "text": last["text"] + output["text"]}
        else:
            found.append(output)
    return found


def _print(shell: Any, output: dict[str, Any]) -> None:
    kind = output["output_type"]
    if kind == "stream":
        (sys.stderr if output["name"] == "stderr" else sys.stdout).write(output["text"])
    elif kind == "error":
        sys.stderr.write("\n".join(output["traceback"]) + "\n")
    else:
        shell.display_pub.publish(output["data"], output.get("metadata") or {})


def replay(outputs: list[dict[str, Any]]) -> None:
    """Show outputs under the running cell as they were at their end."""
    from IPython import get_ipython

    last: list[dict[str, Any]] = []
    for output in _merged(outputs):
        own = (output.get("transient") or {}).get("display_id")
        same = [each for each in last if own is not None and (each.get("transient") or {}).get("display_id") == own]
        for each in same:
            each["data"] = output["data"]
        if not same and output["output_type"] != "clear_output":
            last.append(dict(output))
    for output in last:
        _print(get_ipython(), output)


class _Refresher:
    """The thread that refreshes all cards whose jobs have not ended."""

    def __init__(self) -> None:
        self.cards: set[Card] = set()
        self.lock = threading.Lock()
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None

    def flush(self, *_: Any) -> None:
        """Show at the end of every cell what is known by then.

        A program that executes notebooks takes updates only while a cell runs, and the next may be a short one.
        """
        for shown in self.live():
            shown.publish(update=True)

    def live(self) -> list[Card]:
        """Return the cards that are refreshed."""
        with self.lock:
            return list(self.cards)

    def add(self, shown: Card) -> None:
        """Refresh a card from now on, until its job has ended."""
        with self.lock:
            self.cards.add(shown)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="hybrid-cards", daemon=True)
                self.thread.start()
        self.wake.set()

    def _run(self) -> None:
        while True:
            self.wake.wait(1.0)  # times that are shown go on without news
            self.wake.clear()
            for shown in self.live():
                try:
                    live = shown.refresh()
                except Exception:  # the other cards must go on
                    log.exception("the card of job %s", shown.job.id)
                    live = False
                if not live:
                    with self.lock:
                        self.cards.discard(shown)
            with self.lock:
                if not self.cards:
                    self.thread = None
                    return
            time.sleep(_APART)


_refresher = _Refresher()
_shown: weakref.WeakValueDictionary[str, Card] = weakref.WeakValueDictionary()


def _cell(shell: Any) -> str:
    """Return what tells one execution of a cell from another."""
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return str((parent.get("header") or {}).get("msg_id") or shell.execution_count)


def here(job: Handle) -> Card | None:
    """Return the card of a job under the running cell, if it is there."""
    from IPython import get_ipython

    known = _shown.get(job.id)
    return known if known is not None and known.job is job and known.cell == _cell(get_ipython()) else None


def card(job: Job | ArrayJob, label: str, outputs: bool) -> Card:
    """Return the card of a job under the running cell, shown now if it is not there yet."""
    known = here(job)
    if known is not None:
        return known
    new = _shown[job.id] = Card(job, label, outputs)
    if new.kernel:
        if _refresher.flush not in new.shell.events.callbacks["post_run_cell"]:
            new.shell.events.register("post_run_cell", _refresher.flush)
        _refresher.add(new)
    return new
