"""The counts of mixes against hand-made ones, the files that stages read, and token counts."""
import numpy as np
import pytest

from granvit.config import dump_config, load_config
from granvit.data.gran.config import BuildConfig, MixConfig
from granvit.data.gran.mixes import count_mix, divide, write_mixes
from granvit.data.gran.token_counts import count_tokens, stage_chats
from granvit.data.loader import Loader
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from tests.conftest import random_record
from tests.data.test_loader import run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two stores of a build: natural with 30 images, 90 regions and 30 global captions, ocr with 10, 50 and none."""
    out = tmp_path_factory.mktemp("built")
    write_store([random_record(f"n{i}", 3, i, True) for i in range(30)], out / "natural")
    write_store([random_record(f"o{i}", 5, i, False) for i in range(10)], out / "ocr")
    return out


def counts_of(built, **mix):
    return count_mix(MixConfig(**mix), {name: Store(built / name) for name in ("natural", "ocr")})


def build_config(built, **keys):
    sources = {name: {"store": name, "read": {"format": "folder", "images": "x"}} for name in ("natural", "ocr")}
    return BuildConfig(out=str(built), sources=sources, **keys)


@pytest.mark.parametrize("total, weights, expected", [
    (10, [1, 1, 1], [4, 3, 3]), (7, [90, 50], [5, 2]), (0, [1, 2], [0, 0]), (5, [0, 0], [0, 0]), (140, [90, 50], [90, 50]),
])  # fmt: skip
def test_division_is_in_proportion_with_an_exact_sum(total, weights, expected):
    assert divide(total, weights) == expected


def test_counts_of_each_store_and_of_all(built):
    """All natural regions and 20 of the other store; the paper's stage 1 in small."""
    stage1 = counts_of(built, questions={"bbox2caption": {"natural": "all", "ocr": 20}, "global": "all"})
    assert stage1.counts == {"natural": {"bbox2caption": 90, "global": 30}, "ocr": {"bbox2caption": 20, "global": 0}}
    stage2 = counts_of(built, questions={"caption2bbox": 28, "global": "all"})
    assert stage2.counts == {"natural": {"caption2bbox": 18, "global": 30}, "ocr": {"caption2bbox": 10, "global": 0}}
    assert stage1.missing == stage2.missing == ()


def test_a_mix_is_reduced_in_proportion(built):
    whole = {"bbox2caption": {"natural": "all", "ocr": 20}, "global": "all"}
    for reduced in (counts_of(built, questions=whole, total=14), counts_of(built, questions=whole, fraction=0.1)):
        assert reduced.counts == {"natural": {"bbox2caption": 9, "global": 3}, "ocr": {"bbox2caption": 2, "global": 0}}


def test_what_is_not_there_is_named_and_the_rest_taken(built):
    found = counts_of(built, questions={"bbox2caption": {"ocr": 60}, "global": 31}, total=1000)
    assert found.counts == {"natural": {"bbox2caption": 0, "global": 30}, "ocr": {"bbox2caption": 50, "global": 0}}
    assert found.missing == (
        "31 questions of global, of which there are 30",
        "60 questions of bbox2caption of ocr, which has 50",
        "1,000 questions in all, of which there are 80",
    )


def test_a_store_that_is_not_built_is_named(built):
    found = count_mix(MixConfig(questions={"global": {"natural": 2, "ocr": "all"}}), {"natural": Store(built / "natural")})
    assert found.counts == {"natural": {"global": 2}}
    assert found.missing == ("questions of global of ocr, which is not built here",)


def test_the_file_of_a_mix_gives_a_stage_exactly_its_questions(built, vision, chat):
    mixes = {"small": {"questions": {"bbox2caption": 28, "global": {"natural": 7}}, "draw": 3}}
    write_mixes(build_config(built, mixes=mixes), built)
    sources = load_config("configs/stage1.yaml", [f"data.sources={built / 'mixes' / 'small.yaml'}"]).data.sources
    assert [source.path for source in sources] == [str(built / "natural"), str(built / "ocr")]
    loader = Loader(run(built, data={"sources": [s.model_dump() for s in sources]}, regions_per_row=1), vision, chat, 0, 1)
    rows = np.concatenate([loader.plan.batch(step)[2] for step in range(loader.plan.epoch_steps(0))])
    assert (rows >= 0).sum() == 28 + 7


def test_a_mix_of_an_unknown_store_is_refused(built):
    with pytest.raises(ValueError, match=r"mixes.m: no source goes into the store 'orc'; there are natural, ocr"):
        build_config(built, mixes={"m": {"questions": {"global": {"orc": 3}}}})
    with pytest.raises(ValueError, match="total and fraction both reduce the mix"):
        MixConfig(questions={}, total=3, fraction=0.5)


def test_tokens_are_counted_for_the_stages_whose_tokenizer_is_there(built, tmp_path, caplog):
    (tmp_path / "stage1.yaml").write_text(dump_config(run(built)))
    chats = stage_chats(["configs/stage1.yaml", str(tmp_path / "stage1.yaml")])
    assert len(chats) == 1 and "configs/stage1.yaml: the tokens are not counted" in caplog.text
    count_tokens(chats, [built / "natural"])
    [answers] = (built / "natural" / "lengths").glob("*-answer.u2")
    made = answers.stat().st_mtime_ns
    count_tokens(chats, [built / "natural"])
    assert answers.stat().st_mtime_ns == made and answers.stat().st_size == 2 * 120
