import pytest
import torch
from torch.nn import functional as F

from cl_platform.heads import Head, columns_of, cross_entropy, targets_among
from cl_platform.slots import Slots


def test_a_state_dict_alone_restores_the_slots_it_holds():
    one = Slots(parameters=("w",), buffers=("n",))
    one.add(3, w=torch.randn(2, 4), n=torch.tensor([1, 2]))
    one.add(0, w=torch.randn(5, 4), n=torch.tensor([7]))
    other = Slots(parameters=("w",), buffers=("n",))
    other.add(9, w=torch.zeros(1, 1), n=torch.tensor([0]))
    other.load_state_dict(one.state_dict())
    assert other.task_ids == [0, 3]
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert sorted(one.state_dict()) == ["tasks.0.n", "tasks.0.w", "tasks.3.n", "tasks.3.w"]


def test_slots_of_any_names_are_restored_by_their_state_alone():
    one, other = Slots(buffers=None), Slots(buffers=None)
    one.add(2, **{"anchor/head/weight": torch.ones(3), "seen": torch.tensor([0, 2])})
    other.load_state_dict(one.state_dict())
    assert sorted(other.state_dict()) == ["tasks.2.anchor/head/weight", "tasks.2.seen"]
    assert torch.equal(other.get(2, "seen"), torch.tensor([0, 2]))
    with pytest.raises(KeyError, match="was not declared"):
        Slots(buffers=("seen",)).add(0, other=torch.ones(1))


def test_dropping_a_slot_leaves_the_others_untouched():
    slots = Slots(parameters=("w",))
    for task_id in range(3):
        slots.add(task_id, w=torch.full((2,), float(task_id)))
    slots.drop(1)
    assert slots.task_ids == [0, 2]
    assert [w.tolist() for w in slots.all("w")] == [[0.0, 0.0], [2.0, 2.0]]


def test_columns_stand_in_ascending_class_id_whatever_the_order_of_tasks():
    head = Head(6, seed=0)
    head.begin_task(0, [7, 2])
    head.begin_task(1, [5, 0])
    features = torch.randn(3, 6)
    logits = head(features)
    assert head.classes == [0, 2, 5, 7]
    first = F.linear(features, head.blocks.get(0, "weight"), head.blocks.get(0, "bias"))
    assert torch.equal(logits[:, 3], first[:, 0])  # class 7 is the first row of task 0's block
    assert torch.equal(logits[:, 1], first[:, 1])


def test_a_block_is_drawn_from_its_task_alone():
    both, alone = Head(6, seed=1), Head(6, seed=1)
    both.begin_task(0, [0, 1])
    both.begin_task(2, [4, 5])
    alone.begin_task(2, [4, 5])
    assert torch.equal(both.blocks.get(2, "weight"), alone.blocks.get(2, "weight"))


def test_a_domain_incremental_stream_keeps_one_block():
    head = Head(6, seed=0)
    head.begin_task(0, [0, 1, 2])
    head.begin_task(1, [0, 1, 2])
    assert head.blocks.task_ids == [0]
    assert len(head.parameters_for([1])) == 2


@pytest.mark.parametrize("init", ["trunc_normal", "zeros", "linear"])
def test_head_inits(init):
    head = Head(200, seed=0, init=init)
    state = torch.get_rng_state()
    head.begin_task(0, range(50))
    assert torch.equal(state, torch.get_rng_state())
    weight, bias = head.blocks.get(0, "weight"), head.blocks.get(0, "bias")
    if init == "zeros":
        assert not weight.any()
    if init == "trunc_normal":
        assert 0.018 < float(weight.detach().std()) < 0.022
    assert bool(bias.any()) == (init == "linear")


def test_loss_over_the_tasks_classes_equals_masking_the_others_with_minus_infinity():
    torch.manual_seed(0)
    logits = torch.randn(8, 6, requires_grad=True)
    labels = torch.tensor([4, 9, 4, 4, 9, 9, 4, 9])
    seen = [0, 2, 4, 7, 9, 11]
    loss = cross_entropy(logits, labels, seen, over=[9, 4])
    gradient = torch.autograd.grad(loss, logits)[0]
    mask = torch.full((6,), float("-inf"))
    mask[[2, 4]] = 0.0
    masked = F.cross_entropy(logits + mask, targets_among(labels, seen))
    expected = torch.autograd.grad(masked, logits)[0]
    assert torch.equal(loss, masked)
    assert torch.equal(gradient, expected)
    assert not gradient[:, [0, 1, 3, 5]].any()


def test_columns_of_are_ascending():
    assert columns_of([9, 4], [0, 2, 4, 7, 9, 11]) == [2, 4]


def test_a_restored_slot_has_its_parameters_in_the_order_of_a_new_one():
    made, restored = (Slots(parameters=("weight", "bias"), buffers=("classes",)) for _ in range(2))
    made.add(3, weight=torch.ones(2, 2), bias=torch.zeros(2), classes=torch.arange(2))
    restored.load_state_dict(dict(sorted(made.state_dict().items())))  # as a file gives it: by name
    assert list(restored.tasks["3"].state_dict()) == list(made.tasks["3"].state_dict())
