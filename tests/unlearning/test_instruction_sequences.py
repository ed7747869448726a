"""Sequences of instructions: the state table, refused as a whole before anything runs, with what could be written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_platform.errors import UserError
from cl_platform.unlearning.sequence import MOVES, Stage, parse

BENCHMARK = "R0 T1 T2 R3 R1 F2 T4 F4"  # of the paper's released code


def refusal(text, task_ids=None):
    with pytest.raises(UserError) as caught:
        parse(text, task_ids)
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- the published sequence -----------------------------------------------------------------------------------------


def test_the_published_sequence_ends_with_three_permanent_and_two_forgotten_tasks():
    sequence = parse(BENCHMARK, range(5))
    assert sequence.in_state("permanent") == [0, 3, 1]
    assert sequence.in_state("forgotten") == [2, 4]
    assert sequence.in_state("temporary") == []
    assert str(sequence) == BENCHMARK
    assert len(sequence) == 8


def test_its_stages_say_what_is_learnt_promoted_and_forgotten():
    kinds = [(stage.kind, stage.task_id) for stage in parse(BENCHMARK)]
    assert kinds == [
        ("learn", 0), ("learn", 1), ("learn", 2), ("learn", 3), ("promote", 1), ("forget", 2), ("learn", 4),
        ("forget", 4),
    ]  # fmt: skip
    assert parse(BENCHMARK).stages[4] == Stage(5, "promote", 1, "R")
    assert parse(BENCHMARK).learnt == [0, 1, 2, 3, 4]


def test_states_are_known_after_every_token():
    sequence = parse(BENCHMARK)
    assert sequence.in_state("temporary", 4) == [1, 2]
    assert sequence.in_state("temporary", 5) == [2]
    assert sequence.states(0) == {}


def test_the_reference_is_the_sequence_without_a_word_about_the_forgotten_tasks():
    assert str(parse(BENCHMARK).without([2, 4])) == "R0 T1 R3 R1"
    assert str(parse("T0 F0").without([0])) == ""


@pytest.mark.parametrize(
    ("text", "token"),
    [("F0", 1), ("R0 F0", 2), ("T0 T0", 2), ("R0 R0", 2), ("T0 F0 T0", 3), ("T0 R0 F0", 3), ("T0 F0 R0", 3)],
)
def test_the_first_illegal_token_is_named_by_its_place(text, token):
    assert f": token {token} ({text.split()[token - 1]}) cannot be obeyed" in refusal(text)


def test_a_refusal_names_the_state_and_the_legal_moves():
    assert "task 0 has not been learnt; legal for it: R0 (learn) or T0 (learn)" in refusal("F0")
    assert "task 0 is held temporarily; legal for it: R0 (promote) or F0 (forget)" in refusal("T0 T0")
    assert "task 0 is learnt for good; legal for it: nothing more" in refusal("R0 R0")
    assert "task 0 is forgotten; legal for it: nothing more" in refusal("T0 F0 T0")
    assert "another task id" in refusal("T0 F0 T0")


def test_forgetting_a_permanent_task_is_refused_with_rollback_and_its_price():
    message = refusal("R0 T1 R3 R1 T2 F2 F0")
    assert "Hold it temporarily with T0, or forget it after the run" in message
    assert "unlearn RUN --task 0 --method rollback relearns tasks 1, 3" in message
    assert "--task 3 --method rollback relearns task 1" in refusal("R0 R3 T1 F3")
    assert "rollback relearns nothing" in refusal("R0 F0")


# -- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["X1", "R", "1", "r1", "R-1", "R01", "R1,", "RT1", "T1F1", "R1.0", "R\u0661"])
def test_a_word_that_is_no_instruction_is_refused_by_its_place(word):
    assert f"unlearning.sequence=R0 {word}: token 2 ({word}) is no instruction" in refusal(f"R0 {word}")


def test_the_nearest_instruction_is_offered():
    assert "Did you mean R1" in refusal("r1")
    assert "Did you mean T3" in refusal("T_03,")


def test_a_task_that_the_stream_does_not_have_is_refused_with_those_it_has():
    assert "token 2 (T9) names a task that the stream does not have; it has 0,2,3" in refusal("R0 T9", [0, 2, 3])


@pytest.mark.parametrize("value", [None, 3, ["R0"], " "])
def test_what_is_no_text_of_instructions_is_refused(value):
    assert "must be a text of instructions" in refusal(value)


def test_any_blanks_separate_and_no_token_is_no_stage():
    assert str(parse("  R0\tT1\n F1 ")) == "R0 T1 F1"
    assert parse("").stages == ()


def test_another_key_stands_in_the_message():
    with pytest.raises(UserError, match=r"^steps=F0: token 1"):
        parse("F0", key="steps")


# -- for all sequences ----------------------------------------------------------------------------------------------


@st.composite
def legal_sequences(draw):
    """A walk through the state table."""
    states, tokens = {}, []
    for _ in range(draw(st.integers(1, 25))):
        open_moves = [(i, t) for t in range(6) for i in MOVES[states.get(t, "unseen")]]
        if not open_moves:
            break
        instruction, task_id = draw(st.sampled_from(open_moves))
        states[task_id] = MOVES[states.get(task_id, "unseen")][instruction][1]
        tokens.append(f"{instruction}{task_id}")
    return tokens, states


@given(legal_sequences())
def test_a_legal_sequence_is_accepted_and_keeps_its_invariant(drawn):
    tokens, states = drawn
    sequence = parse(" ".join(tokens), range(6))
    assert sequence.states() == states
    for count in range(len(tokens) + 1):
        groups = [set(sequence.in_state(state, count)) for state in ("permanent", "temporary", "forgotten")]
        assert sum(map(len, groups)) == len(set.union(*groups)) == len({t[1:] for t in tokens[:count]})
        before = sequence.states(count - 1) if count else {}
        for state in ("permanent", "forgotten"):  # nobody leaves these
            assert {t for t, known in before.items() if known == state} <= set(sequence.in_state(state, count))
    assert sorted(sequence.learnt) == sorted(states)  # a task is learnt once
    forgotten = [stage.task_id for stage in sequence if stage.kind == "forget"]
    assert forgotten == sequence.in_state("forgotten")


@given(legal_sequences(), st.data())
def test_one_illegal_token_is_refused_at_its_place_whatever_follows(drawn, data):
    tokens, _ = drawn
    place = data.draw(st.integers(0, len(tokens)))
    states = parse(" ".join(tokens[:place])).states()
    illegal = [f"{i}{t}" for t in range(6) for i in "RTF" if i not in MOVES[states.get(t, "unseen")]]
    broken = [*tokens[:place], data.draw(st.sampled_from(illegal)), *tokens[place:]]
    assert f"token {place + 1} ({broken[place]}) cannot be obeyed" in refusal(" ".join(broken))


@given(legal_sequences())
def test_what_is_never_said_of_forgotten_tasks_leaves_the_others_as_they_are(drawn):
    tokens, states = drawn
    sequence = parse(" ".join(tokens))
    reference = sequence.without(sequence.in_state("forgotten"))
    assert reference.states() == {t: state for t, state in sequence.states().items() if state != "forgotten"}
