"""State on which decisions rest: it stays on the host wherever its module goes, and is saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


class HostState(nn.Module):
    """A module with arrays that stand in its ``state_dict`` without being moved to a device.

    Subclasses say what they remember in :meth:`host_state` and take it back in :meth:`load_host_state`.
    """

    def host_state(self) -> dict[str, Any]:
        """Arrays by name; the names never change, the shapes may."""
        return {}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`host_state` gave, in an object built alike."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.host_state().items():
            destination[prefix + name] = torch.from_numpy(np.array(value))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        names = [prefix + name for name in self.host_state()]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in names]
        absent = [name for name in names if name not in state_dict]
        missing_keys.extend(absent)
        if names and not absent:
            self.load_host_state({name[len(prefix) :]: state_dict[name].cpu().numpy().copy() for name in names})
