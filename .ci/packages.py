"""Install what the tests need of the distribution's packages, Slurm and a browser, if root is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from jupyter_hybrid.practice import missing_commands

PACKAGES = ["slurm-wlm", "slurm-client", "munge", "slurmdbd", "mariadb-server", "chromium"]


def main() -> int:
    """Return the exit status: 0 too where nothing can be installed, since the tests tell what they miss."""
    missing = missing_commands(accounting=True)
    if shutil.which("chromium") is None:
        missing.append("chromium")
    if not missing:
        return 0
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    sudo = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    allowed = not sudo or (
        shutil.which("sudo") and subprocess.run([*sudo, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
    )
    if not (shutil.which("apt-get") and allowed):
        print(f"no {', '.join(missing)}: the tests that need them are left out. To have them: {' '.join(install)}")
        return 0
    root = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive"]
    for command in (["apt-get", "update", "--quiet"], [*install, "--quiet"]):
        done = subprocess.run([*root, *command], check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
