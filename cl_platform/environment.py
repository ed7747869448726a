"""``environment.json``: with what a result was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_platform.backbones import Backbone
    from cl_platform.scenarios import Stream

PACKAGES = (
    "cl-platform",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "scikit-learn",
)


def describe(seed: int, stream: Stream, backbone: Backbone, backbone_digest: str, transform_id: str) -> dict[str, Any]:
    """Versions, machine, data and weights of a run.

    Args:
        seed: the run's seed.
        stream: the scenario's tasks.
        backbone: before any training.
        backbone_digest: SHA-256 of the backbone's weights before any training.
        transform_id: the evaluation transform in words.
    """
    import torch

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "device": _device_name(),
        "numerics": {
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "seed": seed,
        "git_commit": git_commit(),
        "dataset": {
            "scenario": stream.name,
            "setting": stream.setting,
            "source": stream.source,
            "digest": stream.digest,
            "class_order": list(stream.class_order),
            "tasks": [
                {"task_id": t.task_id, "classes": list(t.classes), "train": len(t.train), "test": len(t.test)}
                for t in stream.tasks
            ],
            "skipped_images": stream.skipped,
        },
        "backbone": {
            "tag": backbone.tag,
            "weights_sha256": backbone_digest,
            "input_size": backbone.input_size,
            "input_mean": list(backbone.mean),
            "input_std": list(backbone.std),
            "evaluation_transform": transform_id,
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_version() -> str:
    """Version of this package; ``unknown`` in a checkout that was not installed."""
    return _version("cl-platform") or "unknown"


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` after local changes; else ``None``."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
