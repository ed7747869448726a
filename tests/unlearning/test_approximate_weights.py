"""Methods that act on weights: ssd, l1_sparse."""

from types import SimpleNamespace

import pytest
import torch
from forgetful import asked, at_work, changed, method, record, state_of, taught
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.unlearning.approximate import l1_sparse, ssd
from cl_platform.unlearning.approximate.updates import Updates


class TwoNumbers:
    """A model of two weights, ``logits = (w0 x0, w1 x1)``, in place of a copy; its pools are lists of batches."""

    def __init__(self, weights):
        self.weights = torch.tensor(weights, requires_grad=True)
        self.parameters = {"w": self.weights}

    def ordered(self, pool, size):
        images, labels = pool
        for rows in torch.arange(len(labels)).split(size):
            yield SimpleNamespace(images=images[rows], labels=labels[rows])

    def cross_entropy(self, batch):
        return F.cross_entropy(batch.images * self.weights, batch.labels)


def test_importance_is_the_squared_gradient_of_the_batch_mean_by_hand():
    model = TwoNumbers([0.0, 0.0])
    pool = (torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 6.0]]), torch.tensor([0, 0, 1]))
    # at equal logits p = 1/2: the gradient of an image is -x0/2 for label 0 and its weight, -x1/2 for label 1
    found = ssd.importance(model, [pool], 2)["w"]
    first, second = torch.tensor([-(2 + 4) / 2 / 2, 0.0]), torch.tensor([0.0, -6 / 2])
    assert torch.allclose(found, (first**2 + second**2) / 2)
    singly = ssd.importance(model, [pool], 1)["w"]
    assert torch.allclose(singly, torch.tensor([(1.0 + 4.0) / 3, 9.0 / 3]))
    assert not torch.allclose(singly, found)  # no Fisher information of single images


def test_a_batch_holds_images_of_one_task():
    work, pool = TwoNumbers([0.0, 0.0]), (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    other = (torch.tensor([[0.0, 6.0]]), torch.tensor([1]))
    both = ssd.importance(work, [pool, other], 64)["w"]
    assert torch.allclose(both, torch.tensor([1.0, 9.0]) / 2)


def test_dampening_by_hand():
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    forget = torch.tensor([40.0, 10.0, 0.0, 0.0, 8.0])
    everything = torch.tensor([2.0, 1.0, 0.0, 3.0, 0.0])
    new, selected = ssd.dampened(weight, forget, everything, 10.0, 1.0)
    assert selected.tolist() == [True, False, False, False, True]  # 10 is not more than 10 times 1
    assert torch.allclose(new, torch.tensor([1.0 * 2 / 40, -2.0, 3.0, 4.0, 0.0]))  # importance 0 is no division
    assert new.isfinite().all()
    stronger, _ = ssd.dampened(weight, forget, everything, 1.0, 100.0)
    assert torch.equal(stronger[:2], weight[:2])  # never amplified


def test_ssd_measures_all_images_and_not_the_retained_alone(monkeypatch):
    calls = record(monkeypatch, ssd, "importance")
    report = method("ssd").apply(taught(), asked())
    (work, forget, size), (_, everything, _) = calls
    assert size == 64
    assert forget == [work.forget]
    assert everything == [work.forget, *work.pools.values()]
    assert report.steps == 0
    assert 0 < report.facts["dampened_share"] < 1
    assert report.facts["alpha"] == 1.5  # one of three batches goes


def test_ssd_only_shrinks_what_it_selects():
    learner = taught()
    before = state_of(learner)
    report = method("ssd", alpha=1.5).apply(learner, asked())
    total = touched = 0
    for name, parameter in learner.named_parameters():
        moved = parameter.detach() != before[name]
        assert (parameter.detach().abs() <= before[name].abs()).all()
        assert (parameter.detach() * before[name] >= 0).all()
        total, touched = total + parameter.numel(), touched + int(moved.sum())
    assert 0 < touched <= round(report.facts["dampened_share"] * total)


def test_ssd_selects_by_default_half_of_what_is_possible_at_most():
    assert ssd.selection(None, vit=False, ratio=20.0) == 10.0  # one class among twenty, as published
    assert ssd.selection(None, vit=False, ratio=100.0) == 10.0
    assert ssd.selection(None, vit=True, ratio=100.0) == 5.0
    assert ssd.selection(None, vit=False, ratio=5.0) == 2.5  # one task among five: 10 would select nothing
    assert ssd.selection(4.0, vit=False, ratio=5.0) == 4.0
    with pytest.raises(UserError, match=r"unlearning.ssd.alpha=10.0: selects nothing"):
        method("ssd", alpha=10.0).apply(taught(), asked())
    assert method("ssd", alpha=3.0, lambda_=0.5).config.lambda_ == 0.5


def test_l1_norm_falls_in_a_line_and_counts_weights_of_the_trainable_set_alone():
    assert [l1_sparse.strength(1.0, e, 4) for e in range(4)] == [1.0, 0.75, 0.5, 0.25]
    work = at_work("l1_sparse", learner=taught(norm=True))
    inside = {id(p) for p in l1_sparse.weights_of(work)}
    for name, parameter in work.parameters.items():
        assert (id(parameter) in inside) == (name.endswith("weight") and parameter.dim() == 2), name
    work = at_work("l1_sparse", learner=taught("linear_probe", loss="task"))
    assert {tuple(p.shape) for p in l1_sparse.weights_of(work)} == {(2, 12)}


def test_l1_sparse_trains_on_what_stays_and_shrinks_weights(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    learner = taught()
    before = sum(float(p.detach().abs().sum()) for p in learner.parameters() if p.dim() > 1)
    method("l1_sparse", g=0.05, epochs=4, lr=0.05).apply(learner, asked())
    assert len(losses) == 4
    after = sum(float(p.detach().abs().sum()) for p in learner.parameters() if p.dim() > 1)
    assert after < 0.95 * before
    assert float(losses[0][1]) > 0.05 * before  # cross-entropy and the whole norm
    plain = taught()
    kept = state_of(plain)
    method("l1_sparse", g=0.0, lr=1e-12, weight_decay=0.0).apply(plain, asked())
    assert {n for n in changed(plain, kept) if (plain.state_dict()[n] - kept[n]).abs().max() > 1e-6} == set()
