"""Pretraining of the demo's start weights, from nothing: `scripts/demo.py pretrain` (hours on 2 cores).

GranViT starts from a pretrained decoder and a pretrained encoder. These are small ones for the demo:
- The decoder learns from text alone (granvit/demo/text_maps.py).
- The encoder learns from whole images and their global captions, through the frozen decoder. It is an image-level encoder, as
  SigLIP is.
Neither is trained on Caption2Bbox, on coordinates of a box as an answer, or on a region question about an image
(tests/demo/test_pretrain.py reads their training rows). The decoder is asked in which rows and columns of a text map an object
is. The tokenizer is trained on the texts of all tasks. Scenes are drawn with the same generator as the demo's, with another seed
and on its training photographs.
"""
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from granvit.checkpoint.run import Checkpoint, newest_checkpoint
from granvit.config import resolve_models
from granvit.data import prompts
from granvit.data.batch import PromptBatch, prompt_batch
from granvit.data.chat import SYSTEM, Chat, load_chat, train_tokenizer
from granvit.data.images import decode, to_views
from granvit.data.prompts import question_text
from granvit.data.records import ImageRecord
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.demo.pair import CARD, SHIPPED, publish_pair, read_sums
from granvit.demo.parts import Parts, Plan
from granvit.demo.scenes import scenes, scenes_version
from granvit.demo.text_maps import GROUND, WHERE, place, text_map, where_turns
from granvit.launch import Framework, load_engine_class
from granvit.models import VisionConfig
from granvit.stages import ANSWER

SCENES = {"train": 60_000, "heldout": 1_000}
SEED = 1000  # of scenes, weights and order; the demo's own seeds are small numbers
TOKENIZER_SCENES = 1_000
SCORED = 200  # held-out scenes
BATCH = 50
ANSWER_TOKENS = 64
# Phrases that become single tokens. A question then has 30 tokens instead of 55, which halves the demo's time.
PHRASES = (
    prompts.BBOX2CAPTION.partition("{box}")[0] + "[0.",
    "]" + prompts.BBOX2CAPTION.partition("{box}")[2],
    prompts.CAPTION2BBOX.partition(" {caption}")[0],
    prompts.GLOBAL,
    "[0.",
    ", 0.",
    WHERE,
    "rows ",
    " to ",
    " columns ",
)


class Pretraining(Parts):
    """Data, both trainings and the published pair in one directory."""

    plan = Plan(
        root=Path("runs/demo-pretrain"),
        after={"data": None, "pretrain_text": "data", "pretrain_image": "pretrain_text", "pair": "pretrain_image"},
        seconds={"data": 140, "pretrain_text": 2300, "pretrain_image": 3600, "pair": 60},
        ranks={"pretrain_text": 2, "pretrain_image": 2},
    )

    def contents(self, part: str) -> str | None:
        known = SCENES, TOKENIZER_SCENES, PHRASES, self.seed, SCORED, scenes_version()
        return repr(known) if part in ("data", "pair") else None

    def make(self, part: str) -> None:
        if part == "data":
            self._make_data()
        elif part == "pair":
            self._make_pair()

    def _make_data(self) -> None:
        for split, count in SCENES.items():
            out = self.root / "data" / split
            shutil.rmtree(out, ignore_errors=True)
            print(f"{split}: {count} scenes into {out}", flush=True)
            write_store(scenes(split, count, self.seed), out)
        store, language = Store(self.root / "data" / "train"), resolve_models(self.config("pretrain_text"))[1]
        texts = [text for record in _records(store, TOKENIZER_SCENES) for text in tokenizer_texts(record)]
        train_tokenizer(texts, language.vocab, language.chat, PHRASES).save(str(self.root / "tokenizer.json"))

    def _make_pair(self) -> None:
        run, out = self.root / "pretrain_image", self.root / "pair"
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None, run
        shutil.rmtree(out, ignore_errors=True)
        publish_pair(run, checkpoint.vision, checkpoint.language, self.root / "tokenizer.json", out)
        scores = held_out_scores(checkpoint, self.framework, Store(self.root / "data" / "heldout"))
        (out / CARD).write_text(self._card(checkpoint, scores))
        print("\n".join(f"{name}: {value:.1f}%" for name, value in scores.items()))
        same = read_sums(out) == read_sums(SHIPPED) if SHIPPED.exists() else False
        print(f"{out}: {'equal to' if same else 'other weights than'} the shipped pair in {SHIPPED}")

    def _card(self, checkpoint: Checkpoint, scores: dict[str, float]) -> str:
        steps = {part: self.config(part).train for part in ("pretrain_text", "pretrain_image")}
        numbers = {part: sum(int(np.prod(array.shape)) for name, array in checkpoint.tensors("model") if name.startswith(part))
                   for part in ("vision", "language")}  # fmt: skip
        what = {
            "pretrain_text": "the decoder, on text maps: captions of boxes, global captions, rows and columns of an object",
            "pretrain_image": "the encoder, on whole images and their global captions, through the frozen decoder",
        }
        lines = [
            "# Start weights of GranViT's demo",
            "",
            f"A small encoder in SigLIP's layout ({numbers['vision']:,} parameters) and a small decoder in Qwen2's layout "
            f"({numbers['language']:,} parameters) with its tokenizer, in bfloat16. `make demo` checks `SHA256SUMS` and starts "
            "from them.",
            "",
            f"Made by `python scripts/demo.py pretrain --framework {self.framework}` (granvit/demo/pretrain.py, seed "
            f"{self.seed}) from {SCENES['train']:,} scenes of granvit/demo/scenes.py on photographs that scikit-image carries. "
            "The held-out scenes use other photographs. On another kind of processor, which rounds differently, the same command "
            "gives other weights (docs/demo.md).",
            "",
            "| Run | Trained | Steps | Rows a step |",
            "|---|---|---|---|",
            *(f"| {part} | {what[part]} | {train.steps} | {train.global_batch} |" for part, train in steps.items()),
            "",
            "Neither was trained on Caption2Bbox, on coordinates of a box as an answer, or on a region question about an image. "
            "The decoder was asked in which rows and columns of a text map an object is. The tokenizer was trained on the texts "
            "of all tasks.",
            "",
            f"| Answers that are right to the letter, {SCORED} held-out scenes | % |",
            "|---|---|",
            *(f"| {name} | {value:.1f} |" for name, value in scores.items()),
            "",
            "The last row uses the projector of that training, which is not shipped: stage 1 starts with a random projector.",
            "",
        ]
        return "\n".join(lines)


