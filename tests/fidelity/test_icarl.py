"""iCaRL is iCaRL because exemplars, chosen by herding, are learnt with each task and answer by their means."""

import numpy as np
import pytest
import torch
from tiny import copy_of, differing
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.memory.herding import herding_order
from cl_platform.strategies.icarl import binary_losses, mean_distances

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
F64 = torch.float64
UNIT = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [0.96, 0.28]])


def make(learner_of, size=12, stream=None, **keys):
    return learner_of({"icarl": {"buffer": {"size": size}, **keys}}, stream=stream, **SGD)


def of(bench):
    return bench.learner.composition.members["icarl"]


def held(bench):
    """(label, example id) of the exemplars in their order, by task."""
    contents = of(bench).buffer.contents
    rows = zip(contents.task_ids.tolist(), contents.labels.tolist(), contents.example_ids.tolist(), strict=True)
    found = {}
    for task_id, label, example in rows:
        found.setdefault(task_id, []).append((label, example))
    return found


def features(bench, images):
    """Unit-length features of uint8 images, as they are answered by."""
    learner = bench.learner
    with learner.answering():
        return F.normalize(learner.backbone(learner.transforms.evaluate(images)).double(), dim=1)


# -- herding ----------------------------------------------------------------------------------------------------------


def test_exemplars_are_picked_so_that_their_mean_stays_close_to_the_mean_of_their_class():
    order = herding_order(UNIT, 5)
    assert order.tolist() == [1, 2, 4, 3, 0]
    mean = UNIT.mean(0)
    np.testing.assert_allclose(mean, [0.672, 0.536], atol=1e-12)
    distances = [np.linalg.norm(mean - UNIT[order[: k + 1]].mean(0)) for k in range(5)]
    np.testing.assert_allclose(distances, [0.143108351, 0.166373075, 0.117151374, 0.157098695, 0], atol=1e-9)
    of_two = F.normalize(torch.from_numpy(UNIT[order[:2]]).mean(0), dim=0)
    torch.testing.assert_close(of_two, torch.full((2,), 0.5**0.5, dtype=F64))
    assert herding_order(7 * UNIT, 3).tolist() == order[:3].tolist()  # lengths do not matter, and fewer are a prefix


def test_the_memory_holds_herdings_choice_of_each_class_and_older_ones_are_cut_to_its_start(learner_of):
    bench, before = make(learner_of).learn(0), {}
    for position, share in ((0, 6), (1, 3), (2, 2)):
        if position:
            bench.learn(position)
        task, found = bench.stream.tasks[position], held(bench)
        unit = features(bench, task.train.images(slice(None)))
        for label in task.classes:
            rows = (task.train.labels == label).nonzero()[:, 0]
            wanted = task.train.example_ids[rows][herding_order(unit[rows].numpy(), share)].tolist()
            assert [example for c, example in found[position] if c == label] == wanted
        for task_id, pairs in before.items():
            kept = [[e for c, e in pairs if c == label][:share] for label in bench.stream.tasks[task_id].classes]
            assert sorted(found[task_id]) == sorted(
                (label, e) for label, es in zip(bench.stream.tasks[task_id].classes, kept, strict=True) for e in es
            )
        assert sum(len(pairs) for pairs in found.values()) <= 12
        before = found


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_targets_are_the_teachers_sigmoids_for_old_columns_and_the_label_for_new_ones():
    logits, old = torch.tensor([[1.0, -1.0, 2.0]], dtype=F64), torch.tensor([[0.5, -2.0]], dtype=F64)
    entries = binary_losses(logits, torch.tensor([2]), [0, 1, 2], [0, 1], old)
    assert entries.mean().item() == pytest.approx(0.416731659, abs=1e-9)
    assert entries.sum().item() == pytest.approx(1.250194977, abs=1e-9)
    targets = torch.tensor([[0.622459331, 0.119202922, 1.0]], dtype=F64)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(entries, expected, rtol=0, atol=1e-8)
    other = binary_losses(logits, torch.tensor([0]), [0, 1, 2], [0, 1], old)
    assert torch.equal(other[:, :2], entries[:, :2])  # old columns do not look at the label
    plain = binary_losses(logits, torch.tensor([2]), [0, 1, 2])
    label = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logits, label, reduction="none"))
    assert binary_losses(logits.bfloat16(), torch.tensor([2]), [0, 1, 2]).dtype == torch.float32


