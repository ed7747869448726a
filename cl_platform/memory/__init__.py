"""Replay buffers: what is stored, which examples are kept, how they are drawn. No loss stands in here."""

from cl_platform.memory.adapters import AvalanchePolicy
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.build import BufferConfig, build_buffer, build_policy
from cl_platform.memory.columns import Replay, bytes_per_slot, slots_for_bytes
from cl_platform.memory.policies import Contents, Decision, Offers, Policy
from cl_platform.memory.samplers import SAMPLERS

__all__ = [
    "SAMPLERS",
    "AvalanchePolicy",
    "BufferConfig",
    "Contents",
    "Decision",
    "Offers",
    "Policy",
    "Replay",
    "ReplayBuffer",
    "build_buffer",
    "build_policy",
    "bytes_per_slot",
    "slots_for_bytes",
]
