"""Lightning loggers by name; each is imported only when it is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError, unknown_name


def _tensorboard(folder: Path, options: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", default_hp_metric=False, **options)


def _csv(folder: Path, options: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(save_dir=folder, name="csv", version="", **options)


def _wandb(folder: Path, options: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(save_dir=folder, **options)


def _mlflow(folder: Path, options: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    place = {} if "tracking_uri" in options else {"tracking_uri": f"sqlite:///{(folder / 'mlflow.db').resolve()}"}
    return MLFlowLogger(**{**place, **options})


LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def check_loggers(names: Iterable[str]) -> None:
    """Refuse loggers that cannot be built, before anything is written.

    Raises:
        UserError: an unknown logger, or one whose package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise unknown_name("logger", name, LOGGERS)
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise UserError("logger", name, "its package is not installed", f"Run pip install 'cl-platform[{name}]'")


def build_loggers(configs: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Any]:
    """The run's loggers, writing below ``folder``."""
    return [LOGGERS[name](folder, dict(options or {})) for name, options in configs.items()]