def test_the_first_task_is_plain_binary_cross_entropy(learner_of):
    bench = make(learner_of).begin(0)
    seen = []
    bench.vit.register_forward_hook(lambda *a: seen.append(torch.is_grad_enabled()))
    step, terms = bench.step()
    assert set(terms) == {"icarl/bce"} and seen == [True]
    targets = F.one_hot(step.batch.labels, 2).float()
    torch.testing.assert_close(terms["icarl/bce"], F.binary_cross_entropy_with_logits(step.logits, targets))


@pytest.mark.parametrize(("columns", "width"), [("seen", 4), ("all", 6)])
def test_both_terms_are_one_mean_over_rows_and_columns(learner_of, columns, width):
    bench = make(learner_of, columns=columns).learn(0).begin(1)
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    step, terms = bench.step()
    old = bench.learner.composition.teacher(step.batch).logits
    assert old.shape[1] == 2 and step.logits.shape[1] == 4
    targets = torch.cat((old.sigmoid(), F.one_hot(step.batch.labels, 4)[:, 2:]), dim=1)
    whole = F.binary_cross_entropy_with_logits(step.logits, targets, reduction="sum") / (len(targets) * width)
    torch.testing.assert_close(sum(terms.values()), whole)
    assert set(terms) == {"icarl/bce", "icarl/kd"} and bench.learner.composition.stability == {"icarl/kd"}
    assert bench.learner.composition.query == "none" and (len(step.passes) == 1)


def test_an_epoch_passes_over_the_task_and_all_exemplars_shuffled_together(learner_of):
    bench = make(learner_of).learn(0).begin(1)
    task, remembered = bench.stream.tasks[1], held(bench)[0]
    batches = list(bench._loader(task))
    assert sum(len(batch) for batch in batches) == 16 + 12
    replayed = torch.cat([batch.is_replay for batch in batches])
    owners = torch.cat([batch.task_ids for batch in batches])
    labels, examples = (torch.cat([getattr(b, n)[b.is_replay] for b in batches]) for n in ("labels", "example_ids"))
    assert sorted(zip(labels.tolist(), examples.tolist(), strict=True)) == sorted(remembered)
    assert torch.equal(owners, torch.where(replayed, 0, 1))
    assert 0 < int(replayed[:16].sum()) < 12  # mixed, not one after the other
    first = bench.stream.tasks[0].train
    for batch in batches:
        for image, example in zip(batch.images[batch.is_replay], batch.example_ids[batch.is_replay], strict=True):
            row = (first.example_ids == example).nonzero()[0]
            assert torch.equal(image, first.images(row)[0])
    again = make(learner_of).learn(0).begin(1)._loader(task)
    assert all(torch.equal(again.order(epoch), bench._loader(task).order(epoch)) for epoch in (0, 1))
    assert not torch.equal(again.order(0), again.order(1))


@pytest.mark.parametrize(("size", "stream"), [(12, {}), (7, {}), (200, {}), (40, {"setting": "domain"})])
def test_how_long_an_epoch_will_be_is_known_before_any_training(learner_of, size, stream):
    bench = make(learner_of, size, stream)
    tasks = bench.stream.tasks
    planned = [bench.learner.composition.training_size(tasks[: k + 1]) for k in range(len(tasks))]
    found = []
    for task in tasks:
        bench.begin(task.task_id)
        found.append(len(bench.learner.composition.training_set(task)))
        bench.learner.end_task(task)
    assert found == planned
    assert found[1] > found[0]


def test_classes_that_come_again_are_learnt_by_their_labels(learner_of):
    bench = make(learner_of, 40, {"setting": "domain"}).learn(0).begin(1)
    step, terms = bench.step()
    assert set(terms) == {"icarl/bce"}
    targets = F.one_hot(step.batch.labels, 2).float()
    torch.testing.assert_close(terms["icarl/bce"], F.binary_cross_entropy_with_logits(step.logits, targets))
    bench.learn(1)
    assert of(bench).seen_classes() == [0, 1] and set(held(bench)) == {0, 1}


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_mean_is_that_of_exemplars_and_their_mirror_images_brought_to_unit_length(learner_of):
    bench = make(learner_of).learn(0, 1)
    strategy = of(bench)
    torch.testing.assert_close(strategy.class_means().norm(dim=1), torch.ones(4, dtype=F64))
    labels = torch.from_numpy(strategy.buffer.contents.labels.copy())
    for column, label in enumerate(strategy.seen_classes()):
        images = strategy.buffer.images[: len(labels)][labels == label]
        both = torch.cat((features(bench, images), features(bench, images.flip(3))))
        torch.testing.assert_close(strategy.class_means()[column], F.normalize(both.mean(0), dim=0), rtol=0, atol=1e-6)


