"""Pretrain a checkpoint like the packed ``vit_nano`` from any folder of images, and write its card.

    python benchmarks/pretrain_vit_nano.py --data ROOT --out vit_nano.safetensors --epochs 24 [--teacher]

``ROOT`` holds ``train/<class>/*`` and, if there is one, ``test/<class>/*`` or ``val/<class>/*``. With ``--teacher`` the
network also follows EfficientNet-Lite0 of the package of the extra ``offline``. The result loads with
``backbone=vit_nano backbone.weights=FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cl_platform.backbones.cnn import LITE0, package_file, tf_efficientnet_state
from cl_platform.backbones.nano import ARCHITECTURE, INPUT_SIZE, nano_model

IMAGE_SUFFIXES = {".webp", ".png", ".jpg", ".jpeg", ".bmp"}
TEACHER_SIZE = 128


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and test|val/<class>/*")
    parser.add_argument("--out", type=Path, default=Path("vit_nano.safetensors"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--patch-size", type=int, default=ARCHITECTURE["patch_size"])
    parser.add_argument("--teacher", action="store_true", help="distil from EfficientNet-Lite0 (extra: offline)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # On processors without bfloat16 units autocast is emulated and several times slower than float32.
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    arguments = parser.parse_args(argv)
    arguments.precision = arguments.precision or ("bf16" if arguments.device.startswith("cuda") else "fp32")
    return arguments


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")


def read_split(folder: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """All images of a split as (N, 3, 32, 32) uint8, shrunk by area, and their classes (N,)."""
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                with Image.open(file) as image:
                    small = image.convert("RGB").resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BOX)
                images.append(np.asarray(small).transpose(2, 0, 1))
                labels.append(label)
    if not images:
        raise SystemExit(f"{folder}: no images below it; each class needs a folder of its own")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def to_range(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


class Teacher:
    """EfficientNet-Lite0: its pooled features, standardised, and its 1,000-class head on them."""

    def __init__(self, images: Tensor, device: str, precision: str) -> None:
        self.precision = precision
        self.model = timm.create_model(LITE0, pretrained=False, num_classes=0).eval().to(device)
        stored = torch.load(package_file(), map_location="cpu", weights_only=True)
        self.model.load_state_dict(tf_efficientnet_state(stored, self.model, package_file()))
        self.weight, self.bias = stored["_fc.weight"].to(device), stored["_fc.bias"].to(device)
        # Of each image and of its mirror image, once: the student never meets the teacher on other crops.
        raw = torch.stack([self.features(images, device), self.features(images.flip(-1), device)])
        self.mean, self.std = raw.mean((0, 1)).to(device), raw.std((0, 1)).clamp_min(1e-4).to(device)
        self.raw = raw.half()

    @torch.no_grad()
    def features(self, images: Tensor, device: str) -> Tensor:
        found = []
        for chunk in images.split(256):
            large = functional.interpolate(to_range(chunk.to(device)), TEACHER_SIZE, mode="bicubic", antialias=False)
            with autocast(device, self.precision):
                found.append(self.model(large).float().cpu())
        return torch.cat(found)

    def loss(self, predicted: Tensor, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Divergence of the 1,000-class outputs and twice one minus the cosine; ``predicted`` is standardised."""
        raw = self.raw[mirrored.long().cpu(), rows.cpu()].to(predicted.device).float()
        cosine = functional.cosine_similarity(predicted, (raw - self.mean) / self.std, dim=1)
        target = functional.log_softmax(functional.linear(raw, self.weight, self.bias), 1)
        mine = functional.log_softmax(functional.linear(predicted * self.std + self.mean, self.weight, self.bias), 1)
        divergence = functional.kl_div(mine, target, reduction="batchmean", log_target=True)
        return divergence + 2 * (1 - cosine).mean()


