"""The panel inside the one wheel: installed where there is no node, Lab and the server have it enabled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import jupyter_hybrid

ROOT = Path(__file__).parent.parent
PLACE = "data/share/jupyter/labextensions/jupyter-hybrid"


def run(*argv: str | Path, cwd: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE", "JUPYTER"))}
    done = subprocess.run(
        [*map(str, argv)], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_all_that_a_browser_asks_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name.partition(".data/")[2] for name in archive.namelist()]
        place = next(name for name in archive.namelist() if name.endswith(f"{PLACE}/package.json"))
        package = json.loads(archive.read(place))
        texts = b"".join(archive.read(name) for name in archive.namelist() if ".data/" in name)
    load = package["jupyterlab"]["_build"]["load"]
    share = PLACE
    assert f"{share}/{load}" in names
    assert {f"{share}/schemas/jupyter-hybrid/{name}.json" for name in ("panel", "notebook")} <= set(names)
    assert f"{share}/install.json" in names
    assert "data/etc/jupyter/jupyter_server_config.d/jupyter_hybrid.json" in names
    assert package["version"] == jupyter_hybrid.__version__
    assert str(ROOT).encode() not in texts


def test_installed_without_node_it_is_enabled(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *install, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "uname").symlink_to(shutil.which("uname") or "/bin/uname")
    assert shutil.which("node", path=str(bare)) is None
    own = {"PATH": str(bare), "HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    code = "import sys; from jupyterlab.labextensions import main; sys.argv = ['x', 'list']; main()"
    said = run(python, "-c", code, cwd=tmp_path, **own)
    line = next(line for line in said.splitlines() if "jupyter-hybrid" in line)
    assert "enabled" in line
    assert "OK" in line
    code = "import sys; from jupyter_server.extension.serverextension import main; sys.argv = ['x', 'list']; main()"
    said = run(python, "-c", code, cwd=tmp_path, **own)
    assert f"jupyter_hybrid {jupyter_hybrid.__version__}" in said
    assert any("jupyter_hybrid" in line and "enabled" in line for line in said.splitlines())
    assert "OK" in said.partition(f"jupyter_hybrid {jupyter_hybrid.__version__}")[2].splitlines()[0]
