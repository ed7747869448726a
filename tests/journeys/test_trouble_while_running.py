"""What goes wrong after a run has started ends in one line too."""

import pytest

from cl_platform.errors import UserError
from cl_platform.learner import ContinualLearner


def test_out_of_memory_suggests_a_batch_size(small_run, monkeypatch, tmp_path):
    def explode(self, batch, batch_idx):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ContinualLearner, "training_step", explode)
    with pytest.raises(UserError) as refused:
        small_run("strategy=finetune", f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert "trainer.batch_size=8" in str(refused.value)
    assert "accumulate_grad_batches" in str(refused.value)


def test_a_loss_that_is_not_finite_names_the_learning_rate(small_run, tmp_path):
    with pytest.raises(UserError, match=r"optimizer.lr=1e\+30"):
        small_run("strategy=finetune", "optimizer.lr=1e30", f"run_dir={tmp_path / 'run'}")


def test_a_finished_run_resumes_to_itself(small_run, tmp_path):
    run = tmp_path / "run"
    first = small_run("strategy=linear_probe", f"run_dir={run}", "logger=[]")
    again = small_run("strategy=linear_probe", f"run_dir={run}", "logger=[]", "resume=auto")
    assert again.metrics == first.metrics


@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_each_logger_leaves_its_files(logger, small_run, tmp_path):
    small_run("strategy=linear_probe", f"logger=[{logger}]", f"run_dir={tmp_path / 'run'}")
    assert any((tmp_path / "run" / logger).iterdir())
