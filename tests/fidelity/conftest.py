"""Small learners for the fidelity tests: a tiny vision transformer, a stream of coloured noise, real training."""

import logging
import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch

from cl_platform.backbones import PromptedViT
from cl_platform.backbones.nano import nano_model
from cl_platform.batch import Batch
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.optimizers import OptimizerConfig
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.scenarios import ImageSet, Stream, Task, TaskLoader, TransformConfig, Transforms
from cl_platform.strategies import build_strategies

SIZE, PER_CLASS, BATCH = 16, 8, 8


def tiny_vit(fused=True, **changes):
    """Width 32, 4 blocks of 2 heads, 5 tokens; random weights far enough from zero that images differ."""
    with seeded_globals(0, RUN_LEVEL, "tiny_vit"):
        model = nano_model(SIZE, **{"embed_dim": 32, "depth": 4, "num_heads": 2, **changes})
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    for block in model.blocks:
        block.attn.fused_attn = fused
    return PromptedViT(model.eval(), SIZE)


def tiny_stream(tasks=3, setting="class", classes_per_task=2):
    """Every class has a colour and noise of its own; with ``setting=domain`` the classes come again in every task."""
    count = classes_per_task * (1 if setting == "domain" else tasks)
    draw = np.random.default_rng(3)
    labels = np.repeat(np.arange(count), PER_CLASS)
    colour = draw.integers(40, 216, (count, 3, SIZE, SIZE))[labels]
    pixels = np.clip(colour + draw.normal(0, 25, colour.shape), 0, 255).astype(np.uint8)

    def images(classes):
        rows = np.flatnonzero(np.isin(labels, classes))
        return ImageSet(torch.from_numpy(labels[rows]), torch.from_numpy(rows), pixels)

    order = np.arange(count).reshape(-1, classes_per_task)
    parts = []
    for t in range(tasks):
        classes = tuple(int(c) for c in order[0 if setting == "domain" else t])
        parts.append(Task(t, t, classes, images(classes), images(()), images(classes)))
    names = tuple(str(c) for c in range(count))
    return Stream("tiny", tuple(parts), setting, count, names, tuple(range(count)), "", (3, SIZE, SIZE), False, 0, "")


