"""What goes wrong after a run has started ends in one line too."""

import pytest

from cl_platform.errors import UserError
from cl_platform.learner import ContinualLearner

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_out_of_memory_suggests_a_batch_size(small_run, monkeypatch, tmp_path):
    def explode(self, batch, batch_idx):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ContinualLearner, "training_step", explode)
    with pytest.raises(UserError) as refused:
        small_run("strategy=finetune", f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert "trainer.batch_size=8" in str(refused.value)
    assert "accumulate_grad_batches" in str(refused.value)


def test_a_finished_run_resumes_to_itself(small_run, tmp_path):
    run = tmp_path / "run"
    first = small_run("strategy=linear_probe", f"run_dir={run}", "logger=[]")
    again = small_run("strategy=linear_probe", f"run_dir={run}", "logger=[]", "resume=auto")
    assert again.metrics == first.metrics


def test_each_logger_leaves_its_files(small_run, tmp_path):
    small_run("strategy=linear_probe", "logger=[tensorboard,csv]", f"run_dir={tmp_path / 'run'}")
    for logger in ("tensorboard", "csv"):
        assert any((tmp_path / "run" / logger).iterdir())
