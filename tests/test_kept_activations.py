"""Activations behind the blocks that nothing changes are computed once per evaluation image, and never stale."""

import functools

import pytest
import tiny
import torch
from tiny import answers, begun, built, config_of, differing, digits, fit, images_of, learn, learnt

from cl_platform.evaluation import count_correct
from cl_platform.subset_evaluation import count_subsets, head_weight, image_weight, resident, subset_of

CASES = {
    "coda_prompt": ({"layers": [2, 4]}, 2),
    "dual_prompt": ({"g_layers": [3], "e_layers": [4]}, 3),
    "finetune": ({"trainable": ["blocks.4.*", "norm.*"]}, 4),
}


@pytest.fixture(autouse=True)
def _five_blocks(monkeypatch):
    monkeypatch.setattr(tiny, "tiny_vit", functools.partial(tiny.tiny_vit, depth=5))


def subsets_of(stream, count=12):
    return [subset_of(task, count, 0) for task in stream.tasks]


def from_images(learner, subset):
    learner_answers = learner.logits_of_images(subset.images.images(slice(None)))
    return torch.tensor(learner.seen_classes())[learner_answers.argmax(1)]


@pytest.mark.parametrize("name", CASES)
def test_answers_from_kept_activations_are_those_from_the_pixels(name):
    keys, blocks = CASES[name]
    learner = begun(config_of(name, strategy=keys), digits(), 1)
    assert learner.context.kept_blocks == blocks
    subsets = subsets_of(digits())
    ready = resident(learner, subsets)
    assert ready.columns["tokens"].shape == (24, 5, 32)
    assert ready.images.numel() == 0
    with learner.answering():
        kept = learner.answer(ready.images, ready.columns)
    pixels = torch.cat([s.images.images(slice(None)) for s in subsets])
    torch.testing.assert_close(kept, learner.logits_of_images(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_kept_blocks_run_no_more(name):
    learner = begun(config_of(name, strategy=CASES[name][0]), digits(), 1)
    ready, ran = resident(learner, subsets_of(digits())), []
    for index, block in enumerate(learner.backbone.vit.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        block.attn.qkv.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    count_subsets(learner, ready)
    assert set(ran) == set(range(CASES[name][1], 5))


def test_nothing_is_kept_where_the_first_block_changes():
    for name, keys in (("coda_prompt", {"layers": [0, 4]}), ("l2p", {}), ("finetune", {}), ("joint", {})):
        learner = begun(config_of(name, strategy=keys), digits())
        assert learner.context.kept_blocks == 0
        assert "tokens" not in resident(learner, subsets_of(digits())[:1]).columns


def test_a_trained_block_before_the_prompts_is_run_again():
    learner = begun(config_of("finetune", strategy={"trainable": ["patch_embed.*"]}), digits())
    assert learner.context.kept_blocks == 0


def test_other_weights_are_a_miss():
    learner = begun(config_of("finetune", strategy=CASES["finetune"][0]), digits())
    before = resident(learner, subsets_of(digits())[:1]).columns["tokens"]
    with torch.no_grad():
        learner.backbone.vit.blocks[0].mlp.fc1.weight.mul_(1.5)
    learner.cache.refresh()
    assert not torch.equal(before, resident(learner, subsets_of(digits())[:1]).columns["tokens"])


def test_a_bound_that_leaves_no_room_means_that_images_are_run_through_all_blocks():
    config = config_of("coda_prompt", strategy={"layers": [2, 4]}, evaluation={"cache_bytes": 12 * 32 * 4 + 100})
    learner = begun(config, digits())
    ready = resident(learner, subsets_of(digits())[:1])
    assert set(ready.columns) == {"query"}
    assert learner.cache.bytes <= 12 * 32 * 4 + 100
    assert count_subsets(learner, ready)[0]["cil"][1] == 12
    assert image_weight(learner, ready.columns) == 1


def test_weights_are_what_an_image_costs():
    assert image_weight(begun(config_of("coda_prompt", strategy={"layers": [2, 4]}), digits())) == pytest.approx(3 / 5)
    assert image_weight(begun(config_of("l2p"), digits())) == 1
    assert image_weight(begun(config_of("l2p"), digits()), {}) == 2
    assert image_weight(begun(config_of("finetune"), digits())) == 1
    probe = begun(config_of("linear_probe"), digits())
    assert image_weight(probe) == head_weight(probe)
    assert head_weight(probe) < 0.01


@pytest.mark.parametrize("name", [*CASES, "nmc", "linear_probe", "l2p"])
def test_a_subset_of_all_images_counts_what_the_whole_test_set_counts(name):
    config = config_of(name, strategy=CASES.get(name, ({}, 0))[0])
    learner = learn(built(config, digits()), config, digits().tasks)
    found = count_subsets(learner, resident(learner, subsets_of(digits(), 99)))
    whole = count_correct(learner, digits().tasks)
    for space, right in whole.correct.items():
        assert [found[t.task_id][space] for t in digits().tasks] == list(zip(right, whole.total, strict=True))


def test_training_with_kept_blocks_gives_the_bytes_of_training_without_evaluation():
    config = config_of("coda_prompt", strategy={"layers": [2, 4]})
    watched, alone = built(config, digits()), built(config, digits())
    for learner in (watched, alone):
        fit(learner, config, digits().tasks[0])
        if learner is watched:
            resident(learner, subsets_of(digits())[:1])
        learner.end_task(digits().tasks[0])
    assert not differing(watched.state_dict(), alone.state_dict())


def test_the_mean_loss_of_each_subset_comes_on_request_and_changes_no_count():
    learner = learnt(config_of("finetune"), digits())
    ready = resident(learner, subsets_of(digits(), 12))
    losses = {}
    assert count_subsets(learner, ready, losses) == count_subsets(learner, ready)
    logits = answers(learner, images_of(digits()))
    labels = torch.cat([task.test.labels for task in digits().tasks])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(2, -1).mean(1)
    assert list(losses) == [0, 1] and torch.tensor(list(losses.values())).allclose(expected, atol=1e-5)


def test_a_task_that_a_closed_form_has_not_learnt_yet_has_no_loss():
    learner = begun(config_of("nmc"), digits(), position=1)
    losses = {}
    count_subsets(learner, resident(learner, subsets_of(digits(), 12)), losses)
    assert list(losses) == [0]
