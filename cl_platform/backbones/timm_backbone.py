"""timm's models as backbones: full tags, creation, weights from the hub or a file."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from cl_platform.backbones.base import Backbone, BackboneConfig, BackboneKind, input_range
from cl_platform.backbones.loading import load_weights, smoke_check
from cl_platform.backbones.prefix import PromptedViT, supports_prompts
from cl_platform.errors import UserError, nearest
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.registry import backbones

HUB_TIMEOUT_SECONDS = 4.0
OFFLINE_CHOICES = "Set backbone.weights=FILE, or use backbone=vit_nano, whose weights come with the installation"
SHORT_NAMES = {
    "vit_base": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
}


def resolve_tag(name: str | None, random_weights: bool = False) -> str:
    """The full name ``architecture.tag`` of a timm model.

    A plain name stands for whatever weights timm prefers at the time, which changed over its versions; it is accepted
    only where there is nothing to choose: one tag, none, or random weights.

    Args:
        name: what the user gave as ``backbone.name``.
        random_weights: whether no pretrained weights are wanted.

    Raises:
        UserError: no name, an unknown architecture or tag, a plain name with several tags.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    if not name:
        raise UserError("backbone.name", name, "a full timm tag is needed", f"Write {SHORT_NAMES['vit_base']}")
    architecture, tag = split_model_name_tag(name)
    if architecture not in timm.list_models():
        near = nearest_full_tags(name)
        todo = f"Did you mean {' or '.join(near)}" if near else "timm.list_models() prints all names"
        raise UserError("backbone.name", name, f"timm {timm.__version__} has no model of this name", todo)
    known = list(get_arch_pretrained_cfgs(architecture))
    if tag:
        if name not in known:
            near = _by_likeness(name, known)[:1]
            raise UserError(
                "backbone.name",
                name,
                f"unknown tag; {architecture} has {', '.join(known) or 'none'}",
                f"Did you mean {near[0]}" if near else f"Use {architecture}",
            )
        return name
    if len(known) > 1 and not random_weights:
        raise UserError(
            "backbone.name",
            name,
            f"the plain name is ambiguous, it stands for {', '.join(known)}",
            "Write one of these full tags",
        )
    return known[0] if len(known) == 1 else name


def nearest_full_tags(name: str, count: int = 3) -> list[str]:
    """Full names that look most like one that timm does not know, best first, at most ``count``.

    The mistake may sit in the architecture, in the tag, or in the sign between them. A plain name's neighbours are
    architectures with their first tag, and full names whose dot was mistaken.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    lowered = name.lower()
    architecture, tag = split_model_name_tag(lowered)
    near = nearest(architecture, timm.list_models(), count)
    tags = [list(get_arch_pretrained_cfgs(known)) or [known] for known in near]
    if tag:
        return _by_likeness(lowered, [full for each in tags for full in each])[:count]
    found = dict.fromkeys([each[0] for each in tags] + nearest(lowered, timm.list_pretrained(), count))
    return _by_likeness(lowered, found)[:count]


def _by_likeness(name: str, known: Iterable[str]) -> list[str]:
    """``known``, best first, by what architecture and tag each have in common with ``name``'s, or all with all."""

    def parts(full: str) -> list[str]:
        return full.split(".", 1) if "." in name else [full]

    def likeness(full: str) -> float:
        both = itertools.zip_longest(parts(name), parts(full), fillvalue="")
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in both)

    return sorted(known, key=likeness, reverse=True)


@backbones.register("timm")
def build_timm(config: BackboneConfig, seed: int) -> Backbone:
    """``backbone=timm``: any timm model by its full tag; a supported vision transformer becomes a PromptedViT."""
    from timm.models import get_pretrained_cfg

    if config.weights == "package":
        raise UserError(
            "backbone.weights", "package", "only efficientnet_lite0 has a weights package", "Give a file or null"
        )
    pretrained = config.wants_pretrained(available=True)
    tag = resolve_tag(config.name, random_weights=not pretrained and config.weights is None)
    registered = get_pretrained_cfg(tag)
    if pretrained and not (registered and registered.has_weights):
        raise UserError(
            "backbone.pretrained",
            True,
            f"timm has no weights for {tag}",
            "Set backbone.weights=FILE or pretrained=false",
        )
    model = create_timm(tag, config, seed, pretrained)
    if config.weights is not None:
        load_weights(model, config.weights, config.prefix, config.container)
    origin = config.weights or ("hub" if pretrained else "random")
    backbone = wrap(model, config, tag, origin)
    if origin != "random":
        smoke_check(backbone, backbone.input_size, config.weights or tag)
    return backbone


