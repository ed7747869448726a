"""One file per method; importing this package registers all built-in strategies."""

from cl_platform.strategies import coda_prompt, dual_prompt, finetune, joint, l2p, linear_probe, nmc
from cl_platform.strategies.base import Component, Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.composition import Composition, build_strategies

__all__ = [
    "Component",
    "Composition",
    "Context",
    "Needs",
    "ParameterGroup",
    "Step",
    "Strategy",
    "build_strategies",
    "coda_prompt",
    "dual_prompt",
    "finetune",
    "joint",
    "l2p",
    "linear_probe",
    "nmc",
]
