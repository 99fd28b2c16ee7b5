"""The teaching notebook on a real Slurm: the word ``%%local`` becomes ``%%slurm``, nothing else changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from jupyter_hybrid.practice import PracticeSlurm


def load_test_notebook() -> ModuleType:
    path = Path(__file__).parents[1] / "test_notebook.py"
    spec = importlib.util.spec_from_file_location("test_notebook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
def test_the_first_notebook_on_slurm(
    slurm: PracticeSlurm, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "hybrid.yaml"
    config.write_text(f"pools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {slurm.conf}}}\n")
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    on_this_machine = load_test_notebook()
    on_this_machine.check(on_this_machine.execute(on_this_machine.NOTEBOOK, "slurm"), "hpc")
