"""How a data set becomes a stream of tasks: sources, decoded images, splits, batches and transforms."""

from cl_platform.scenarios.build import build_stream, stream_from_datasets
from cl_platform.scenarios.config import DataConfig, ScenarioConfig, TransformConfig
from cl_platform.scenarios.extended import Extension, build_extended
from cl_platform.scenarios.hidden import StreamLoader, as_told
from cl_platform.scenarios.image_set import ImageSet
from cl_platform.scenarios.loader import TaskLoader
from cl_platform.scenarios.stream import Stream, Task
from cl_platform.scenarios.transforms import Transforms

__all__ = [
    "DataConfig",
    "Extension",
    "ImageSet",
    "ScenarioConfig",
    "Stream",
    "StreamLoader",
    "Task",
    "TaskLoader",
    "TransformConfig",
    "Transforms",
    "as_told",
    "build_extended",
    "build_stream",
    "stream_from_datasets",
]
