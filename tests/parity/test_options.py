"""The option configurations: every value of every option is in one of them, and a value that is in none is named."""
from dataclasses import replace
from typing import Literal

import pytest

from granvit.models import PARTS, VisionConfig
from granvit.stages import STAGES
from parity import check, options
from parity.options import NOT_IN_THE_GRAPH, OPTIONS, configurations, coverage, domain, pairs, words


def missing(found) -> list[str]:
    """Values that no configuration has, and pairs of values of a stage (trained parts, distillation, ...) that none has."""
    has = {(factor, value) for values in found.values() for factor, value in values.items()}
    lacking = [f"{factor}: {value}" for factor, values in domain().items() for value in values if (factor, value) not in has]
    for stage in words()["run.stage"]:
        spec = STAGES[stage]
        asked = {part: "trained" if part in spec.trains else "frozen" for part in PARTS}
        asked |= {"distillation": str(spec.distill), "zero image tokens": str(spec.zero_image_tokens)}
        lacking += [f"{stage}'s {pair}" for pair in pairs(asked) if not any(set(pair) <= set(v.items()) for v in found.values())]
    return lacking


def test_every_value_of_every_option_is_in_a_configuration():
    assert missing(configurations()) == []
    assert set(NOT_IN_THE_GRAPH) <= set(words()), "NOT_IN_THE_GRAPH lists a field that does not exist"


def test_a_new_value_that_no_configuration_has_is_named(monkeypatch):
    class Newer(VisionConfig):
        activation: Literal["gelu_tanh", "gelu", "quick_gelu", "silu", "relu2"] = "gelu_tanh"

    monkeypatch.setattr(options, "VisionConfig", Newer)
    assert missing(configurations()) == ["vision.activation: relu2"]


def test_a_new_field_has_words_of_its_own(monkeypatch):
    class Newer(VisionConfig):
        registers: bool = False
        rope: Literal["axial", "mixed"] | None = None

    monkeypatch.setattr(options, "VisionConfig", Newer)
    assert words()["vision.registers"] == ("False", "True") and words()["vision.rope"] == ("axial", "mixed")


@pytest.mark.parametrize("name, lost", [
    ("pooled", {"ROI grid: below", "run.distill.features: final", "vision.activation: quick_gelu", "alpha: warm-up"}),
    ("resampled", {"pixels beyond the patches: some"}),
    ("guesser", {"zero image tokens: True"}),
])  # fmt: skip
def test_a_configuration_left_out_is_missed(name, lost):
    left = {other: values for other, values in configurations().items() if other != name}
    assert lost <= set(missing(left))


def test_a_stage_that_trains_hides_and_distils_as_none_does_is_named(monkeypatch):
    monkeypatch.setitem(STAGES, "pretrain_text", replace(STAGES["pretrain_text"], distill=True))
    assert any("pretrain_text's" in text and "distillation" in text for text in missing(configurations()))


def test_words_of_a_loss_that_is_not_there_are_not_counted():
    assert "run.distill.loss" not in configurations()["tuned"] and "vision.activation" not in configurations()["guesser"]


def test_three_quarters_of_all_pairs_stand_together():
    rows, covered, all_pairs = coverage()
    assert covered / all_pairs > 0.7 and {factor for factor, _, _ in rows} == set(domain())
    assert all(names for _, _, names in rows)


def test_the_batches_reach_the_corners():
    made = {name: options.option_fixture(0, name) for name in OPTIONS}
    batch = made["tiled"].batches[0]
    assert batch.grids_B2.tolist() == [[1, 3], [2, 2]] and (batch.image_positions_BN < 0).sum(1).tolist() == [4, 0]
    assert batch.pixels_B3RR.shape == (2, 5, 3, 32, 32) and batch.crops_BK3rr.shape[-1] == 16
    batch = made["resampled"].batches[0]
    assert batch.image_weights_B.tolist() == [1, 0] and batch.box_weights_BK.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert made["resampled"].vision.covered_pixels == 32 < batch.pixels_B3RR.shape[-1]
    for name, alpha, averaged in (("pooled", 0, 0), ("resampled", 0.8, 0), ("tuned", 0.9, 2)):
        step_inputs = made[name].step_inputs(1, made[name].step_batches(1))
        assert (step_inputs.alpha, step_inputs.averaged_micro_batches) == (pytest.approx(alpha), averaged)


def test_the_table_says_which_configuration_has_a_value(capsys):
    pytest.importorskip("torch")
    check._print_coverage(check.Console(width=160))
    said = capsys.readouterr().out
    assert "quick_gelu" in said and "pairs of values of two options" in said
