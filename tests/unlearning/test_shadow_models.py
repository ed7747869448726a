"""Shadow models: the attack by each image's own spread, its price, and that models which held the task are not kept."""

from __future__ import annotations

import pytest
from forgetful_runs import WORKSHOP, forget

from cl_platform.errors import UserError
from cl_platform.unlearning.verify import Options, verify

said: list[str] = []


def verified(run, **options):
    said.clear()
    return verify(run, WORKSHOP, Options(**options), said.append)


def test_shadow_models_add_an_attack_and_cost_what_was_said(run, references):
    forget(run)
    result = verified(run, reference=references[0], shadows=2)
    assert any("shadows: 2 references of other seeds, about 8 steps" in line for line in said)
    assert result.figures["mia_lira_msp_auc"].u.value is not None
    assert result.figures["mia_lira_msp_auc"].gap.value == 0
    assert result.figures["js_in"].u.value > 0
    assert result.figures["js_rel"].u.value >= 0
    assert "online" in result.figures["mia_eps_lower"].u.reason
    assert result.passed


def test_online_shadows_learn_and_forget_and_are_not_kept(run, references, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    forget(run)
    result = verified(run, reference=references[0], shadows=4, lira="online")
    assert any("2 runs that learn and forget task 1" in line for line in said)
    assert result.figures["mia_lira_msp_auc"].u.value is not None
    assert result.figures["mia_eps_lower"].u.reason == "needs >= 20 models of each kind, has 2"
    assert not list(tmp_path.glob("shadow_*"))


@pytest.mark.parametrize("options", [{"shadows": 1}, {"shadows": -2}, {"shadows": 2, "lira": "online"}, {"lira": "x"}])
def test_numbers_of_shadows_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match="--"):
        Options(**options)