def test_an_image_goes_to_the_nearest_mean(learner_of):
    bench = make(learner_of).learn(0, 1)
    unit, means = features(bench, bench.images()), of(bench).class_means()
    distances = (unit[:, None] - means).norm(dim=2)
    torch.testing.assert_close(bench.logits(), -distances.float(), rtol=0, atol=1e-6)
    assert torch.equal(bench.logits().argmax(1), distances.argmin(1))
    far = 5 * torch.randn(3, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_distances(far, means), mean_distances(0.1 * far, means))


def test_the_heads_weights_have_no_say(learner_of):
    bench = make(learner_of).learn(0, 1)
    before = bench.logits()
    for parameter in bench.learner.head.parameters():
        parameter.data.normal_()
    assert torch.equal(bench.logits(), before)


def test_a_class_answers_from_the_end_of_its_task_on(learner_of):
    bench = make(learner_of).begin(0)
    assert bench.learner.seen_classes() == [] and bench.logits().shape == (48, 0)
    bench.learn(0).begin(1)
    assert bench.learner.seen_classes() == [0, 1]
    bench.learn(1)
    assert bench.learner.seen_classes() == [0, 1, 2, 3] and bench.logits().shape == (48, 4)


def test_old_classes_are_remembered_better_than_by_finetuning(learner_of):
    right = {}
    for name in ("icarl", "finetune"):
        keys = {"buffer": {"size": 12}} if name == "icarl" else {}
        bench = learner_of({name: keys}, **{**SGD, "lr": 0.05}).learn(0, 1, 2, epochs=4)
        labels = torch.cat([task.test.labels for task in bench.stream.tasks])
        right[name] = int((bench.logits().argmax(1) == labels)[:32].sum())
    assert right["icarl"] > right["finetune"]


# -- state ------------------------------------------------------------------------------------------------------------


def test_exemplars_and_means_are_chosen_in_eval_mode_and_every_mode_is_put_back(learner_of):
    bench = learner_of({"icarl": {"buffer": {"size": 12}}}, vit={"proj_drop_rate": 0.4}, **SGD).learn(0).begin(1)
    modes = {name: module.training for name, module in bench.learner.named_modules()}
    bench.learner.end_task(bench.stream.tasks[1])
    after = {name: module.training for name, module in bench.learner.named_modules() if name in modes}
    assert modes == after and any(modes.values())
    means = of(bench).class_means()
    with torch.no_grad():
        of(bench)._measure(1)  # on its own it does not switch
    assert not torch.equal(of(bench).class_means(), means)  # with dropout they would be others
    bench.learner.end_task(bench.stream.tasks[1])
    torch.testing.assert_close(of(bench).class_means(), means)


def test_a_restored_learner_answers_with_the_same_bits_and_every_tensor_has_an_owner(learner_of):
    bench, other = make(learner_of).learn(0, 1), make(learner_of)
    other.learner.load_learnt_state(copy_of(bench.learner.learnt_state()))
    assert torch.equal(other.logits(), bench.logits())
    assert not differing(other.learner.state_dict(), bench.learner.state_dict())
    task = bench.stream.tasks[2]
    one, two = (list(each.begin(2)._loader(task)) for each in (bench, other))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True)
    )
    found = {f"{c.name}.{name}" for c in of(bench).components() for name in c.tensors}
    assert found == set(of(bench).state_dict())
    assert {c.tasks for c in of(bench).components()} == {(0, 1)}


def test_a_forgotten_task_leaves_neither_exemplars_nor_means(learner_of):
    bench = make(learner_of).learn(0, 1)
    kept = of(bench).class_means()[2:]
    of(bench).drop_task(0)
    assert set(held(bench)) == {1} and of(bench).seen_classes() == [2, 3]
    assert torch.equal(of(bench).class_means(), kept)
    assert bench.logits().shape == (48, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "role"), [("derpp", "buffer"), ("er_ace", "classification"), ("finetune", "classification")]
)
def test_another_base_loss_or_buffer_beside_it_is_refused_by_role(learner_of, other, role):
    with pytest.raises(UserError, match=rf"icarl and {other} both own the {role}"):
        learner_of({"icarl": {}, other: {}}, **SGD)


def test_a_memory_too_small_for_an_exemplar_of_each_class_is_refused(learner_of):
    with pytest.raises(UserError, match="strategy.icarl.buffer.size=5.*6 classes"):
        make(learner_of, 5)
    with pytest.raises(UserError, match="strategy.icarl.buffer.size=5.*6 classes"):
        make(learner_of, 5, {"setting": "domain"})
    make(learner_of, 6)


def test_it_needs_to_be_told_where_a_task_ends():
    from cl_platform.strategies.icarl import ICaRL

    assert ICaRL.needs.boundaries and ICaRL.needs.teacher