def _short(kind: str) -> None:
    @backbones.register(kind)
    def build(config: BackboneConfig, seed: int) -> Backbone:
        """A short name for one timm tag."""
        import dataclasses

        if config.name not in (None, SHORT_NAMES[kind]):
            raise UserError(
                "backbone.name", config.name, f"backbone={kind} means {SHORT_NAMES[kind]}", "Use backbone=timm"
            )
        return build_timm(dataclasses.replace(config, name=SHORT_NAMES[kind]), seed)


for _kind in SHORT_NAMES:
    _short(_kind)


def create_timm(tag: str, config: BackboneConfig, seed: int, pretrained: bool) -> nn.Module:
    """A timm model without classifier; what its initialisers draw comes from the run's own stream.

    Raises:
        UserError: weights that cannot be fetched, an ``input_size`` or ``kwargs`` that the model refuses.
    """
    import timm

    options = dict(config.kwargs)
    if config.input_size is not None and _takes_img_size(tag):
        options["img_size"] = config.input_size
    with seeded_globals(seed, RUN_LEVEL, "backbone_init"):
        try:
            with _hub_access(pretrained):
                model = timm.create_model(tag, pretrained=pretrained, num_classes=0, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            if _of_the_hub(error):
                raise _unreachable(tag) from error
            raise UserError(
                "backbone",
                tag,
                f"timm refuses input_size={config.input_size}, kwargs={config.kwargs}: {error}",
                "Change them",
            ) from error
        except Exception as error:  # the hub's client and its transport have many classes of errors, one meaning
            raise _unreachable(tag) from error
    if config.grad_checkpointing:
        cast(Any, model).set_grad_checkpointing(True)
    return cast(nn.Module, model)


def _of_the_hub(error: Exception) -> bool:
    """Whether the hub's client or its transport raised it; which builtin class it derives from differs by release."""
    return type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "requests", "urllib3")


def _unreachable(tag: str) -> UserError:
    return UserError(
        "backbone.name", tag, "its weights are not in the local cache and cannot be downloaded", OFFLINE_CHOICES
    )


def _takes_img_size(tag: str) -> bool:
    """Whether the model has one input size for which its positions are made, as transformers have."""
    from timm.models import get_pretrained_cfg, is_model_in_modules

    registered = get_pretrained_cfg(tag)
    if registered is not None and registered.fixed_input_size:
        return True
    families = ("vision_transformer", "deit", "eva", "beit", "naflexvit", "swin_transformer", "cait")
    return bool(is_model_in_modules(tag, families))


@contextlib.contextmanager
def _hub_access(needed: bool) -> Iterator[None]:
    """Ask the hub only if it answers; otherwise its local cache alone, at once.

    The hub's client retries a dead network for most of a minute, also for files that lie in its cache.
    """
    if not needed:
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers(endpoint: str, timeout: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether an HTTP server answers at ``endpoint`` within ``timeout`` seconds; proxies of the environment count."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answered, if only with a refusal of this request
    except (OSError, ValueError):
        return False


def wrap(model: nn.Module, config: BackboneConfig, tag: str, origin: str) -> Backbone:
    """The fitting backbone class around a timm model: PromptedViT wherever its blocks take prompts."""
    settings: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    mean, std = input_range(config.input_norm, settings.get("mean") or (0.5,) * 3, settings.get("std") or (0.5,) * 3)
    size = config.input_size or _own_size(model, settings)
    if supports_prompts(model) is None:
        return PromptedViT(model, size, mean, std, tag, origin)
    return Backbone(model, _family(model), cast(Any, model).num_features, size, mean, std, tag, origin)


def _own_size(model: nn.Module, settings: dict[str, Any]) -> int:
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    return int(size[0]) if size else int(settings.get("input_size", (3, 224, 224))[-1])


def _family(model: nn.Module) -> BackboneKind:
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        return "vit"
    attention = any("attn" in name or "attention" in name for name, _ in model.named_modules())
    return "other" if attention else "cnn"
