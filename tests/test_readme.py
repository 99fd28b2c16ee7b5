"""What the README says is true: its code runs in order in one IPython, its commands and its configuration are valid."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jupyter_hybrid import config
from jupyter_hybrid.cli import build_parser
from jupyter_hybrid.magics import hybrid_parser

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

RUN = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for block in json.load(sys.stdin):
    shell.run_cell(block, store_history=True).raise_error()
"""


def blocks(*languages: str) -> list[str]:
    return [text for language, text in BLOCKS if language in languages]


def test_the_code_runs() -> None:
    code = blocks("ipython", "python")
    assert len(code) >= 8
    # The job's own functions must be those of a notebook: __main__ of a process of its own.
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(code), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 30 results were reused" in done.stdout


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_the_commands_exist(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["jupyter", "hybrid"]:
        build_parser().parse_args(words[2:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[:3] == ["pip", "install", "."]


def test_the_configuration_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "hybrid.yaml").write_text(text)
    monkeypatch.setenv("USER", os.environ.get("USER", "me"))
    loaded = config.load(tmp_path)
    assert loaded.default == "hpc"
    assert loaded.pool("hpc").kind == "slurm"
    assert loaded.pool("hpc").prologue == ("module load gcc",)
    assert loaded.pool("desk").options == {"cpus": 4, "memory": 8 * 2**30}


def test_every_verb_is_told() -> None:
    told = re.findall(r"^\| `(\w+)[^`]*` \|", TEXT, re.MULTILINE)
    shown = re.findall(r"^    (\w+) ", build_parser().format_help(), re.MULTILINE)
    assert sorted(told) == sorted(shown)
    assert set(hybrid_parser().verbs) == set(told[: told.index("reindex")])


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in target or (ROOT / target).exists(), target
    for extra in re.findall(r"'\.\[(\w+)\]'", TEXT):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
