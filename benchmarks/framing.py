"""What benchmarks of strategies share: their options, the lines above their table, and where it goes."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

from cl_platform.trainer import quiet_libraries


def parser(doc: str, steps: int, steps_help: str, strategies: str) -> argparse.ArgumentParser:
    """Options of a benchmark that times strategies in rounds; a script may add its own."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=steps, help=steps_help)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--strategies", default=strategies, help="names, with commas between them")
    made.add_argument("--save", type=Path, help="also write what is printed to a file")
    return made


def begin(threads: int) -> list[str]:
    """Threads set, libraries silenced; the command, machine and versions as lines."""
    torch.set_num_threads(threads)
    quiet_libraries()
    warnings.filterwarnings("ignore")
    return [
        f"command: python {' '.join(sys.argv)}",
        f"machine: {platform.machine()}, {os.cpu_count()} cores; {threads} thread(s)",
        f"versions: python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}",
    ]


def end(lines: list[str], save: Path | None) -> None:
    """Print, and write where it was asked for."""
    print("\n".join(lines))
    if save:
        save.write_text("\n".join(lines) + "\n")
