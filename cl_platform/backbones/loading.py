"""Weights from files, without ever running what a file contains: safetensors, safe unpickling, plain numpy archives.

A load is strict: a key of the model that the file lacks, a key of the file that the model lacks, and a shape that
differs are errors that name the key. Classifier heads of the file are left out, because backbones have none.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_platform.errors import UserError

KEY = "backbone.weights"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".npz")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries in which training programs keep the weights, in the order of preference that timm has."""
CONVERT = "Convert the file to .safetensors on a machine where you trust it, and give that file"


def load_weights(model: nn.Module, path: str | Path, prefix: str | None = None, container: str | None = None) -> None:
    """Fill all parameters and buffers of ``model`` from a local file.

    Args:
        model: a model without classifier; the file's tensors are cast to the model's types.
        path: a file with one of the suffixes ``SUFFIXES``.
        prefix: keep only keys with this beginning and strip it, for example ``backbone.``.
        container: the entry that holds the weights, dots go deeper; ``None`` tries ``CONTAINERS``.

    Raises:
        UserError: no such file, an unknown suffix, content that would need unsafe unpickling, a missing or left-over
            key, a wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(KEY, path, "there is no such file", "Give the path of an existing file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(KEY, path, f"the suffix must be one of {', '.join(SUFFIXES)}", "Rename or convert the file")
    if path.suffix.lower() == ".npz":
        _load_npz(model, path, prefix or "")
        return
    state = _strip(_tensors(read_checkpoint(path), path, container), prefix, path)
    state = _without_heads(_converted(state, model, path), model)
    _check(state, model, path)
    model.load_state_dict(state, strict=True)


def read_checkpoint(path: Path) -> Any:
    """The content of a ``.safetensors`` or PyTorch file; a pickle with anything but plain data is refused."""
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(KEY, path, f"is not a readable safetensors file ({error})", "Give another file") from error
    try:
        # Training programs of timm store their arguments as a Namespace, which holds plain data only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _unsafe_globals(path)
        what = f"holds Python objects ({', '.join(names)})" if names else "is not a plain PyTorch weights file"
        raise UserError(KEY, path, f"refused: it {what}, and unpickling could run any program", CONVERT) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(KEY, path, f"is not a readable PyTorch file ({error})", CONVERT) from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # only the wording of a refusal depends on it, and broken files raise anything here
        return []


def _tensors(content: Any, path: Path, container: str | None) -> dict[str, Tensor]:
    if container:
        for part in container.split("."):
            if not isinstance(content, Mapping) or part not in content:
                entries = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else "none"
                raise UserError(
                    "backbone.container", container, f"{path.name} has no such entry; it has {entries}", "Name one"
                )
            content = content[part]
    elif isinstance(content, Mapping):
        entry = next((c for c in CONTAINERS if isinstance(content.get(c), Mapping)), None)
        content = content[entry] if entry else content
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        entries = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(KEY, path, f"no tensors found; the file holds {entries}", "Set backbone.container=ENTRY")
    return state


def _strip(state: dict[str, Tensor], prefix: str | None, path: Path) -> dict[str, Tensor]:
    if not prefix:
        from timm.models import clean_state_dict

        return cast("dict[str, Tensor]", clean_state_dict(state))
    kept = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not kept:
        raise UserError(
            "backbone.prefix", prefix, f"no key of {path.name} begins so; its first is {next(iter(state))}", "Change it"
        )
    return kept


def _converted(state: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Foreign names and sizes to the model's own, by the filter that timm ships beside the model's class."""
    if "_conv_stem.weight" in state:
        from cl_platform.backbones.cnn import tf_efficientnet_state

        return tf_efficientnet_state(state, model, path)
    convert: Callable[..., Any] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    ) or getattr(sys.modules.get("timm.models.vision_transformer"), "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return state
    if getattr(model, "patch_embed", None) is None and convert.__module__ == "timm.models.vision_transformer":
        return state
    # DeiT-III names its layer scales gamma_1, gamma_2.
    options = {"adapt_layer_scale": True} if any(".gamma_1" in name for name in state) else {}
    try:
        return cast("dict[str, Tensor]", convert(state, model, **options))
    except (RuntimeError, KeyError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            KEY, path, f"does not fit {type(model).__name__} ({type(error).__name__}: {error})", "Check backbone.name"
        ) from error


def _without_heads(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = set(model.state_dict())
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ("head", "fc", "classifier")
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    # Attention pooling that the model lacks, and mask tokens of masked-image pretraining, serve no feature.
    dropped = tuple(f"{name}." for name in {*heads, "head", "head_dist", "attn_pool", "pre_logits"})
    masks = {"mask_token", "masked_embed"}
    return {n: t for n, t in state.items() if n in own or not (n.startswith(dropped) or n in masks)}


def _check(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    own = model.state_dict()
    missing, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or surplus:
        parts = [f"{_some(missing)} missing in the file"] * bool(missing)
        parts += [f"{_some(surplus)} left over"] * bool(surplus)
        raise UserError(
            KEY,
            path,
            f"does not fit {type(model).__name__}: {'; '.join(parts)}",
            "Check backbone.name, or map the file's keys with backbone.container and backbone.prefix",
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                KEY,
                path,
                f"{name} has the shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}",
                "Check that backbone.name is the architecture of the file",
            )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _load_npz(model: nn.Module, path: Path, prefix: str) -> None:
    """Weights in the layout of Google's JAX programs, by the model's own reader, which does not unpickle."""
    import numpy as np

    reader = getattr(model, "load_pretrained", None)
    if reader is None:
        raise UserError(KEY, path, f"{type(model).__name__} cannot read .npz", "Give a .safetensors file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
        blocks = {int(m.group(1)) for n in names if (m := re.search(r"encoderblock_(\d+)/", n))}
        depth = len(cast(Any, model).blocks)
        if blocks and max(blocks) + 1 != depth:
            raise ValueError(f"the file has {max(blocks) + 1} blocks, the model {depth}")
        with torch.no_grad():
            # The reader says nothing of weights that it does not touch: what is still NaN afterwards was not there.
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
            reader(str(path), prefix) if prefix else reader(str(path))
    except Exception as error:  # numpy, zip and the model's reader fail in many ways, each of them means the file
        raise UserError(
            KEY, path, f"is not a readable .npz of {type(model).__name__} ({error})", "Check backbone.name"
        ) from error
    missing = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if missing:
        raise UserError(KEY, path, f"holds no finite values for {_some(missing)}", "Check backbone.name")


def smoke_check(backbone: nn.Module, input_size: int, path: object) -> None:
    """Refuse weights whose features are not finite, or equal for two different images.

    Args:
        backbone: maps (B, 3, S, S) to (B, D); its mode is restored.
        input_size: S.
        path: where the weights came from, for the message.
    """
    ramp = torch.linspace(-1, 1, 3 * input_size * input_size).reshape(1, 3, input_size, input_size)
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        first, second = backbone(torch.cat((ramp, -ramp)))
    for module, mode in modes.items():
        module.training = mode
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise UserError(KEY, path, "the features are not finite", "The file is broken; give another one")
    if torch.equal(first, second):
        raise UserError(KEY, path, "two images give the same features", "The file is broken; give another one")
