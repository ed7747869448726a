"""A task that was learnt by heart is seen by every figure; relearning starts from the same draws for every model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import built, config_of, digits, learnt, trainer_for

from cl_platform.metrics.forgetting import RELEARNING_STEPS
from cl_platform.unlearning.figures import Models, figures
from cl_platform.unlearning.models import ask
from cl_platform.unlearning.recorded import recorded_accuracies
from cl_platform.unlearning.relearn import relearn


def by_heart():
    """A task of all images with labels that only remembering can get right, and a stream of nothing else."""
    stream = digits(3)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name in ("train", "test"):
        sets = [getattr(task, name) for task in stream.tasks]
        ids = torch.cat([images.example_ids for images in sets])
        labels = torch.randint(stream.num_classes, (len(ids),), generator=generator)
        parts[name] = dataclasses.replace(sets[0], labels=labels, example_ids=ids)
    target = dataclasses.replace(stream.tasks[1], classes=tuple(range(stream.num_classes)), **parts)
    return stream, target


@pytest.fixture(scope="module")
def models():
    """Answers of a model that memorised the images, and of one that never saw them; both know all classes."""
    stream, target = by_heart()
    config = config_of("finetune")
    answers = []
    for memorised in (True, False):
        learner = built(config, stream)
        learner.trainer = trainer_for(config)
        learner.begin_task(target, 1)
        learner.learnt.append(target.task_id)
        if memorised:
            images = learner.transforms.evaluate(target.train.images(slice(None)))
            parameters = [p for group in learner.groups for p in group.parameters]
            optimizer = torch.optim.Adam(parameters, 3e-3)
            for _ in range(80):
                loss = torch.nn.functional.cross_entropy(learner.head(learner.backbone(images)), target.train.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        answers.append(ask(learner, target, [stream.tasks[0]]))
    return Models(answers[0], o=answers[0], r=answers[1])


@pytest.fixture(scope="module")
def found(models):
    return figures(models)


def test_a_memorising_model_that_was_never_unlearnt_is_found_out_by_its_loss(found):
    assert found["forget_acc_train_cil"].u.value == 1
    assert found["mia_auc_loss"].u.value >= 0.9
    assert found["mia_auc_loss"].u == found["mia_auc_loss"].o


def test_every_attack_ranks_it_above_a_model_that_never_saw_the_images(found):
    for key in ("mia_auc_loss", "mia_auc_entropy", "mia_auc_msp", "mia_adv"):
        assert found[key].gap.value > 0.1, key
    assert abs(found["mia_auc_loss"].r.value - 0.5) < 4 * found["mia_auc_loss"].r.error


def test_scores_against_the_reference_are_perfect_for_the_reference_alone(models, found):
    assert found["tow"].r.value == 1
    assert found["tow"].u.value < 1
    assert found["js_forget"].u.value > 0.01
    same = figures(Models(models.r, r=models.r))
    assert same["js_forget"].u.value == 0
    assert same["dd"].u.value == pytest.approx(0, abs=1e-12)
    assert same["avg_gap"].u.value == 0
    assert same["aus"].u.reason == "the model before forgetting is gone"


def test_without_a_reference_its_columns_say_why(models):
    found = figures(Models(models.u))
    assert found["tow"].u.value is None
    assert found["js_forget"].u.reason == "needs a model that never learnt the task"
    assert found["mia_auc_loss"].u.value is not None


def test_relearning_starts_at_the_same_place_and_leaves_the_original_alone():
    stream, config = digits(2), config_of("finetune")
    runs = []
    for _ in range(2):
        learner = learnt(config, stream)
        learner.drop_task(1)
        runs.append(relearn(learner, stream.tasks[1], target=0.6))
    assert runs[0] == runs[1]
    assert runs[0].value in RELEARNING_STEPS or runs[0].censored_at == RELEARNING_STEPS[-1]
    with_task = relearn(learnt(config, stream), stream.tasks[1], target=0.0)  # fresh rows, also where old ones stood
    assert with_task.value == 0


def test_a_closed_form_has_no_steps_to_relearn():
    stream, config = digits(2), config_of("nmc")
    learner = learnt(config, stream)
    assert "closed form" in relearn(learner, stream.tasks[1], target=0.9).reason


def test_accuracies_before_forgetting_are_read_from_what_the_run_has_kept(tmp_path):
    assert recorded_accuracies(tmp_path, 1, {0: 10})["forget_acc_test"].value is None
    rows = ["init,0.1,0.5,0.5", "0,0.9,NaN,NaN", "1,0.5,0.8,NaN", "2,0.9,NaN,0.7"]
    (tmp_path / "accuracy_matrix.csv").write_text("\n".join(["after_task,task_0,task_1,task_2", *rows, ""]))
    found = recorded_accuracies(tmp_path, 1, {0: 10})
    assert (found["forget_acc_test"].value, found["retain_acc_test"].value) == (0.8, 0.5)
    assert "retain_acc_test" not in recorded_accuracies(tmp_path, 1, {0: 10, 2: 10})  # task 2 came later
    assert recorded_accuracies(tmp_path, 7, {})["forget_acc_test"].value is None