def tokenizer_texts(record: ImageRecord) -> list[str]:
    """All texts of the questions and answers about a scene, for the training of the tokenizer."""
    assert record.global_caption is not None, record.id
    found = [f"system\n{SYSTEM}", "user\n", "assistant\n", GROUND, place(0, 1, 2, 3), prompts.GLOBAL, record.global_caption]
    for region in record.regions:
        found.append(WHERE + region.caption)
        for task in ("bbox2caption", "caption2bbox"):
            found.append(prompts.question_text(task, region.box, region.caption))
            found.append(prompts.answer_text(task, region.box, region.caption))
    return found


def held_out_scores(checkpoint: Checkpoint, framework: Framework, store: Store) -> dict[str, float]:
    """Exact match in percent of greedy answers about the first `SCORED` scenes: questions about text maps, and global captions of
    images."""
    config, vision = checkpoint.config, checkpoint.vision
    chat = load_chat(config, checkpoint.language)
    engine = load_engine_class(framework)(config, vision, checkpoint.language, checkpoint.tensors("model"), stage=ANSWER)
    records = _records(store, SCORED)
    blank = np.zeros((3, vision.image_size, vision.image_size), np.uint8)
    asked: dict[str, list[Asked]] = {"text map: caption of a box": [], "text map: rows and columns of an object": [],
                                     "text map: global caption": [], "image: global caption": []}  # fmt: skip
    of_caption, of_where, of_global, of_image = asked.values()
    for record in records:
        cells = text_map(record, chat, vision.grid)
        pixels_3RR = to_views(decode(record.image, config.data.max_pixels), vision)
        of_caption += [Asked(blank, cells, question_text("bbox2caption", r.box), r.caption) for r in record.regions]
        of_where += [Asked(blank, cells, question, answer) for question, answer in where_turns(record, chat, vision.grid)]
        of_global.append(Asked(blank, cells, question_text("global"), str(record.global_caption)))
        of_image.append(Asked(pixels_3RR, None, question_text("global"), str(record.global_caption)))
    scores = {}
    for kind, questions in asked.items():
        print(f"{len(questions)} questions: {kind}", flush=True)
        right = 0
        length = max(prompts_of([question], chat, vision).token_ids_BS.shape[1] for question in questions)
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            answers = engine.generate(prompts_of(batch, chat, vision, length), ANSWER_TOKENS, chat.stop_token)
            right += sum(chat.decode(ids).strip() == q.answer for ids, q in zip(answers, batch, strict=True))
        scores[kind] = 100 * right / len(questions)
    engine.close()
    return scores


class Asked(NamedTuple):
    """A question about an image, or (with `cells`) about a text map, and the right answer."""

    pixels_3RR: np.ndarray
    cells: list[int] | None
    question: str
    answer: str


def prompts_of(questions: Sequence[Asked], chat: Chat, vision: VisionConfig, length: int | None = None) -> PromptBatch:
    """The questions as rows for generation. The tokens of a text map stand at the image positions, where no feature replaces
    them."""
    pixels_B3RR = np.stack([question.pixels_3RR for question in questions])
    prompts = prompt_batch(pixels_B3RR, [question.question for question in questions], chat, vision, length)
    for row, question in enumerate(questions):
        if question.cells is not None:
            prompts.token_ids_BS[row, prompts.image_positions_BN[row]] = question.cells
            prompts.image_positions_BN[row] = -1
    return prompts


def _records(store: Store, count: int) -> list[ImageRecord]:
    found = [record for record in map(store.record, range(count)) if isinstance(record, ImageRecord)]
    assert len(found) == count, store.path
    return found
