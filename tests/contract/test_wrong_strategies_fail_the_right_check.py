"""A broken promise is told by the check that stands for it, and by no other; what it says can be acted on."""

import ast
import re
from pathlib import Path

import pytest
import wrong_strategies_kit as wrong

import cl_platform.testing
from cl_platform import registry
from cl_platform.errors import UserError
from cl_platform.strategies.finetune import Finetune
from cl_platform.testing import ContractError, check_strategy, parametrize_with_checks, strategy_checks
from cl_platform.testing import check_frozen_weights_stay as one_check

BROKEN = {  # strategy: check, words of what was seen, words of what to do
    wrong.LearnsNothing: ("check_learns", "of 60 test images of the last task", "at a rate above 0"),
    wrong.IdleTerm: ("check_loss_terms_reach_what_is_trained", "idle_term/decay moves the gradient of no", "detach"),
    wrong.ForgottenState: ("check_state_is_restored", "answers otherwise", "parameters, buffers or Slots"),
    wrong.ForgottenCounter: ("check_resuming_equals_never_stopping", "ends the second with other bytes", "Counters"),
    wrong.GlobalDraws: ("check_no_draw_from_global_generators", "of torch was drawn from in begin_task", "stream("),
    wrong.BatchVote: ("check_an_answer_does_not_depend_on_its_batch", "answered otherwise alone", "no mean, vote"),
    wrong.ReadsTaskIds: ("check_no_task_id_at_test_time", "with task ids of", "Infer the task from the image"),
    wrong.Undeclared: ("check_lineage_is_true", "undeclared.average is in no component", "Yield a Component"),
    wrong.FalseOwner: ("check_lineage_is_true", "average changed while task 1 was learnt", "List in Component.tasks"),
    wrong.KeepsReference: ("check_a_dropped_task_is_not_referenced", "by KeepsReference._all", "let_go()"),
    wrong.ClaimsIsolation: ("check_a_drop_claims_no_more_than_it_does", "no component lists task 0", "Name in leaks"),
    wrong.LearnsFromQuestions: ("check_evaluation_changes_nothing", "asked has other bytes", "must not write"),
    wrong.NeedsTwoClasses: ("check_tasks_of_one_class_and_of_one_batch", "IndexError", "taken for granted"),
    wrong.NeedsFullPrecision: ("check_bfloat16", "bf16-mixed raised", ".float()"),
    wrong.MovesTheTrunk: ("check_frozen_weights_stay", "moved while task 0 was trained", "Yield it from trainable()"),
    wrong.FillsABuffer: ("check_a_buffer_changes_what_is_learnt", "with an empty buffer", "widen()"),
    wrong.Waits: ("check_a_step_does_not_wait_for_the_device", "in line", "declare waits"),
    wrong.AnswersBackwards: ("check_answers_are_logits_of_the_seen_classes", "seen_classes() is [5, 4", "ascending"),
    wrong.KeepsFromRunToRun: ("check_seeds_reproduce", "trained twice with one seed", "in a class or module"),
    wrong.NoDefaults: ("check_config_is_a_dataclass_with_defaults", "no default for rate", "Give every field"),
    wrong.RaisesInTraining: ("check_trains", "KeyError: 'teacher', in line", "Mend what raises"),
}


def failures_of(strategy, **arguments):
    with pytest.raises(ContractError) as caught:
        check_strategy(strategy, **arguments)
    return caught.value


def test_the_strategy_that_the_wrong_ones_start_from_is_right():
    check_strategy(wrong.Right)


DEAR = {"check_bfloat16", "check_tasks_of_one_class_and_of_one_batch", "check_a_step_does_not_wait_for_the_device"}
"""Checks that train by themselves, and that another broken promise does not reach."""


