"""Digests of everything that training could notice: one per kind, taken after a fit."""

from __future__ import annotations

import hashlib
import pickle
import random

import numpy as np
import torch

from cl_platform.learner import ContinualLearner


def _sha(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous()
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _flat(value: object) -> list[object]:
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in (key, *_flat(inner))]
    if isinstance(value, (list, tuple)):
        return [item for inner in value for item in _flat(inner)]
    return [value]


def fingerprint(learner: ContinualLearner) -> dict[str, str]:
    """SHA-256 by kind; a gradient that is ``None`` differs from one of zeros."""
    trainer = learner.trainer
    named = list(learner.named_parameters())
    counters = (learner.step_in_task, learner.forwards_train, learner.learnt, trainer.global_step)
    return {
        "weights": _sha(*(item for name, p in named for item in (name, p))),
        "buffers": _sha(*(item for name, b in learner.named_buffers() for item in (name, b))),
        "gradients": _sha(*(item for name, p in named for item in (name, p.grad))),
        "optimizer": _sha(*_flat([o.state_dict() for o in trainer.optimizers])),
        "scheduler": _sha(*_flat([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs])),
        "random": _sha(torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()),
        "modes": _sha(*((name, module.training) for name, module in learner.named_modules())),
        "flags": _sha(*((name, p.requires_grad) for name, p in named)),
        "counters": _sha(*counters),
        "monitored": _sha(*sorted((k, float(v)) for k, v in trainer.callback_metrics.items())),
    }


def differing_kinds(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """Kinds whose digests are not equal."""
    return {kind for kind in one if one[kind] != other[kind]}
