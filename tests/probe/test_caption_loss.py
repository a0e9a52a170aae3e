"""Caption losses: which regions share a row, which bucket a row gets, what is left out, and what is compared."""
import numpy as np
import pytest

from granvit.checkpoint.run import newest_checkpoint
from granvit.config import Bucket
from granvit.data.chat import load_chat
from granvit.launch import load_engine_class
from granvit.probe.caption_loss import CaptionLosses, caption_losses, plan_rows
from granvit.probe.command import memory_errors, unpaired_losses
from granvit.probe.report import Probe, markdown
from granvit.probe.sample import choose
from granvit.probe.scores import bootstrap, mean

SMALL, LARGE = Bucket(length=50, answers=10), Bucket(length=100, answers=20)


def test_a_row_gets_the_smallest_bucket_that_holds_it_and_the_rest_go_on_in_another():
    questions = np.array([[20, 5], [15, 4], [60, 10], [30, 5], [30, 6], [95, 5], [10, 21], [5, 1]])
    rows = plan_rows(questions, 10, [SMALL, LARGE], together=3)
    # Lengths with the prefix: 45 (with question 2: 105, too long), 100, 45. Question 5 is too long, 6 has too many answer tokens.
    assert rows == [(SMALL, [0, 1]), (LARGE, [2, 3]), (SMALL, [4, 7])]
    assert [row for _, row in plan_rows(questions[:2], 10, [SMALL, LARGE], together=1)] == [[0], [1]]
    assert plan_rows(questions, 100, [SMALL, LARGE], together=3) == []  # the prefix alone is too long


@pytest.fixture(scope="module")
def run(encoders):
    pytest.importorskip("torch")
    checkpoint = newest_checkpoint(encoders / "run")
    return checkpoint, load_chat(checkpoint.config, checkpoint.language)


def with_buckets(checkpoint, *buckets, **data):
    config = checkpoint.config
    return checkpoint.model_copy(update={"config": config.model_copy(update={"data": config.data.model_copy(
        update={"buckets": tuple(buckets), **data})})})  # fmt: skip


def losses(run, sample, *buckets, **data) -> CaptionLosses:
    checkpoint, chat = run
    return caption_losses(with_buckets(checkpoint, *buckets, **data), chat, load_engine_class("torch"), sample, "cpu", "float32",
                          lambda images: None)  # fmt: skip


def test_short_buckets_make_more_rows_and_change_no_loss(run, regions):
    """Two captions of a row have up to 32 tokens: a bucket of 20 answers holds only one of them, a bucket of 16 only some."""
    sample, config = choose(regions, 5, 8, 0), run[0].config
    (long,) = config.data.buckets
    whole = losses(run, sample, long, regions_per_row=3)
    assert whole.questions == len(sample.captions_R) and whole.too_long == whole.unusable == 0
    short = losses(run, sample, Bucket(length=200, answers=20), long.model_copy(update={"answers": 20}), regions_per_row=3)
    assert short.questions == whole.questions and len(short.image_N) > len(whole.image_N)
    by_image = [np.bincount(found.image_N, found.loss_N) for found in (whole, short)]
    np.testing.assert_allclose(*by_image, rtol=1e-5)
    tight = losses(run, sample, long.model_copy(update={"answers": 15}))
    long_captions = np.array([len(caption) + 1 > 15 for caption in sample.captions_R])  # a token is a byte here
    np.testing.assert_array_equal(tight.asked_R, ~long_captions)
    assert tight.too_long == long_captions.sum() > 0
    with pytest.raises(ValueError, match=f"{len(sample.captions_R)} do not fit into its largest bucket .*--no-loss"):
        losses(run, sample, long.model_copy(update={"answers": 3}))


def test_regions_of_images_that_the_run_does_not_accept_are_counted(run, regions):
    sample = choose(regions, 5, 8, 0)
    areas = np.array([np.prod(regions.sizes[image]) for image in sample.images])
    limit = int(np.sort(areas)[2])
    found = losses(run, sample, *run[0].config.data.buckets, max_pixels=limit)
    np.testing.assert_array_equal(found.asked_R, (areas <= limit)[sample.image_R])
    assert found.unusable == (~found.asked_R).sum() > 0


def made(tokenizer: str = "a", asked=(True, True, False)) -> CaptionLosses:
    return CaptionLosses(np.array([0]), np.array([1.0]), np.array([2.0]), np.array(asked), 0, 0, tokenizer)


def test_losses_that_cannot_be_compared_have_no_difference_and_the_report_says_why():
    names = ["start", "same", "words", "regions", "encoder"]
    found = {"start": made(), "same": made(), "words": made("b"), "regions": made(asked=(True, False, True))}
    reasons = unpaired_losses(names, found)
    assert list(reasons) == ["words", "regions"]
    assert "tokenizers" in reasons["words"] and "2 regions have a loss in only one" in reasons["regions"]
    assert unpaired_losses(["encoder", "start"], found) == {"start": "encoder has no loss"}
    score = bootstrap(mean, np.arange(30), np.arange(30.0), seed=0)
    scores = {name: {("loss", "all"): score} for name in found}
    table = markdown(Probe(tuple(found), scores, (), {}, reasons)).splitlines()[2]
    cells = [cell.strip() for cell in table.strip("|").split("|")]
    assert len(cells) == 9 and cells[7:] == ["-", "-"] and cells[6].startswith("+0.0000 [")


def test_out_of_memory_is_one_line_with_the_remedy():
    with pytest.raises(ValueError, match=r"run: features: out of memory \(CUDA out of memory\. Tried\): take --batch 4"), \
            memory_errors("run: features", "take --batch 4"):  # fmt: skip
        raise RuntimeError("CUDA out of memory. Tried\nand more")
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("features", "--batch"):
        raise RuntimeError("shapes do not match")
