"""The package as users have it: built as a wheel and installed in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.support.runs import ROOT

#: What the wheel is built from.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """The wheel, built in a folder that is empty."""
    source = folder / "source"
    shutil.copytree(
        ROOT / "megatron_rl",
        source / "megatron_rl",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    # No isolation: setuptools is that of this environment, for there may be no network.
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed_in(folder: Path) -> Path:
    """The interpreter of a new environment with the wheel; libraries are those of this one."""
    wheel = build_wheel(folder / "build")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (place / "libraries.pth").write_text("\n".join(libraries) + "\n")
    _pip("install", "--no-deps", "--target", str(place), str(wheel))
    return python


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--no-input", *words],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
