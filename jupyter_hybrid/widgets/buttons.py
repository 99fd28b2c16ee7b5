"""The buttons below a card, by ipywidgets: in an output of their own, so that the card stands without them."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

from ..errors import HybridError
from ..handles import ArrayJob, Job
from ..spec import JobState

_LINES = 200
"""Lines of the log that are shown."""


class Buttons:
    """Cancel, Retry, Load results and Show log of one job; those that would do nothing are not there."""

    def __init__(self, job: Job | ArrayJob) -> None:
        self.job, self.state = job, job.row().state
        self.cancel = self._button("Cancel", "End the job", self._cancel)
        self.retry = self._button("Retry", "Run again what has no result", self._retry)
        names = ", ".join(job.spec.out)
        self.load = self._button("Load results", f"Bind {names} in the notebook", self._load)
        self.log = self._button("Show log", "Show the end of the log", self._toggle)
        self.said = ipywidgets.HTML()
        self.text = ipywidgets.HTML(layout=ipywidgets.Layout(display="none"))
        row = ipywidgets.HBox([self.cancel, self.retry, self.load, self.log, self.said])
        self.box = ipywidgets.VBox([row, self.text])
        self.refresh()

    def _button(self, label: str, tooltip: str, act: Callable[[], str]) -> Any:
        button = ipywidgets.Button(description=label, tooltip=tooltip, layout=ipywidgets.Layout(width="auto"))

        def pressed(_: Any) -> None:
            try:
                said = act()
            except Exception as error:  # noqa: BLE001  whatever the job raised is the answer
                said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.said.value = html.escape(said)
            self.refresh()

        button.on_click(pressed)
        return button

    def bundle(self) -> dict[str, Any]:
        """Return the MIME bundle; a front end that does not know or trust widgets shows nothing."""
        view = "application/vnd.jupyter.widget-view+json"
        return {"text/plain": "", "text/html": "", view: self.box._repr_mimebundle_()[view]}

    def refresh(self, waiting: bool = False) -> None:
        """Show the buttons that would do something now, and the log if it is open.

        A busy kernel hears no button; `waiting` tells that it waits for this very job.
        """
        if self.cancel.disabled != waiting:
            self.cancel.disabled = self.log.disabled = waiting
            self.said.value = "the kernel waits for this job; interrupt it to use the buttons" if waiting else ""
        state = self.job.row().state
        if state is not self.state and state.final:
            self.said.value = ""  # what was said of a press has come about
        self.state = state
        cell = self.job.spec.kind == "cell" and bool(self.job.spec.out)
        for button, useful in (
            (self.cancel, not state.final),
            (self.retry, state.final and state is not JobState.COMPLETED),
            (self.load, state is JobState.COMPLETED and cell),
        ):
            display = None if useful else "none"
            if button.layout.display != display:
                button.layout.display = display
        if self.text.layout.display is None:
            self._show_log()

    def _show_log(self) -> None:
        lines = self.job.logs().splitlines()[-_LINES:]
        body = html.escape("\n".join(lines) or "the log is empty")
        # A column in reverse order is scrolled to its end.
        box = "display:flex;flex-direction:column-reverse;max-height:24em;overflow:auto"
        shown = f'<div style="{box}"><pre style="white-space:pre-wrap;line-height:1.3;margin:4px 0">{body}</pre></div>'
        if self.text.value != shown:
            self.text.value = shown

    def _cancel(self) -> str:
        return "being cancelled" if self.job.cancel() else f"it had ended: {self.job.state}"

    def _retry(self) -> str:
        self.job.retry()
        return "submitted again"

    def _load(self) -> str:
        if self.job.bind is None:
            raise HybridError(f"use hy.job({self.job.id!r}).result(): its cell ran in another kernel")
        self.job.result()
        return f"bound: {', '.join(self.job.spec.out)}"

    def _toggle(self) -> str:
        hidden = self.text.layout.display == "none"
        self.text.layout.display = None if hidden else "none"
        self.log.description = "Hide log" if hidden else "Show log"
        return ""
