"""Runs the scripts beside it, or those named, and prints a table of versions, seconds and outcomes.

pip install -e . -r examples/projects/requirements.txt
python examples/projects/run_all.py [torchgeo transformers pyg monai anomalib timm torchio webdataset litdata streaming]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "torchgeo": ["torchgeo"],
    "transformers": ["transformers", "datasets"],
    "pyg": ["torch-geometric"],
    "monai": ["monai"],
    "anomalib": ["anomalib"],
    "timm": ["timm"],
    "torchio": ["torchio"],
    "webdataset": ["webdataset"],
    "litdata": ["litdata"],
    "streaming": ["datasets"],
}
QUIET = ["-W", "ignore::FutureWarning", "-W", "ignore::DeprecationWarning"]  # of those packages, as they are imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(PACKAGES)}; all by default")
    names = parser.parse_args().names or list(PACKAGES)
    unknown = sorted(set(names) - set(PACKAGES))
    if unknown:
        parser.error(f"there is no script for {', '.join(unknown)}")

    rows, failed = [], []
    for place, name in enumerate(names, start=1):
        used = ", ".join(f"{package} {version(package)}" for package in PACKAGES[name])
        print(f"\n== {place} of {len(names)}: {used}", flush=True)
        started = time.perf_counter()
        script = Path(__file__).parent / f"with_{name}.py"
        # Models and data are generated; whoever tried to download some would find out here.
        ended = subprocess.run([sys.executable, *QUIET, script], env={**os.environ, "HF_HUB_OFFLINE": "1"})
        rows.append((used, time.perf_counter() - started, "ok" if ended.returncode == 0 else "FAILED"))
        if ended.returncode != 0:
            failed.append(name)

    installed = ", ".join(f"{package} {version(package)}" for package in ("lightning-cld", "lightning", "torch"))
    print(f"\nWith {installed}, Python {sys.version.split()[0]}:\n")
    print(f"{'project':<34} {'seconds':>7}  outcome")
    for used, seconds, outcome in rows:
        print(f"{used:<34} {seconds:>7.0f}  {outcome}")
    print(f"\n{len(names) - len(failed)} passed, {len(failed)} failed")
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
