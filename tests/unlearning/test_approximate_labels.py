"""Methods that give other labels: random_label, salun, boundary_shrink, boundary_expand."""

import pytest
import torch
from forgetful import asked, at_work, changed, method, noise_stream, record, state_of, taught

from cl_platform.unlearning.approximate import boundary_expand, boundary_shrink, random_label, salun
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


def taught_columns(monkeypatch):
    """Labels and taught columns of every batch that a method trains on."""
    return record(monkeypatch, Work, "cross_entropy")


# -- random_label ---------------------------------------------------------------------------------------------------


def test_random_label_teaches_remaining_classes_and_keeps_the_labels_of_retained_images(monkeypatch):
    calls = taught_columns(monkeypatch)
    method("random_label", epochs=3, batch_size=16).apply(taught(), asked())
    mixed, drawn = 0, []
    for _, batch, columns in calls:
        goes = (batch.labels == 2) | (batch.labels == 3)
        assert torch.equal(columns[~goes], batch.labels[~goes])  # class ids and columns agree here
        drawn += columns[goes].tolist()
        mixed += bool(goes.any() and not goes.all())
    assert set(drawn) == {0, 1, 4, 5}
    assert mixed > len(calls) / 2  # one shuffled mixture


def test_random_label_draws_anew_in_each_epoch():
    work = at_work("random_label")
    first, second = (random_label.drawn_labels(work, epoch) for epoch in (0, 1))
    assert len(first) == 20
    assert not torch.equal(first, second)
    assert torch.equal(first, random_label.drawn_labels(work, 0))


# -- salun ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_salun_leaves_masked_weights_bit_identical(optimizer, monkeypatch):
    made = record(monkeypatch, Updates, "__init__")
    learner = taught()
    before = state_of(learner)
    keys = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.005}
    report = method("salun", epochs=3, batch_size=16, weight_decay=0.1, momentum=0.9, **keys).apply(
        learner, asked(min_retain_ratio=0.0)
    )
    now = learner.state_dict()
    total = sum(p.numel() for p in learner.parameters())
    assert report.facts["salient"] == total // 2
    moved = sum(int((now[n] != before[n]).sum()) for n, _ in learner.named_parameters())
    assert 0.8 * (total // 2) < moved <= total // 2  # weight decay alone would have moved nearly all
    assert len(made) == 1


def test_salun_keeps_no_momentum_of_masked_weights():
    work = at_work("salun")
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in work.parameters.items()}
    name = next(iter(mask))
    mask[name].view(-1)[0] = True
    updates = Updates(work, salun.SalUnConfig(weight_decay=0.1), mask=mask)
    for _ in range(2):
        updates.step(work.cross_entropy(next(work.ordered(work.forget, 8))))
    buffer = updates.optimizer.state[work.parameters[name]]["momentum_buffer"].view(-1)
    assert buffer[0] != 0
    assert not buffer[1:].any()


def test_saliency_is_the_absolute_sum_of_batch_gradients_at_unchanged_weights():
    work = at_work("salun")
    before = {name: p.detach().clone() for name, p in work.parameters.items()}
    found = salun.saliency(work, 7)
    expected = {name: torch.zeros_like(p) for name, p in work.parameters.items()}
    for batch in work.shuffled("saliency", work.forget, 0, 7):
        slopes = torch.autograd.grad(work.cross_entropy(batch), list(work.parameters.values()))
        for name, slope in zip(expected, slopes, strict=True):
            expected[name] += slope
    assert all(torch.allclose(found[n], expected[n].abs(), atol=1e-7) for n in found)
    assert all(torch.equal(p, before[n]) for n, p in work.parameters.items())


