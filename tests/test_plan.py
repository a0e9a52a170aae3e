"""The planned cost of a stage against numbers of an independent analysis, formulas written a second time, and the sampler."""
import json
import math
from collections import Counter

import numpy as np
import pytest

from granvit import plan as planning
from granvit.config import CONFIGS, Source, language_config, load_config, resolve_models, vision_config
from granvit.cost import attention_macs, forward_flops, language_macs, projector_macs, training_flops, vision_macs
from granvit.data.sampler import Plan as Sampler
from granvit.memory import predicted_memory
from granvit.models import language_shapes, projector_shapes, vision_shapes
from granvit.plan import Images, Plan, decoders, main, paper_images, row_classes, store_images, table_9
from tests.helpers import run_config

TERA = 1e12
B3 = 128 * 294.91e12 * 0.4  # FLOP/s of 128 910B3 at 40% of their peak


def plan_of(name: str, *overrides: str) -> Plan:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return Plan(config, *resolve_models(config), paper_images(config.stage_spec.mix))


def matrices(shapes: dict, *parts: str) -> int:
    """Weights of the matrices whose name contains one of `parts`: each is multiplied once with every token."""
    return sum(math.prod(s) for name, s in shapes.items() if len(s) > 1 and any(part in name for part in parts))


@pytest.mark.parametrize(
    "name, tera_macs",
    [
        ("siglip2-so400m-patch16-512", 0.487),
        ("clip-vit-large-patch14-336", 0.191),
        ("siglip-so400m-patch14-384", 0.333),
        ("internvit-300m-448", 0.362),
        ("aimv2-huge-patch14-448", 0.774),
    ],
)
def test_encoders_cost_what_an_analysis_found(name, tera_macs):
    whole = vision_config(name).with_all_blocks
    assert vision_macs(whole) / TERA == pytest.approx(tera_macs, abs=0.0005)
    shapes, tokens = vision_shapes(whole), whole.patches + whole.class_token
    attention = whole.layers * whole.heads * 2 * tokens**2 * whole.head_dim
    once = tokens * matrices(shapes, ".layers.") + whole.patches * matrices(shapes, "patch_embedding")
    assert vision_macs(whole) == once + attention


def test_the_default_encoder_uses_26_of_its_27_blocks():
    assert vision_macs(vision_config("siglip2-so400m-patch16-512")) / TERA == pytest.approx(0.469, abs=0.0005)


@pytest.mark.parametrize("name", decoders())
def test_decoders_cost_their_matrices_and_attention(name):
    c, length, logits = language_config(name), 77, 5
    shapes, attention = language_shapes(c), c.layers * c.heads * 2 * length**2 * c.head_dim
    assert attention_macs(c, length) == attention
    assert language_macs(c, length, logits) == length * matrices(shapes, ".layers.") + attention + logits * c.vocab * c.width
    vision = vision_config("clip-vit-large-patch14-336")
    assert projector_macs(vision, c) == 576 * matrices(projector_shapes(vision, c), "projector")


def test_every_decoder_of_the_configurations_is_planned():
    assert decoders() == ["llama-3-8b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"]


@pytest.mark.parametrize(
    "name, task, tokens, tera_flops",
    [
        ("stage1", "bbox2caption", 1114, 11.44),
        ("stage1", "global", 1224, 11.28),
        ("stage2", "caption2bbox", 1099, 11.80),
        ("stage2", "global", 1224, 13.11),
    ],
)
def test_a_sample_costs_what_an_analysis_found(name, task, tokens, tera_flops):
    length, forward, training = plan_of(name).sample(task)
    assert length == tokens
    assert sum(training.values()) / TERA == pytest.approx(tera_flops, abs=0.006)
    assert forward["teacher"] == (forward["vision"] if task == "bbox2caption" else 0)


@pytest.mark.parametrize("name, flops, hours", [("stage1", 1.76e21, 32.3), ("stage2", 5.97e20, 11.0)])
def test_an_epoch_takes_what_an_analysis_found(name, flops, hours):
    plan = plan_of(name)
    assert plan.epoch_in_full == pytest.approx(flops, rel=0.003)
    assert plan.epoch_in_full / B3 / 3600 == pytest.approx(hours, abs=0.06)


def test_questions_are_the_papers():
    assert plan_of("stage1").questions == pytest.approx({"global": 23.9e6, "bbox2caption": 130e6})
    assert plan_of("stage2").questions == pytest.approx({"global": 23.9e6, "caption2bbox": 24e6})
    half = plan_of("stage1", "data.mix.global=0.5").questions
    assert half == pytest.approx({"global": 11.95e6, "bbox2caption": 130e6})
    assert sum(plan_of("stage1").rows.values()) == pytest.approx(153.9e6)


