"""`scripts/bench.py memory` on the tiny models: tracked bytes against exact counts, and the formula against tracked bytes."""
import importlib
import sys
from math import prod
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from bench_memory import FUSED, largest_batch, measure, with_recomputation

from granvit.config import resolve_models
from granvit.cost import activation_bytes, few_logits, logits_bytes, rows_in_chunk, state_bytes
from granvit.models import parameter_shapes, part_of, vision_shapes
from tests.helpers import run_config

LENGTH, ANSWERS = 64, 16


def found(stage: str, rows: int = 2, recompute: bool = False):
    config = run_config(stage=stage, runtime={"compute": "bfloat16"})
    vision, language = resolve_models(config)
    return measure(with_recomputation(config, recompute), vision, language, largest_batch(config, vision, rows))


@pytest.mark.parametrize("stage", ["projector", "stage1", "stage2", "sft"])
def test_states_are_counted_exactly(stage):
    config = run_config(stage=stage)
    vision, language = resolve_models(config)
    spec, sizes = config.stage_spec, {name: prod(shape) for name, shape in parameter_shapes(vision, language).items()}
    trained = sum(size for name, size in sizes.items() if part_of(name) in spec.trains)
    one = found(stage)
    assert one.parameters == 4 * trained + 2 * (sum(sizes.values()) - trained)
    assert (one.gradients, one.moments) == (4 * trained, 8 * trained)
    assert one.teacher == 4 * sum(map(prod, vision_shapes(vision).values())) * spec.distill
    states = one.parameters + one.gradients + one.moments + one.teacher
    assert states == state_bytes(vision, language, spec.trains, spec.distill, 2)
    assert states <= one.state < 1.01 * states + 4096  # means, deviations, resampling matrices beside them
    assert one.passes > one.state + one.activations and one.update > one.state  # temporaries: of one chunk (ops/adamw.py)


def test_recomputation_and_fewer_rows_keep_less():
    kept = found("sft").activations
    assert found("sft", recompute=True).activations < 0.6 * kept
    assert 1.6 < found("sft", rows=4).activations / kept < 2
    assert FUSED in found("sft").operators


@pytest.mark.parametrize("package", ["ms_granvit", "pt_granvit"])
def test_the_formula_cuts_logits_into_chunks_where_the_packages_do(package):
    pytest.importorskip({"ms_granvit": "mindspore", "pt_granvit": "torch"}[package])
    table, operator = (importlib.import_module(f"{package}.ops.{name}") for name in ("table", "cross_entropy"))
    for positions, vocab in ((1, 31), (110, 151936), (111, 151936), (480, 151936), (1766, 151936), (1767, 151936), (10**5, 96)):
        assert operator.rows_in_chunk(positions, vocab) == rows_in_chunk(positions, vocab)
        for trained in (False, True):
            assert table.few_logits(positions, vocab, trained) == few_logits(positions, vocab, trained)


def test_logits_cost_no_more_than_a_chunk_where_they_are_cut():
    """320 positions and the vocabulary and width of Qwen2.5-1.5B."""
    all_logits, chunk = 320 * 151936, 110 * 151936
    assert logits_bytes(320, 151936, 1536, trained=True) == (6 * all_logits, 12 * all_logits)
    assert logits_bytes(320, 151936, 1536, trained=False) == (0, 10 * chunk)
    assert logits_bytes(1767, 151936, 1536, trained=True) == (0, 10 * 151936 * 1536)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_the_formula_is_near_what_is_tracked(stage):
    """At these small sizes the tensors that the formula ignores (sines, lists of positions) matter more than at full size."""
    config = run_config(stage=stage)
    for recompute in (False, True):
        predicted, _ = activation_bytes(*resolve_models(config), config.stage_spec.trains, 2, LENGTH, ANSWERS, recompute)
        assert found(stage, recompute=recompute).activations == pytest.approx(predicted, rel=0.35)
