"""The contract of a strategy as executable checks, for those who write one.

::

    from cl_platform.testing import check_strategy

    check_strategy(MyStrategy)

Every check is a function of its own as well. None of them needs pytest.
"""

from cl_platform.testing.answering import (
    check_an_answer_does_not_depend_on_its_batch,
    check_answers_are_logits_of_the_seen_classes,
    check_no_task_id_at_test_time,
)
from cl_platform.testing.contract import check_strategy, parametrize_with_checks, strategy_checks
from cl_platform.testing.failures import ContractError, Failure
from cl_platform.testing.keeping import (
    check_evaluation_changes_nothing,
    check_no_draw_from_global_generators,
    check_resuming_equals_never_stopping,
    check_seeds_reproduce,
    check_state_is_restored,
)
from cl_platform.testing.learning import (
    check_bfloat16,
    check_config_is_a_dataclass_with_defaults,
    check_learns,
    check_tasks_of_one_class_and_of_one_batch,
    check_trains,
)
from cl_platform.testing.owning import (
    check_a_drop_claims_no_more_than_it_does,
    check_a_dropped_task_is_not_referenced,
    check_lineage_is_true,
)
from cl_platform.testing.stepping import (
    check_a_buffer_changes_what_is_learnt,
    check_a_step_does_not_wait_for_the_device,
    check_frozen_weights_stay,
    check_loss_terms_reach_what_is_trained,
)

__all__ = [
    "ContractError",
    "Failure",
    "check_a_buffer_changes_what_is_learnt",
    "check_a_drop_claims_no_more_than_it_does",
    "check_a_dropped_task_is_not_referenced",
    "check_a_step_does_not_wait_for_the_device",
    "check_an_answer_does_not_depend_on_its_batch",
    "check_answers_are_logits_of_the_seen_classes",
    "check_bfloat16",
    "check_config_is_a_dataclass_with_defaults",
    "check_evaluation_changes_nothing",
    "check_frozen_weights_stay",
    "check_learns",
    "check_lineage_is_true",
    "check_loss_terms_reach_what_is_trained",
    "check_no_draw_from_global_generators",
    "check_no_task_id_at_test_time",
    "check_resuming_equals_never_stopping",
    "check_seeds_reproduce",
    "check_state_is_restored",
    "check_strategy",
    "check_tasks_of_one_class_and_of_one_batch",
    "check_trains",
    "parametrize_with_checks",
    "strategy_checks",
]
