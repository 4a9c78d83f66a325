"""Runs the scripts of this folder in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_script(name: str, *arguments: Any, log: Path, timeout: float = 300) -> str:
    """Runs a script until it ends, or kills it and all that it started; returns what it printed.

    It prints to a file: a pipe would stay open as long as any process hangs.
    """
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "PATH": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        script = subprocess.Popen(
            [sys.executable, name, *arguments],
            cwd=Path(__file__).parent,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            script.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
    return log.read_text()
