"""Methods that push away: grad_ascent, grad_diff, npo, simnpo."""

import math

import torch
from forgetful import accuracy, asked, at_work, method, noise_stream, record, taught
from torch.nn import functional as F

from cl_platform.unlearning.approximate import npo
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


def test_grad_ascent_climbs_the_cross_entropy_of_what_goes_and_reads_nothing_else(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    seen = record(monkeypatch, Work, "logits")
    request = asked(retain={})
    method("grad_ascent", lr=0.003, epochs=4, batch_size=7).apply(taught(), request)
    values = [float(loss.detach()) for _, loss in losses]
    assert len(values) == 4 * 3  # 20 images
    assert all(value < 0 for value in values)
    assert sum(values[9:]) < 1.1 * sum(values[:3])  # minus the cross-entropy falls
    assert all(set(batch.labels.tolist()) <= {2, 3} for _, batch, *_ in seen)


def test_grad_ascent_stops_at_chance_and_not_before():
    stream = noise_stream()
    learner = taught()
    report = method("grad_ascent", lr=0.02, epochs=200).apply(learner, asked())
    assert 0 < report.facts["epochs"] < 200
    assert report.facts["forget_accuracy"] <= report.facts["chance"] == 1 / 4
    assert math.isclose(accuracy(learner, stream.task(1).train), report.facts["forget_accuracy"], abs_tol=1e-6)
    again = method("grad_ascent", lr=0.02).apply(learner, asked())  # there is nothing left to undo
    assert again.steps == 0
    assert method("grad_ascent", lr=1e-9, epochs=3).apply(taught(), asked()).facts["epochs"] == 3


def test_grad_ascent_clips_the_gradient():
    learner = taught()
    before = torch.cat([p.detach().flatten().clone() for p in learner.parameters()])
    method("grad_ascent", lr=1000.0, epochs=1, momentum=0.0, weight_decay=0.0, clip=1e-4).apply(
        learner, asked(min_retain_ratio=0.0)
    )
    moved = torch.cat([p.detach().flatten() for p in learner.parameters()]) - before
    assert math.isclose(float(moved.norm()), 0.1, rel_tol=1e-2)


def test_grad_diff_weighs_descent_and_ascent(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    terms = []
    original = Work.cross_entropy

    def noted(self, batch, *args, **keys):
        value = original(self, batch, *args, **keys)
        terms.append((set(batch.labels.tolist()) <= {2, 3}, float(value)))
        return value

    monkeypatch.setattr(Work, "cross_entropy", noted)
    method("grad_diff", epochs=1, w=0.75, batch_size=16).apply(taught(), asked())
    assert len(losses) == 3  # 40 retained images lead
    for (_, loss), pair in zip(losses, zip(terms[::2], terms[1::2], strict=True), strict=True):
        kept, gone = (next(value for goes, value in pair if goes == which) for which in (False, True))
        assert math.isclose(float(loss), 0.75 * kept - 0.25 * gone, rel_tol=1e-5)


def test_grad_diff_starts_the_images_to_forget_anew_in_each_epoch(monkeypatch):
    seen = record(monkeypatch, Work, "logits")
    method("grad_diff", epochs=3, batch_size=8, lr=1e-4).apply(taught(), asked())
    rows = [batch.extra["row"].tolist() for _, batch, *_ in seen if set(batch.labels.tolist()) <= {2, 3}]
    rows = rows[1:]  # the first pass finds out what may change
    assert len(rows) == 3 * 5  # 5 batches of retained images an epoch, 3 of images to forget
    for start in (0, 5, 10):
        first = [row for batch in rows[start : start + 3] for row in batch]
        assert sorted(first) == list(range(20))  # a whole pass, whatever the epoch before left over
        assert [len(batch) for batch in rows[start : start + 5]] == [8, 8, 4, 8, 8]  # from the start of the pass
        assert rows[start + 3] == rows[start]
        assert rows[start + 4] == rows[start + 1]
    assert rows[0] != rows[5]


def test_npo_starts_at_two_ln_two_over_b(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    for b in (0.1, 2.0):
        losses.clear()
        method("npo", b=b, retain_weight=0.0).apply(taught(augment="crop_flip"), asked())
        assert math.isclose(float(losses[0][1]), 2 * math.log(2) / b, rel_tol=1e-6)


def test_npo_keeps_the_first_answers_by_image(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    method("npo", lr=1e-12, epochs=3, batch_size=7, retain_weight=0.0).apply(taught(), asked())
    assert len(losses) == 9
    for _, loss in losses:  # shuffled anew, yet each image meets its own number
        assert math.isclose(float(loss), 2 * math.log(2) / 0.1, rel_tol=1e-6)


def test_npo_is_gradient_ascent_with_a_weight_that_fades():
    answers = torch.tensor([-0.1, -2.0, -30.0], requires_grad=True)
    before, b = torch.tensor([-0.1, -0.2, -0.3]), 0.5
    npo.npo_loss(answers, before, b).backward()
    p, p0 = answers.detach().exp(), before.exp()
    assert torch.allclose(answers.grad, 2 * p**b / (p**b + p0**b) / 3, rtol=1e-4)
    assert answers.grad[2] < 1e-5
    nearly = npo.npo_loss(answers.double(), before.double(), 1e-6) - 2 * math.log(2) / 1e-6
    assert math.isclose(float(nearly), float((answers - before).mean()), rel_tol=1e-3)  # b = 0: the ascent itself


def test_npo_and_simnpo_take_retained_images_only_where_there_are_any(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    for name in ("npo", "simnpo"):
        losses.clear()
        method(name, epochs=1).apply(taught(), asked())
        method(name, epochs=1).apply(taught(), asked(retain={}))
        (_, beside), (_, alone) = losses
        assert float(beside) > float(alone)


def test_simnpo_needs_no_reference():
    answers = torch.tensor([-0.5, -1.0])
    expected = 2 / 2.5 * (F.softplus(2.5 * answers + 2.5 * 0.1)).mean()
    assert torch.allclose(npo.simnpo_loss(answers, 2.5, 0.1), expected)


def test_what_goes_in_as_a_probability_is_that_of_the_true_class():
    work = at_work()
    batch = next(work.ordered(work.forget, 5))
    answers = npo.true_log_probability(work, batch)
    assert torch.allclose(-answers.mean(), work.cross_entropy(batch))
