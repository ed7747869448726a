"""The Lightning trainer of a run, its silence, and its memory errors in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from cl_platform.errors import UserError
from cl_platform.run_config import TrainerConfig

NOISE = (
    ".*does not have many workers.*",
    ".*experiment logs directory.*",
    ".*srun.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*Detected call of `lr_scheduler.step.*",
    ".*number of training batches.*",
    r".*module\(s\) in eval mode at the start.*",
)
"""Lightning's warnings about what is meant to be so here."""


def quiet_libraries() -> None:
    """Keep Lightning's chatter out of the terminal."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def build_trainer(config: TrainerConfig, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer for the whole stream, in one process; epochs are granted task by task.

    Raises:
        UserError: a key that Lightning does not take, or more than one device.
    """
    try:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator=config.accelerator,
            devices=1 if config.devices == "auto" else config.devices,
            precision=config.precision,  # type: ignore[arg-type]
            gradient_clip_val=config.gradient_clip_val,
            accumulate_grad_batches=config.accumulate_grad_batches,
            deterministic="warn" if config.deterministic else False,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **config.lightning,
        )
    except Exception as error:  # Lightning's own refusals: TypeError, ValueError, MisconfigurationException
        text = " ".join(str(error).split()).rstrip(".!")
        name = next((k for k in ("precision", "devices", "accelerator") if k in text.lower()), "accelerator")
        if config.lightning and "unexpected keyword" in text:
            raise UserError("trainer.lightning", config.lightning, text, "Remove the key") from error
        todo = "Use trainer.accelerator=auto or cpu" if name == "accelerator" else f"Change trainer.{name}"
        raise UserError(f"trainer.{name}", getattr(config, name), text, todo) from error
    if trainer.world_size > 1:
        raise UserError(
            "trainer.devices", config.devices, "a run is one process on one device",
            "Write trainer.devices=1, or a list of one such as [2]; hydra/launcher=joblib starts runs side by side",
        )  # fmt: skip
    if isinstance(trainer.precision_plugin, (DoublePrecision, HalfPrecision)):  # statistics keep their own types
        raise UserError(
            "trainer.precision", config.precision, "all numbers of a learner in one other format cannot be trained",
            "Write trainer.precision=bf16-mixed, 16-mixed or 32-true",
        )  # fmt: skip
    return trainer


def batches_of(images: int, config: TrainerConfig) -> int:
    """Batches of one epoch."""
    return images // config.batch_size if config.drop_last else -(-images // config.batch_size)


@contextmanager
def explained_memory(config: TrainerConfig) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one line about the batch size."""
    words = ("out of memory", "can't allocate memory", "bad_alloc")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        smaller = max(1, config.batch_size // 2)
        raise UserError(
            "trainer.batch_size",
            config.batch_size,
            "does not fit into memory",
            f"Set trainer.batch_size={smaller} and trainer.accumulate_grad_batches=2",
        ) from error