def test_the_mask_ranks_all_numbers_together():
    values = {"small": torch.tensor([0.1, 0.2, 0.3, 0.0]), "large": torch.tensor([[5.0, 6.0], [7.0, 0.25]])}
    mask = salun.top_share(values, 0.5)
    assert mask["small"].tolist() == [False, False, True, False]
    assert mask["large"].tolist() == [[True, True], [True, False]]
    level = salun.top_share({"a": torch.zeros(5), "b": torch.zeros(5)}, 0.3)
    assert sum(int(m.sum()) for m in level.values()) == 3
    assert int(level["a"].sum()) == 3


# -- boundary_shrink ------------------------------------------------------------------------------------------------


def test_boundary_shrink_never_teaches_the_class_that_goes(monkeypatch):
    calls = taught_columns(monkeypatch)
    # a step this short fails: the original still answers with the true class
    method("boundary_shrink", epochs=2, epsilon=1e-6).apply(taught(), asked())
    drawn = [columns for _, _, *rest in calls for columns in rest]
    assert len(drawn) == 2
    assert set(torch.cat(drawn).tolist()) <= {0, 1, 4, 5}


def test_boundary_shrink_steps_in_pixels_between_0_and_1_on_grey_levels():
    work = at_work("boundary_shrink")
    batch = next(work.ordered(work.forget, 20))
    beyond = boundary_shrink.attacked(work, batch, batch.images, 0.1)
    pixels, before = (images * 0.5 + 0.5 for images in (beyond.images, batch.images))
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-3)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert (pixels - before).abs().max() <= 0.1 + 0.5 / 255 + 1e-6
    assert (pixels - before).abs().mean() > 0.08
    assert work.cross_entropy(beyond) > work.cross_entropy(batch)
    assert torch.equal(beyond.labels, batch.labels)


def test_boundary_shrink_attacks_the_original_and_not_what_it_trains(monkeypatch):
    calls = record(monkeypatch, boundary_shrink, "attacked")
    learner = taught()
    before = state_of(learner)
    method("boundary_shrink", epochs=3, lr=0.05).apply(learner, asked(min_retain_ratio=0.0))
    originals = {id(original) for original, *_ in calls}
    assert len(originals) == 1
    (original, *_) = calls[-1]
    assert not changed(original.learner, before)
    assert changed(learner, before)


def test_boundary_shrink_reaches_pixels_behind_kept_features():
    learner = taught("linear_probe", loss="task")
    work = at_work("boundary_shrink", learner=learner)
    batch = next(work.ordered(work.forget, 20))
    assert batch.images.numel() == 0
    images = work.view(work.forget, batch.extra["row"])
    beyond = boundary_shrink.attacked(work.frozen(), batch, images, 0.1)
    assert work.cross_entropy(beyond) > work.cross_entropy(batch)


# -- boundary_expand ------------------------------------------------------------------------------------------------


def test_boundary_expand_teaches_one_new_row_and_leaves_none(monkeypatch):
    learner = taught()
    made, targets = record(monkeypatch, Updates, "__init__"), record(monkeypatch, boundary_expand.F, "cross_entropy")
    before = state_of(learner)
    report = method("boundary_expand", epochs=20, lr=0.05).apply(learner, asked(min_retain_ratio=0.0))
    for grown, columns in targets:
        assert grown.shape[1] == 7
        assert columns.eq(6).all()
    assert learner.state_dict().keys() == before.keys()
    assert all(v.shape == before[n].shape for n, v in learner.state_dict().items())
    assert learner.head.classes == [0, 1, 2, 3, 4, 5]
    assert report.params == sum(p.numel() for p in learner.parameters())
    assert made
    assert float(targets[-1][0][:, 6].mean()) > float(targets[0][0][:, 6].mean())  # the row was trained


def test_the_new_row_is_not_the_first_row_of_the_task():
    stream, learner = noise_stream(), taught(updates=0)
    work = at_work("boundary_expand", learner=learner, stream=stream)
    drawn = torch.nn.init.trunc_normal_(torch.empty(1, 12), std=0.02, generator=work.stream("row"))
    rows = torch.cat(learner.head.blocks.all("weight"))
    assert not any(torch.equal(drawn[0], row) for row in rows)