def test_table_9_is_the_papers_within_2_percent():
    for line, (flops, macs) in table_9().items():
        stated_flops, stated_macs = planning.TABLE_9[line]
        assert flops / TERA == pytest.approx(stated_flops, rel=0.02) and macs / TERA == pytest.approx(stated_macs, rel=0.002)


@pytest.mark.parametrize(
    "trains, passes, attention",  # passes of encoder, projector, decoder; those of the decoder's attention
    [
        ({"vision", "projector"}, (3, 3, 2), 3),
        ({"vision"}, (3, 2, 2), 3),
        ({"projector", "language"}, (1, 3, 3), 3),
        ({"language"}, (1, 1, 3), 3),
        ({"vision", "projector", "language"}, (3, 3, 3), 3),
    ],
)
def test_passes_follow_where_gradients_go(trains, passes, attention):
    vision, language = vision_config("tiny-vision"), language_config("tiny-language")
    S, A, crops = 40, 7, 2
    alone = attention_macs(language, S)
    cost = training_flops(vision, language, trains, S, A, crops, 2 * vision.patch_size)
    assert cost["vision"] == 2 * passes[0] * vision_macs(vision)
    assert cost["projector"] == 2 * passes[1] * projector_macs(vision, language)
    assert cost["language"] == 2 * (passes[2] * (language_macs(language, S, A) - alone) + attention * alone)
    assert cost["teacher"] == 2 * crops * vision_macs(vision, 2 * vision.patch_size)
    again = training_flops(vision, language, trains, S, A, crops, 2 * vision.patch_size, recompute=True)
    assert again["vision"] - cost["vision"] == 2 * vision_macs(vision) * ("vision" in trains)
    assert again["language"] - cost["language"] == 2 * language_macs(language, S, 0)
    assert (again["projector"], again["teacher"]) == (cost["projector"], cost["teacher"])


def test_tiles_are_views_of_one_image():
    vision, language = vision_config("tiny-vision").model_copy(update={"tiles": 3}), language_config("tiny-language")
    cost = forward_flops(vision, language, 40, 7)
    assert cost["vision"] == 4 * 2 * vision_macs(vision) and cost["teacher"] == 0
    assert cost["projector"] == 2 * vision.patches * matrices(projector_shapes(vision, language), "projector")


def test_as_run_are_buckets_built_blocks_and_crops_in_every_row():
    plan = plan_of("stage1_packed")
    vision, language = plan.vision, plan.language
    bucket = plan.bucket((3, 1))
    assert (plan.tokens((3, 1)), bucket.length, bucket.answers) == (1024 + 20 + 3 * 70 + 180, 1536, 384)
    once = 2 * language_macs(language, 1536, 384) + attention_macs(language, 1536) + 3 * projector_macs(vision, language)
    assert plan.as_run((3, 1)) == 2 * (once + (3 + 4) * vision_macs(vision))
    assert plan.in_full((3, 1)) > 2 * (3 + 3) * vision_macs(vision.with_all_blocks)


def test_packed_is_cheaper_by_what_is_not_computed_again():
    """The factor, from a sample by itself and from rows counted one by one for whole images."""
    packed, separate = plan_of("stage1_packed"), plan_of("stage1")
    assert packed.questions == pytest.approx(separate.questions)
    factor = packed.unpacked().epoch_in_full / packed.epoch_in_full
    assert factor == pytest.approx(separate.epoch_in_full / packed.epoch_in_full)
    assert factor == pytest.approx(2.89, abs=0.005)
    vision, language = packed.vision.with_all_blocks, packed.language

    def row(regions: int, captions: int) -> float:
        S = 1044 + 70 * regions + 180 * captions
        decoder = 2 * language_macs(language, S, S) + attention_macs(language, S)
        return 2 * ((3 + regions) * vision_macs(vision) + 3 * projector_macs(vision, language) + decoder)

    image = [Images(np.eye(10)[9], {"global": 1.0, "bbox2caption": 1.0})]  # nine regions and a caption: rows of 4 + 1, 4, 1
    one = Plan(packed.config, packed.vision, language, image)
    assert one.epoch_in_full == pytest.approx(row(4, 1) + row(4, 0) + row(1, 0))
    assert one.unpacked().epoch_in_full == pytest.approx(9 * row(1, 0) + row(0, 1))


@pytest.mark.parametrize("per_row", [1, 3, 4])
@pytest.mark.parametrize("mix", [{"global": 1.0, "bbox2caption": 1.0}, {"bbox2caption": 1.0, "caption2bbox": 1.0}])
def test_rows_are_those_of_the_sampler(store, per_row, mix):
    sampler = Sampler([store], [], [Source(path=str(store.path))], mix, per_row, 1, [], [], 0)
    contents = sampler.contents(0, np.arange(sampler.epoch_steps(0)))
    expected = Counter((sum(q.region is not None for q in asked), sum(q.region is None for q in asked)) for *_, asked in contents)
    config = run_config(data={"sources": [{"path": str(store.path)}], "mix": mix})
    rows = row_classes(store_images(config), per_row)
    assert rows == pytest.approx(dict(expected))