def augment(images: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, resized crop (area 0.5 to 1, log aspect within 0.2), contrast and colour shift on (B, 3, S, S)."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(images.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(images.device)

    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    side, aspect = uniform(0.5, 1.0).sqrt(), uniform(-0.2, 0.2).exp()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    return images * (1 + 0.2 * normal(count, 1, 1, 1)) + 0.1 * normal(count, 3, 1, 1)


def optimizer_for(modules: nn.Module, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, not on norms, biases, positions and the class token."""
    decayed, plain = [], []
    for name, parameter in modules.named_parameters():
        free = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token"))
        (plain if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.99))


def rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero."""
    warm = max(1, round(0.05 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    images: Tensor, labels: Tensor, classes: int, teacher: Teacher | None, arguments: argparse.Namespace
) -> nn.Module:
    device = arguments.device
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    net = nn.ModuleDict({"trunk": nano_model(patch_size=arguments.patch_size), "head": nn.Linear(192, classes)})
    if teacher:
        net["to_teacher"] = nn.Linear(192, 1280)
    net.to(device).train()
    optimizer = optimizer_for(net, arguments)
    batch = min(arguments.batch_size, len(images))
    steps = arguments.epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for epoch in range(arguments.epochs):
        started, total = time.perf_counter(), torch.zeros((), device=device)
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // batch * batch].split(batch):
            mirrored = torch.rand(batch, generator=generator) < 0.5
            inputs = augment(to_range(images[rows].to(device)), mirrored.to(device), generator)
            with autocast(device, arguments.precision):
                features = net["trunk"](inputs)
                logits = net["head"](features)
                predicted = net["to_teacher"](features) if teacher else None
            loss = functional.cross_entropy(
                logits.float(), labels[rows].to(device), label_smoothing=arguments.label_smoothing
            )
            if teacher and predicted is not None:
                loss = loss + teacher.loss(predicted.float(), rows, mirrored)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        mean = float(total) / (len(images) // batch)
        print(
            f"epoch {epoch + 1}/{arguments.epochs}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s", flush=True
        )
    trunk: nn.Module = net["trunk"]
    return trunk.eval()


@torch.no_grad()
def nearest_mean_accuracy(model: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> float:
    """Share of test images whose normalised feature is closest (cosine) to the mean of their class."""
    device = next(model.parameters()).device

    def features(images: Tensor) -> Tensor:
        chunks = [model(to_range(chunk.to(device))).float().cpu() for chunk in images.split(512)]
        return functional.normalize(torch.cat(chunks), dim=1)

    known, labels = features(train_set[0]), train_set[1]
    means = torch.stack([known[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    nearest = (features(test_set[0]) @ functional.normalize(means, dim=1).T).argmax(1)
    return float((nearest == test_set[1]).float().mean())


def write(model: nn.Module, card: dict[str, object], out: Path) -> None:
    """The weights as float16 safetensors and, beside them, the card as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().half().contiguous() for name, tensor in model.state_dict().items()}, out)
    content = out.read_bytes()
    card |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    folder = arguments.data / "train"
    if not folder.is_dir():
        raise SystemExit(f"--data {arguments.data}: there is no folder train in it")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images, labels = read_split(folder, classes)
    tests = next((arguments.data / n for n in ("test", "val") if (arguments.data / n).is_dir()), None)
    print(f"{len(images)} images of {len(classes)} classes on {arguments.device}", flush=True)
    teacher = Teacher(images, arguments.device, arguments.precision) if arguments.teacher else None
    started = time.perf_counter()
    model = train(images, labels, len(classes), teacher, arguments)
    seconds = time.perf_counter() - started
    for parameter in model.parameters():  # measure what is written, not what was trained
        parameter.data = parameter.data.half().float()
    accuracy = nearest_mean_accuracy(model, (images, labels), read_split(tests, classes)) if tests else None
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    shape = ARCHITECTURE | {"patch_size": arguments.patch_size}
    card: dict[str, object] = {
        "architecture": f"VisionTransformer(img_size={INPUT_SIZE}, {shape}, num_classes=0)",
        "input": "RGB, 32 x 32, x / 127.5 - 1 (mean 0.5, std 0.5)",
        "dtype": "float16",
        "classes": len(classes),
        "images": len(images),
        "command": " ".join(["python", *sys.argv]) if argv is None else None,
        "settings": settings,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {arguments.device}",
        "nearest_mean_accuracy_test": accuracy,
    }
    write(model, card, arguments.out)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