@pytest.mark.parametrize("strategy", BROKEN, ids=lambda cls: cls.__name__)
def test_a_wrong_strategy_fails_its_check_alone(strategy):
    check, seen, todo = BROKEN[strategy]
    error = failures_of(strategy, skip=DEAR - {check})
    assert [failure.check for failure in error.failures] == [check], str(error)
    (failure,) = error.failures
    assert seen in failure.seen, failure.seen
    assert todo in failure.todo, failure.todo


def test_every_check_has_a_strategy_that_fails_it():
    assert {check for check, _, _ in BROKEN.values()} == {name for name, _ in strategy_checks()}


def test_the_message_names_the_strategy_and_gives_each_failure_its_lines():
    class Twice(wrong.ReadsTaskIds):
        def seen_classes(self):
            return super().seen_classes()[::-1]

    error = failures_of(Twice, only=["check_no_task_id_at_test_time", "check_answers_are_logits_of_the_seen_classes"])
    text = str(error)
    assert text.startswith("twice fails 2 of 2 checks of the contract of a strategy\n\ncheck_")
    assert [line.split(":")[0] for line in text.splitlines() if re.match(r"  \w", line)] == ["  seen", "  next"] * 2
    assert max(map(len, text.splitlines())) <= 100


def test_one_check_alone_and_all_but_some():
    with pytest.raises(ContractError, match="moves_the_trunk fails a check") as caught:
        one_check(wrong.MovesTheTrunk)
    assert [failure.check for failure in caught.value.failures] == ["check_frozen_weights_stay"]
    check_strategy(wrong.LearnsNothing, only=["check_frozen_weights_stay"])
    check_strategy(wrong.LearnsNothing, only=["check_learns", "check_frozen_weights_stay"], skip="check_learns")


def test_what_is_no_strategy_no_check_or_no_key_is_refused_in_one_line():
    with pytest.raises(UserError, match="strategy=Unused: is neither a subclass"):
        check_strategy(wrong.Unused)
    with pytest.raises(UserError, match="Did you mean finetune"):
        check_strategy("finetunes")
    with pytest.raises(UserError, match="only=check_learn: unknown.*Did you mean check_learns"):
        check_strategy(wrong.Right, only=["check_learn"])
    with pytest.raises(UserError, match=r"strategy\.right\.rates=1: unknown key.*Did you mean strategy\.right\.rate"):
        check_strategy(wrong.Right, {"rates": 1})
    with pytest.raises(UserError, match="must be at most the pool's 10 prompts"):
        check_strategy("l2p", {"top_k": 100})
    with pytest.raises(UserError, match="rates=1: unknown key"):
        one_check(wrong.Right, {"rates": 1})
    with pytest.raises(UserError, match="config=lwf: is none of finetune"):
        check_strategy(["finetune"], {"lwf": {}})
    with pytest.raises(UserError, match="both own"):
        check_strategy(["finetune", "er_ace"])


def test_a_registered_name_a_class_and_keys_lead_to_the_same_strategy(monkeypatch):
    monkeypatch.setattr(registry.strategies, "_entries", dict(registry.strategies._entries))

    class Mine(wrong.LearnsNothing):
        pass

    registry.strategies.register("mine_to_check")(Mine)
    only = ["check_learns"]
    assert "mine_to_check fails a check" in str(failures_of("mine_to_check", only=only))
    assert "mine_to_check fails a check" in str(failures_of(Mine, only=only))
    assert "right fails a check" in str(failures_of(wrong.Right, config={"rate": 0.0}, only=only))
    check_strategy(Finetune, only=["check_config_is_a_dataclass_with_defaults"])


@parametrize_with_checks([wrong.Right, ["finetune", "l2"]])
def test_pairs_can_be_parametrised_over(strategy, check):
    if check.__name__ == "check_config_is_a_dataclass_with_defaults":
        check(strategy)


def test_the_kit_is_imported_without_pytest():
    for file in Path(cl_platform.testing.__file__).parent.glob("*.py"):
        at_import = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("pytest" in ast.unparse(node) for node in at_import), file
