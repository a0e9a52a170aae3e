"""What a resumed run may change and what it may not."""
import json

import pytest

from granvit.checkpoint.resume import check_same_data, check_same_run
from granvit.checkpoint.run import newest_checkpoint, open_checkpoint, state_digest
from granvit.models import VisionConfig
from tests.checkpoint.conftest import LANGUAGE, VISION, as_bytes
from tests.helpers import rewrite_as_format_1, run_config


@pytest.mark.parametrize(
    "section, key, value",
    [("train", "log_every", 3), ("train", "keep_checkpoints", 9), ("data", "workers", 2), ("eval", "every", 7),
     ("runtime", "jit_level", "O1"), ("runtime", "device", "cpu"), ("train", "micro_batch", 1), ("runtime", "recompute", True)],
)  # fmt: skip
def test_what_enters_no_weight_may_change(run, section, key, value):
    config = run_config(**{section: {key: value}})
    changes = check_same_run(newest_checkpoint(run[0]), config, VISION, LANGUAGE, 1)
    assert [c for c in changes if c.startswith(f"{section}.{key}: ") and c.endswith(f" -> {value}")]


def test_the_number_of_ranks_may_change_and_is_not_known_of_an_old_checkpoint(run):
    checkpoint = newest_checkpoint(run[0])
    assert check_same_run(checkpoint, run[1], VISION, LANGUAGE, 4) == ["ranks: 1 -> 4"]
    assert check_same_run(checkpoint.model_copy(update={"ranks": None}), run[1], VISION, LANGUAGE, 4) == []


def test_what_divides_the_batch_is_fixed_where_each_device_has_its_own_mean(run):
    """With `train.loss_reduction: per_device`, micro-batches and ranks affect the result."""
    checkpoint = newest_checkpoint(run[0])
    averaged = checkpoint.config.model_copy(
        update={"train": checkpoint.config.train.model_copy(update={"loss_reduction": "per_device"})}
    )
    smaller = averaged.model_copy(update={"train": averaged.train.model_copy(update={"micro_batch": 1})})
    checkpoint = checkpoint.model_copy(update={"config": averaged})
    assert check_same_run(checkpoint, averaged, VISION, LANGUAGE, 1) == []
    with pytest.raises(ValueError, match=r"train\.micro_batch: \d+ -> 1"):
        check_same_run(checkpoint, smaller, VISION, LANGUAGE, 1)
    with pytest.raises(ValueError, match="ranks: 1 -> 2"):
        check_same_run(checkpoint, averaged, VISION, LANGUAGE, 2)


def test_another_precision_is_resumed_only_where_the_command_states_it(run):
    checkpoint, config = newest_checkpoint(run[0]), run_config(train={"keep_checkpoints": 2}, runtime={"compute": "bfloat16"})
    with pytest.raises(ValueError, match=r"runtime\.compute: float32 -> bfloat16.*state runtime\.compute=bfloat16"):
        check_same_run(checkpoint, config, VISION, LANGUAGE, 1)
    changes = check_same_run(checkpoint, config, VISION, LANGUAGE, 1, ["runtime.compute"])
    assert changes == ["runtime.compute: float32 -> bfloat16"]


def test_a_checkpoint_from_before_ranks_and_fingerprints_were_kept_is_read(run):
    path = run[0] / "checkpoints/step_0000004/state.json"
    state = json.loads(path.read_text())
    for key in ("sha256", "ranks", "fingerprints"):
        del state[key]
    path.write_text(json.dumps({"sha256": state_digest(state)} | state))
    checkpoint = open_checkpoint(path.parent)
    assert (checkpoint.ranks, checkpoint.fingerprints) == (None, {})
    check_same_data(checkpoint, {"store": "1"})


def test_a_run_of_checkpoint_format_1_goes_on(run):
    today = newest_checkpoint(run[0])
    rewrite_as_format_1(today.path)
    former = newest_checkpoint(run[0])
    assert (former.config, former.vision, former.step) == (today.config, today.vision, today.step)
    assert check_same_run(former, run[1], VISION, LANGUAGE, 1) == []
    rows = run[1].train.global_batch
    train = run[1].train.model_copy(update={"global_batch": rows * run[1].data.regions_per_row})  # as in the run's config.yaml
    with pytest.raises(ValueError, match=rf"state train\.global_batch={rows}\b"):
        check_same_run(former, run[1].model_copy(update={"train": train}), VISION, LANGUAGE, 1)
    assert as_bytes(former.tensors("model")) == as_bytes(today.tensors("model"))


@pytest.mark.parametrize(
    "section, key, value",
    [("optimizer", "lr", 0.5), ("train", "steps", 9), ("distill", "alpha", 0.5), ("data", "mix", {"global": 1.0})],
)
def test_what_enters_a_weight_may_not_change(run, section, key, value):
    config = run_config(**{section: {key: value}})
    with pytest.raises(ValueError, match=rf"{section}\.{key}.*--fresh"):
        check_same_run(newest_checkpoint(run[0]), config, VISION, LANGUAGE, 1)


def test_another_architecture_names_the_first_keys_that_differ(run):
    wider = VisionConfig(**{**VISION.model_dump(), "mlp": 48})
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.mlp\.fc1\.weight is \[32, 16\], expected \[48, 16\]"):
        check_same_run(newest_checkpoint(run[0]), run[1], wider, LANGUAGE, 1)