class Bench:
    """A learner on the tiny stream.

    Args:
        strategy: name -> keys, as in ``cfg.strategy``.
        vit: changes to :func:`tiny_vit`; ``stream``: changes to :func:`tiny_stream`.
        precision, seed, **optimizer: as in the configuration.
    """

    def __init__(self, strategy, vit=None, stream=None, precision="32-true", seed=0, **optimizer):
        self.stream = tiny_stream(**(stream or {}))
        transforms = Transforms(TransformConfig(augment="none"), SIZE, (0.5,) * 3, (0.5,) * 3)
        rule = OptimizerConfig(**{"name": "adam", "lr": 0.01, **optimizer})
        options = LearnerOptions(seed=seed, batch_size=BATCH)
        self.learner = ContinualLearner(
            tiny_vit(**(vit or {})), build_strategies(strategy), transforms, self.stream, rule, options
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self.trainer = self.learner.trainer = L.Trainer(
            accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        self.strategy = self.learner.composition.strategies[0]
        self.vit, self.epochs = self.learner.backbone, 0

    def _loader(self, task):
        images = self.learner.composition.training_set(task)
        return TaskLoader(images, task.task_id, BATCH, self.learner.options.seed)

    def begin(self, task_id, epochs=1):
        """The work before a task's first batch, without training."""
        self.learner.begin_task(self.stream.task(task_id), epochs, self.epochs)
        self.learner.train()
        return self

    def learn(self, *task_ids, epochs=2):
        """Train tasks one after the other, as a run does."""
        for task_id in task_ids:
            task = self.stream.task(task_id)
            self.begin(task_id, epochs)
            self.epochs += epochs
            self.trainer.fit_loop.max_epochs = self.epochs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a frozen trunk in eval mode, which is what is wanted
                self.trainer.fit(self.learner, train_dataloaders=self._loader(task))
            self.learner.end_task(task)
        return self

    def step(self):
        """The first training step of the task begun, up to its losses: ``(step, terms)`` with a graph."""
        self.learner.zero_grad(set_to_none=True)  # what an earlier task's training left
        self.learner.training_step(next(iter(self._loader(self.learner.task))), 0)
        step = self.learner._last_step
        return step, self.learner.composition.losses(step)

    def batch(self, task_id=-1, images=None):
        """Transformed images with their query, of all tasks unless given; ``task_id`` -1 is an evaluation batch."""
        ready = self.learner.transforms.evaluate(self.images() if images is None else images)
        ids = torch.full((len(ready),), task_id)
        with torch.no_grad():
            return Batch(ready, ids, ids, ids, ids < -1, {"query": self.vit(ready).float()})

    def images(self):
        """The test images (n, 3, S, S) uint8 of all tasks."""
        return torch.cat([task.test.images(slice(None)) for task in self.stream.tasks])

    def logits(self, images=None):
        """Answers for new images."""
        return self.learner.logits_of_images(self.images() if images is None else images)

    def state(self):
        """A copy of everything but the trunk and the records of who shaped what."""
        state = self.learner.state_dict().items()
        return {name: value.clone() for name, value in state if not name.startswith(("backbone.", "owners."))}

    def changed(self, before):
        """Names of tensors that are new or not bit-identical to ``before``."""
        return {n for n, v in self.state().items() if n not in before or not torch.equal(v, before[n])}


@pytest.fixture
def learner_of():
    """:class:`Bench`: call it with ``{"name": {keys}}``."""
    return Bench


# -- what every strategy with prompts promises; ``off`` are the keys that switch prompts off ------------------------


def without_prompts_it_is_the_plain_trunk_bit_for_bit(make, name, keys, off):
    for fused in (True, False):
        bench = make({name: {**keys, **off}}, vit={"fused": fused}).begin(0)
        batch = bench.batch()
        with bench.learner.answering():
            plain = bench.vit.vit.forward_head(bench.vit.vit.forward_features(batch.images), pre_logits=True)
            assert torch.equal(bench.learner.composition.features(batch), plain)


def an_answer_depends_on_nothing_but_the_image(make, name, keys, off):
    bench = make({name: keys}).learn(0, 1)
    images, whole = bench.images(), bench.logits()
    bound = 1e-4 * max(1.0, float(whole.abs().max()))
    for size in (1, 2, 7):
        parts = torch.cat([bench.logits(part) for part in images.split(size)])
        assert (parts - whole).abs().max() <= bound
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert (bench.logits(images[order]) - whole[order]).abs().max() <= bound
    with bench.learner.answering():
        by_task = [
            bench.learner.logits_of(t.task_id, "test", t.test, torch.arange(len(t.test))) for t in bench.stream.tasks
        ]
    assert (torch.cat(by_task) - whole).abs().max() <= bound


def the_trunk_stays_as_it_was(make, name, keys, off):
    bench = make({name: keys})
    before, modes = bench.vit.digest(), []
    for block in bench.vit.vit.blocks:
        block.attn.proj_drop.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    bench.learn(0, 1)
    assert bench.vit.digest() == before
    assert modes and not any(modes)
    assert all(p.grad is None for p in bench.vit.parameters())


def what_earlier_tasks_own_stays_bit_identical(make, name, keys, off):
    bench = make({name: keys}).learn(0, 1)
    before = bench.state()
    bench.learn(2)
    owned = re.compile(r"\.tasks\.[01]\.")
    assert any(owned.search(key) for key in before)
    assert not [key for key in bench.changed(before) if owned.search(key)]


def the_query_never_sees_a_prompt(make, name, keys, off):
    bench = make({name: keys}).begin(0)
    before, _ = bench.step()
    with torch.no_grad():
        for parameter in bench.strategy.parameters():
            parameter.add_(1.0)
    after, _ = bench.step()
    assert torch.equal(before.batch.extra["query"], after.batch.extra["query"])
    assert not torch.equal(before.features, after.features)


def only_the_tasks_own_head_rows_and_prompts_get_a_gradient(make, name, keys, off):
    bench = make({name: keys}).learn(0).begin(1)
    _, terms = bench.step()
    sum(terms.values()).backward()
    blocks = bench.learner.head.blocks
    assert all(p.grad is None or not p.grad.any() for p in blocks.parameters_of(0).values())
    assert all(p.grad.any() for p in blocks.parameters_of(1).values())
    trained = {id(p) for group in bench.learner.groups for p in group.parameters}
    mine = [p for p in bench.strategy.parameters() if id(p) in trained]
    assert mine and all(p.grad is not None and p.grad.any() for p in mine)
    assert all(p.grad is None for p in bench.strategy.parameters() if id(p) not in trained)


def a_state_dict_restores_the_answers_and_every_tensor_has_an_owner(make, name, keys, off):
    bench = make({name: keys}).learn(0, 1)
    other = make({name: keys})
    other.learner.load_learnt_state(bench.learner.learnt_state())
    assert torch.equal(other.logits(), bench.logits())
    for one in (bench.strategy, other.strategy):
        owned = {}
        for component in one.components():
            assert component.tasks == tuple(sorted(component.tasks))
            inner = component.tensors
            owned |= {(component.name if component.name == n else f"{component.name}.{n}"): v for n, v in inner.items()}
        assert owned.keys() == one.state_dict().keys()
        assert all(torch.equal(owned[key], value) for key, value in one.state_dict().items())


def training_in_bfloat16_stays_finite(make, name, keys, off):
    bench = make({name: keys}, precision="bf16-mixed").learn(0, 1)
    assert bench.logits().isfinite().all()
    assert all(value.isfinite().all() for value in bench.state().values())


def nothing_is_drawn_from_the_global_generator(make, name, keys, off):
    torch.manual_seed(1)
    one = make({name: keys}).begin(0).state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = make({name: keys}).begin(0).state()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], other[key]) for key in one)


PROMPT_PROMISES = (
    without_prompts_it_is_the_plain_trunk_bit_for_bit,
    an_answer_depends_on_nothing_but_the_image,
    the_trunk_stays_as_it_was,
    what_earlier_tasks_own_stays_bit_identical,
    the_query_never_sees_a_prompt,
    only_the_tasks_own_head_rows_and_prompts_get_a_gradient,
    a_state_dict_restores_the_answers_and_every_tensor_has_an_owner,
    training_in_bfloat16_stays_finite,
    nothing_is_drawn_from_the_global_generator,
)


@pytest.fixture(params=PROMPT_PROMISES, ids=lambda promise: promise.__name__)
def prompt_promise(request):
    """Each promise in turn; call it with ``learner_of, name, keys, off``."""
    return request.param


# -- what every strategy with adapters or parts of its own promises; none of them has keys that switch it off --------

ADAPTER_PROMISES = (
    an_answer_depends_on_nothing_but_the_image,
    the_trunk_stays_as_it_was,
    what_earlier_tasks_own_stays_bit_identical,
    a_state_dict_restores_the_answers_and_every_tensor_has_an_owner,
    training_in_bfloat16_stays_finite,
    nothing_is_drawn_from_the_global_generator,
)


@pytest.fixture(params=ADAPTER_PROMISES, ids=lambda promise: promise.__name__)
def adapter_promise(request):
    """Each promise in turn; call it with ``learner_of, name, keys, None``."""
    return request.param
