"""Replays a target of the Dockerfile in a directory, without a container engine.

    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm ROOT
    ln -s python3 ROOT/usr/bin/python
    python tools/launch/replay_dockerfile.py --target cpu --root ROOT [--command 'bash x.sh']

ROOT stands for the image that the target is made from, and is changed. Each RUN goes through chroot
as the USER that the file names, with its ARG and ENV; COPY takes what git tracks. The CMD, or
--command, runs at the end. Needs root. It checks the steps, not the base image, layers or caches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

CONTEXT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Replay; the exit code of the command at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--arg", action="append", default=[], help="NAME=VALUE of an ARG")
    parser.add_argument("--pass", action="append", default=[], dest="kept", help="NAME to keep")
    parser.add_argument("--command", help="in the place of CMD")
    arguments = parser.parse_args()
    stage = Stage(arguments.root, dict(pair.split("=", 1) for pair in arguments.arg))
    stage.environment |= {name: os.environ[name] for name in arguments.kept}
    for instruction, rest in instructions((CONTEXT / "Dockerfile").read_text(), arguments.target):
        print(f"{instruction} {rest}", flush=True)
        stage.replay(instruction, rest)
    return stage.run(shlex.split(arguments.command) if arguments.command else stage.command)


def instructions(text: str, target: str) -> list[tuple[str, str]]:
    """The instructions of a target, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    found, inside = [], False
    for line in filter(str.strip, lines):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            inside = rest.split()[-1] == target
        elif inside:
            found.append((instruction, rest.strip()))
    if not found:
        raise SystemExit(f"replay_dockerfile: no target {target} in the Dockerfile")
    return found


class Stage:
    """The state that instructions leave for those that follow."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.user, self.directory = "0", "/"
        self.shell, self.command = ["/bin/sh", "-c"], ["bash"]

    def replay(self, instruction: str, rest: str) -> None:
        """One instruction."""
        if instruction == "RUN":
            code = self.run([*self.shell, rest])
            if code:
                raise SystemExit(f"replay_dockerfile: exit code {code} of RUN {rest}")
        elif instruction == "COPY":
            self._copy(rest)
        elif instruction == "ARG":
            name, _, value = rest.partition("=")
            self.environment[name] = self.arguments.get(name, value)
        elif instruction == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                self.environment[name] = self._expand(value)
        elif instruction == "USER":
            self.user, self.environment["HOME"] = rest, "/home/megatron"
        elif instruction == "WORKDIR":
            self.directory = rest
            self._inside(rest).mkdir(parents=True, exist_ok=True)
        elif instruction in ("SHELL", "CMD"):
            setattr(self, {"SHELL": "shell", "CMD": "command"}[instruction], json.loads(rest))
        else:
            raise SystemExit(f"replay_dockerfile: {instruction} is not understood")

    def run(self, argv: list[str]) -> int:
        """Words, as the user, in the working directory."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', self.directory, *argv]
        command = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), *inside]
        return subprocess.run(command, env=self.environment, check=False).returncode

    def _copy(self, rest: str) -> None:
        owner = re.match(r"--chown=(\w+):\w+ ", rest)
        *sources, target = rest[owner.end() if owner else 0 :].split()
        listed = subprocess.run(
            ["git", "ls-files", "-z", *sources], cwd=CONTEXT, check=True, capture_output=True
        )
        names = listed.stdout.decode().split("\0")[:-1]
        directory = self._inside(self.directory) / target
        uid = self._uid(owner[1]) if owner else 0
        for name in names:
            base = name if sources == ["."] else Path(name).name
            place = directory / base
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CONTEXT / name, place)
            for path in (place, *place.parents[: len(place.relative_to(directory).parts)]):
                os.chown(path, uid, uid)

    def _uid(self, user: str) -> int:
        entries = (self.root / "etc" / "passwd").read_text().splitlines()
        return next(int(e.split(":")[2]) for e in entries if e.startswith(f"{user}:"))

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _expand(self, value: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda m: self.environment.get(m[1], ""), value)


if __name__ == "__main__":
    sys.exit(main())