def test_exact_counts_are_planned(store):
    counts = {"global": 5, "bbox2caption": 40}
    source = {"path": str(store.path), "count": counts}
    sampler = Sampler([store], [], [Source(**source)], dict.fromkeys(counts, 1), 1, 1, [], [], 0)
    config = run_config(data={"sources": [source], "mix": dict.fromkeys(counts, 1)})
    rows = row_classes(store_images(config), 1)
    assert sum(rows.values()) == pytest.approx(45) and sampler.epoch_steps(0) == 45


def test_shares_thin_the_questions_of_an_image():
    source = Images(np.array([2.0, 0, 0, 10]), {"caption2bbox": 0.25})
    np.testing.assert_allclose(source.with_region_questions(), 10 * np.array([27, 27, 9, 1]) / 64 + [2, 0, 0, 0])
    rows = row_classes([source], 2)
    assert rows == pytest.approx({(1, 0): 10 * (27 + 1) / 64, (2, 0): 10 * (9 + 1) / 64})
    assert source.questions == {"caption2bbox": 7.5}


@pytest.mark.parametrize(
    "name, framework, state, peak, shrunk_peak",  # GB, from docs/memory.md
    [("stage1", "mindspore", 11.1, 23.0, 12.7), ("stage1", "torch", 11.1, 21.3, 11.5), ("stage2", "torch", 25.6, 41.4, 27.5)],
)
def test_memory_is_that_of_the_documentation(name, framework, state, peak, shrunk_peak):
    plan = plan_of(name)
    found = predicted_memory(plan.config, plan.vision, plan.language, framework)
    assert [round(size / 1e9, 1) for size in found] == [state, peak]
    shrunk = plan_of(name, "runtime.recompute=true", "train.micro_batch=1")
    found = predicted_memory(shrunk.config, plan.vision, plan.language, framework)[1]  # MindSpore's is that of the update
    assert found / 1e9 == pytest.approx(shrunk_peak, abs=0.06)


def test_the_command_prints_and_writes_the_numbers(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["--config", str(CONFIGS / "stage1.yaml"), "--json", str(out), "runtime.recompute=true"]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for number in ("11.44", "11.28", "32.3 h", "3.237", "4.25 (-1.8%)", "the paper's numbers", "recomputation on", "26 encoder"):
        assert number in text, number
    assert found["questions_from"] == "paper" and found["unpacked_over_packed"] == 1
    assert found["samples"]["bbox2caption"]["total"] / TERA == pytest.approx(11.44, abs=0.006)
    totals = found["decoders"]["qwen2.5-1.5b"]
    assert totals["in_full_seconds"] * B3 == pytest.approx(totals["in_full_flops"])
    assert totals["in_full_questions_per_second"] == pytest.approx(153.9e6 / totals["in_full_seconds"])
    assert set(found["decoders"]) == set(decoders())


def test_questions_are_counted_in_stores_that_are_there(store, tmp_path, capsys):
    out = tmp_path / "plan.json"
    sources = f"data.sources=[{{path: {store.path}, rate: 0.5}}]"
    assert main(["--config", str(CONFIGS / "stage1_packed.yaml"), "--json", str(out), sources]) == 0
    found = json.loads(out.read_text())
    assert found["questions_from"] == "stores"
    assert found["questions"] == pytest.approx({"global": store.globals, "bbox2caption": store.regions / 2})
    text = capsys.readouterr().out
    assert "counted in the stores" in text and "one question a row" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "910b3"], "--device '910b3' is unknown; did you mean '910B3'"),
        (["--device", "H20"], "did you mean 'H200'"),
        (["--device", "abacus"], "known: 910B1"),
        (["--mfu", "40"], "--mfu 40"),
        (["--count", "0"], "--count 0"),
        (["--count", "100"], "train.micro_batch"),
        (["trian.micro_batch=1"], "'trian'; did you mean 'train'"),
        (["model.language=qwen2.5-2b"], "did you mean 'qwen2.5-"),
        (["stage=sft", "data.mix=null"], "'sft'"),
        (["data.mix.conversation=1"], "conversation"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, capsys):
    assert main(["--config", str(CONFIGS / "stage1.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_store_of_conversations_is_refused(chat_store, capsys):
    assert main(["--config", str(CONFIGS / "stage1.yaml"), f"data.sources=[{{path: {chat_store.path}}}]"]) == 2
    assert str(chat_store.path) in capsys.readouterr().err
