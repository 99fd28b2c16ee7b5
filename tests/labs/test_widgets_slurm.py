"""What the card of a job says while it waits in the queue of a real Slurm."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.practice import PracticeSlurm
from jupyter_hybrid.widgets.card import html

DEADLINE = 120.0


def test_a_waiting_job_tells_why_and_until_when(
    slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "hybrid.yaml"
    config.write_text(
        f"pools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {slurm.conf}}}\n"
        "    resources: {nodes: 2, time: 10min, extra: {exclusive: }}\n    limits: {poll_min: 300ms, poll_max: 2s}\n"
    )
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    first = hy.Executor("hpc").submit(time.sleep, 600)
    end = time.monotonic() + DEADLINE
    while (started := first.row().started) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    second = hy.Executor("hpc").submit(abs, -1)
    pattern = r"(Resources|Priority)[^<]*; expected to start about (\d{4}-\d\d-\d\d \d\d:\d\d)"
    try:
        while (found := re.search(pattern, html(second))) is None:
            assert time.monotonic() < end, html(second)
            time.sleep(0.02)
        assert "PENDING" in html(second)
        wait = datetime.strptime(found[2], "%Y-%m-%d %H:%M").timestamp() - started
        assert 8 * 60 < wait < 20 * 60  # after the walltime of the first, to the minute
    finally:
        second.cancel()
        first.cancel()
        while not (first.state.final and second.state.final):
            assert time.monotonic() < end + DEADLINE
            time.sleep(0.02)
