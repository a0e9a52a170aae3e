"""Exports a run for transformers: its encoder as a vision model, or the whole as LLaVA, with all files that loading needs.

    python scripts/export_hf.py RUN DST --as encoder|llava [--top start|blank] [--start-weights DIR] [--license ID] ...

RUN is a run's directory (its newest checkpoint) or one checkpoint (RUN/checkpoints/step_0001000); it is never written to. DST
must not exist. Beside the weights lie config.json, preprocessor_config.json and a model card, README.md; for LLaVA also the
tokenizer, the processor, the chat template and generation_config.json.

The projector usually reads the last block but one, and a run builds nothing above that, but a vision model of transformers has
all blocks and a closing norm. --top says what they are: `start` takes them from the weights that the run started from (SigLIP's
pooling head too), `blank` fills them with what passes its input on and leaves the head out. Both leave the features as they
are; which of the hidden states these are is in config.json under `granvit` and in the card. LLaVA reads nothing above the
features: there it is always blank.

A LLaVA of a run whose projector reads the level `final` is refused without --for-transformers-4: transformers 5 and vLLM read
that hidden state before the closing norm, and answer otherwise without an error. Other levels, and encoders, are read alike.

Exit status: 0 done, 2 refused (DST is not created).
"""
import argparse
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from granvit.checkpoint.card import Exported, model_card, short_path
from granvit.checkpoint.contents import EMBEDDING, HEAD, RESAMPLE, open_contents, read_contents
from granvit.checkpoint.convert import Bar, Plan, ProgressCallback, Report, lines, make_plan, write_plan
from granvit.checkpoint.detect import detect
from granvit.checkpoint.history import PastRun, history
from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.aimv2 import AIMV2
from granvit.checkpoint.layouts.clip import CLIP
from granvit.checkpoint.layouts.internvit import INTERNVIT
from granvit.checkpoint.layouts.llava import FINAL_DIFFERS, LEVELS, LLAVA
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import Checkpoint, open_checkpoint
from granvit.checkpoint.source import Source, open_source
from granvit.checkpoint.tensors import StoredTensors, set_digest, shape_differences, write_synced
from granvit.data.chat import SYSTEM, TEMPLATES, Chat, load_chat
from granvit.data.prompts import BBOX2CAPTION, CAPTION2BBOX, GLOBAL
from granvit.models import PARTS, Shapes, VisionConfig, parameter_shapes, part_of, vision_shapes
from granvit.stages import Task

EXAMPLES = """examples:
  python scripts/export_hf.py runs/stage1 granvit-encoder --as encoder --top start
  python scripts/export_hf.py runs/stage1 granvit-encoder --as encoder --top start --start-weights weights/siglip2
  python scripts/export_hf.py runs/stage2/checkpoints/step_0001000 granvit --as llava --license cc-by-4.0
  python scripts/export_hf.py runs/stage2 granvit --as llava --base-model google/siglip2-so400m-patch16-512 \\
      --base-model Qwen/Qwen2.5-1.5B-Instruct"""
IMAGE_TOKEN = "<image>"
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")  # Llama 3: tokens whose rows nothing uses
POOLING = re.compile(r"(?:vision_model\.)?(head\..*)")  # SigLIP's pooling head in a publisher's file
QUESTIONS: dict[Task, str] = {"global": GLOBAL, "bbox2caption": BBOX2CAPTION, "caption2bbox": CAPTION2BBOX}
LOAD_ENCODER = """\
# picture: a PIL image
from transformers import AutoImageProcessor, AutoModel
processor, model = (auto.from_pretrained("path/to/this/folder") for auto in (AutoImageProcessor, AutoModel))
features = model(**processor(picture, return_tensors="pt"){options}).{features}"""
LOAD_LLAVA = """\
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained("path/to/this/folder")
model = LlavaForConditionalGeneration.from_pretrained("path/to/this/folder")

# picture: a PIL image; question: text as below
turn = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([turn], **options)
answer = processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)"""
Kind = Literal["encoder", "llava"]
Top = Literal["start", "blank"]
Members = dict[str, tuple[StoredTensors, str]]  # name -> the set that holds it, its name there


@dataclass(frozen=True)
class Tower:
    """A vision model of transformers: its layout, its class, and which of its hidden states is which of our levels.

    `final` is read as `last_hidden_state`: that is behind the closing norm in every version, `hidden_states[-1]` in 4.57 alone.
    `last_alone`: transformers 4.57 hands out its last hidden state and no other. Without a closing norm, that is the features
    where blank blocks pass them on.
    """

    layout: Layout
    loader: str
    states: dict[int, str]
    last_alone: bool = False


TOWERS = (
    Tower(SIGLIP, "SiglipVisionModel", LEVELS["siglip_vision_model"]),
    Tower(CLIP, "CLIPVisionModel", LEVELS["clip_vision_model"]),
    Tower(AIMV2, "Aimv2VisionModel", {-2: "penultimate", -1: "final"}),
    Tower(INTERNVIT, "InternVLVisionModel", {-2: "penultimate", -1: "last"}, last_alone=True),
)


class Composed(StoredTensors):
    """Tensors out of several sets; those in `rows` have zeros appended until they are that many rows long."""

    def __init__(self, members: Members, rows: dict[str, int]):
        self.members, self.rows = members, rows
        self.dtypes = {tag: dtype for tensors, _ in members.values() for tag, dtype in tensors.dtypes.items()}
        self.entries = {name: dict(tensors.entries[stored]) for name, (tensors, stored) in members.items()}
        for name, length in rows.items():
            self.entries[name]["shape"] = (length, *self.entries[name]["shape"][1:])

    def read(self, name: str) -> np.ndarray:
        tensors, stored = self.members[name]
        array = tensors.read(stored)
        if name not in self.rows:
            return array
        grown = np.zeros(self.entries[name]["shape"], array.dtype)
        grown[: len(array)] = array
        return grown


@dataclass
class Work:
    """One export on its way: the checkpoint, the runs behind it, what is read (with what was added to it), and what is said of
    it: `record` in config.json under `granvit`, `remarks` in the card, `notes` by the command."""

    checkpoint: Checkpoint
    runs: list[PastRun]
    missing_origin: str | None
    source: Source
    pooling: Members = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def vision(self) -> VisionConfig:
        assert self.source.vision is not None  # a run's source states its model
        return self.source.vision

    def add(self, members: Members, rows: dict[str, int]) -> None:
        """Lays further tensors, and longer ones, over what is read."""
        own = self.source.tensors
        self.source.tensors = Composed({name: (own, name) for name in own.entries} | members, rows)


def tower_of(vision: VisionConfig) -> Tower:
    """The vision model of transformers that is built like this encoder; `ValueError` where there is none."""
    reasons = []
    for tower in TOWERS:
        try:
            tower.layout.write_config(vision, None)
            return tower
        except ValueError as error:
            reasons.append(f"{tower.loader}: {error}")
    raise ValueError(f"encoder {vision.name!r} is built like no vision model known here ({'; '.join(reasons)})")


def export(
    run: Path,
    destination: Path,
    kind: Kind,
    top: Top | None = None,
    start_weights: Path | None = None,
    license_id: str | None = None,
    base_models: Sequence[str] = (),
    for_transformers_4: bool = False,
    progress: ProgressCallback = lambda what, done, total: None,
) -> Report:
    """Exports the run's newest checkpoint, or the checkpoint, at `run` to the directory `destination`.

    `top` is what becomes of the encoder's blocks above its level (encoder alone), `start_weights` where the weights lie that the
    first run started from (default: where its configuration says). `license_id` and `base_models` go into the card's front
    matter. `for_transformers_4` lets a LLaVA be written that other readers misread (`FINAL_DIFFERS`). `ValueError` says in one
    line what is wrong and leaves no destination behind; `OSError` is the disk's.
    """
    run, destination, began = Path(run), Path(destination), time.perf_counter()
    if os.path.lexists(destination):
        raise ValueError(f"{destination}: exists already; remove it or choose another name")
    if destination.suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"{destination}: an export is a directory, not a {destination.suffix} file")
    if kind == "llava" and top is not None:
        raise ValueError("--top belongs to --as encoder: LLaVA reads nothing above the features")
    if start_weights is not None and top != "start":
        raise ValueError("--start-weights belongs to --top start")
    if kind == "encoder" and for_transformers_4:
        raise ValueError("--for-transformers-4 belongs to --as llava: an encoder is read alike by every version")
    work = _open(run)
    tower = tower_of(work.vision)
    target = tower.layout if kind == "encoder" else LLAVA
    report = Report(work.source.path, destination, "default", target.name)
    if kind == "encoder":
        plan, card, texts = _encoder(work, tower, top, start_weights, report)
    else:
        plan, card, texts = _llava(work, tower, for_transformers_4, report)
    texts["preprocessor_config.json"] = _json(preprocessor_config(work.vision))
    exported = Exported(
        title=f"{destination.name}: {'the vision encoder of a' if kind == 'encoder' else 'a'} GranViT",
        remarks=work.remarks,
        license=license_id,
        base_models=base_models,
        **card,
    )
    shapes = parameter_shapes(work.checkpoint.vision, work.checkpoint.language)
    texts["README.md"] = model_card(exported, work.runs, work.missing_origin, shapes)

    def accompany(folder: Path) -> None:
        for name, text in texts.items():
            write_synced(folder / name, text)

    write_plan(work.source, plan, target, destination, True, report, progress, accompany)
    report.seconds = time.perf_counter() - began
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def _open(run: Path) -> Work:
    """The checkpoint and what led to it; `ValueError` where there is none, or its model does not see the image."""
    source = open_source(run)
    if source.vision is None:
        raise ValueError(f"{run}: not a run's directory, nor one of its checkpoints (parity/convert.py converts other files)")
    checkpoint = open_checkpoint(source.path)
    stage = checkpoint.config.stage_spec
    if stage.zero_image_tokens:
        raise ValueError(f"{source.path}: stage {stage.name!r} trains a decoder that never sees the image: no GranViT to export")
    runs, missing_origin = history(checkpoint)
    work = Work(checkpoint, runs, missing_origin, source)
    work.record = {
        "stage": stage.name,
        "step": checkpoint.step,
        "parts": {name: part.hash for name, part in checkpoint.parts.items()},
    }
    if missing_origin is not None:
        work.notes.append(f"no checkpoint in {missing_origin} (model.init_from): the card begins with the run after it")
    return work


def _plan(work: Work, target: Layout, report: Report) -> Plan:
    """The conversion's plan for what is read now, with `work.record` in its config.json to be completed."""
    contents = read_contents(work.source, *detect(work.source, None))
    plan = make_plan(work.source, contents, target, report)
    report.notes = work.notes  # the conversion's own speak of what is settled here
    assert plan.config is not None  # a run's source states its model
    plan.config["granvit"] = plan.config.get("granvit", {}) | work.record
    return plan


def _encoder(
    work: Work, tower: Tower, top: Top | None, start_weights: Path | None, report: Report
) -> tuple[Plan, dict[str, Any], dict[str, str]]:
    """The plan of the encoder's files, the card's words, and no further text."""
    built, path = work.vision, work.checkpoint.path
    state = next((index for index, level in tower.states.items() if level == built.level), None)
    if state is None:
        shown_levels = ", ".join(tower.states.values())
        raise ValueError(f"{path}: its projector reads the level {built.level!r}; {tower.loader} shows {shown_levels} alone")
    above = _above(built)
    if above and top is None:
        raise ValueError(
            f"{path}: the run built {built.built_layers} of {built.layers} blocks and no more, {tower.loader} has all; --top "
            f"start takes the rest from the weights that the run started from, --top blank fills it with what passes its input on"
        )
    if tower.last_alone and state != -1 and not (above and top == "blank"):
        remedy = "with --top blank that is the features" if above else "this run has trained blocks above the features"
        raise ValueError(
            f"{path}: its projector reads hidden_states[{state}], and {tower.loader} hands out the last alone; {remedy}"
        )
    last_alone = tower.last_alone or built.level == "final"
    shown_as = "last_hidden_state" if last_alone else f"hidden_states[{state}]"
    features = shown_as + ("[:, 1:]" if built.class_token else "")
    work.record |= {"features": features, "top": {"from": top if above else "trained"}}
    start = _find_start(work, start_weights) if top == "start" else None
    if start is not None:
        _take_top(work, tower, start, above)
        taken = [tower.layout.spellings[0].foreign(name) for name in above]
        work.record["top"] |= {"weights": short_path(start), "tensors": taken}
    plan = _plan(work, tower.layout, report)
    assert plan.config is not None
    if work.pooling:
        work.add(work.pooling, {})
        plan.names |= {f"vision_model.{name}": [name] for name in work.pooling}
        plan.shapes |= {f"vision_model.{name}": work.source.tensors.shapes[name] for name in work.pooling}
        plan.config["vision_use_head"] = True
    if tower.layout is SIGLIP:
        plan.config["granvit"]["pooling_head"] = "start" if work.pooling else "left out"
    without_class = ", the class token left out" if built.class_token else ""
    work.remarks += [
        f"The features are `{features}`, what projector and decoder were trained to read: {built.patches} patches row by "
        f"row{without_class}.",
        *_about_top(work, tower, above, start),
        _about_pixels(built),
    ]
    about = (
        f"The vision encoder of a GranViT run as `{tower.loader}`: {built.image_size} x {built.image_size} pixels, patches of "
        f"{built.patch_size}, width {built.width}, {built.layers} blocks. GranViT trains an encoder to see regions: from its "
        f"features a language model says what is inside a box. Projector and decoder, through which it was trained, are not in "
        f"this folder."
    )
    load = LOAD_ENCODER.format(features=features, options="" if last_alone else ", output_hidden_states=True")
    return plan, {"about": about, "loading": load, "parts": ("vision",), "pipeline": "image-feature-extraction"}, {}


def _above(vision: VisionConfig) -> Shapes:
    """What the whole tower has above the blocks that a run built."""
    built = vision_shapes(vision)
    return {name: shape for name, shape in vision_shapes(vision.with_all_blocks).items() if name not in built}


def _find_start(work: Work, given: Path | None) -> Path:
    """The publisher's directory that the first run started from; `ValueError` says where it was looked for."""
    first = work.runs[0].checkpoint
    instead = "name the directory with --start-weights DIR, or use --top blank"
    if given is None and work.missing_origin is not None:
        raise ValueError(
            f"--top start: the first run's configuration names the start weights, but {work.missing_origin} (model.init_from of "
            f"{first.path}) is not there; {instead}"
        )
    if work.missing_origin is None and first.config.model.init == "random":
        raise ValueError(f"--top start: {first.path} started from random weights (model.init): none to take; use --top blank")
    path = given or Path(first.config.model.weights_vision)
    if not path.is_dir():
        key = "--start-weights" if given else f"model.weights_vision of {first.path}"
        raise ValueError(
            f"--top start: no directory {path} ({key}, looked for in {Path.cwd()}); the start weights' config.json and "
            f"safetensors files belong there; {instead}"
        )
    return path


def _take_top(work: Work, tower: Tower, path: Path, above: Shapes) -> None:
    """Adds the start weights' blocks above the level, closing norm and pooling head to what is read.

    `ValueError` where they are of another architecture, or not the weights that the first run started from.
    """
    start, _, contents = open_contents(path)
    found = {name: start.tensors.shapes[foreign] for name, foreign in contents.names.items() if part_of(name) == "vision"}
    wrong = shape_differences(found, vision_shapes(work.vision.with_all_blocks))
    if wrong:
        raise ValueError(f"{path} does not hold a whole {work.vision.name}: " + "; ".join(wrong))
    if work.missing_origin is None:
        first = work.runs[0].checkpoint
        digest = set_digest({name: start.tensors.digest(contents.names[name]) for name in vision_shapes(first.vision)})
        if digest != first.parts["vision"].start:
            raise ValueError(
                f"{path}: not the weights that {first.path} started from (hash {digest[:16]}, there "
                f"{first.parts['vision'].start[:16]})"
            )
    else:
        work.notes.append(f"whether the first run started from {path} could not be checked: {work.missing_origin} is not there")
    work.add({name: (start.tensors, contents.names[name]) for name in above}, {})
    work.source.vision = work.vision.with_all_blocks
    if tower.layout is SIGLIP:
        work.pooling = {m[1]: (start.tensors, name) for name in contents.left_out if (m := POOLING.fullmatch(name))}


def _about_top(work: Work, tower: Tower, above: Shapes, start: Path | None) -> list[str]:
    """The card's words on what is above the features."""
    blocks = work.vision.layers - work.checkpoint.vision.built_layers
    sentences = []
    if above:
        which = f"The last of {work.vision.layers} blocks and the closing norm" if blocks else "The closing norm's weights"
        if start is not None:
            how = f"those of the start weights, `{short_path(start)}`, and were not trained with what is below them"
        else:
            how = "zeros and norms of one, which pass their input on: above the features there is nothing more to read"
        sentences.append(f"{which}, which the training left out, are {how}.")
    if tower.layout is SIGLIP:
        head = "is that of the start weights, untrained" if work.pooling else "is left out: there is no `pooler_output`"
        sentences.append(f"SigLIP's pooling head {head}.")
    return sentences


def _about_pixels(vision: VisionConfig) -> str:
    return (
        f"A picture is padded to a centred square with the mean colour and then resized to {vision.image_size} pixels "
        f"({vision.resize}): `LlavaImageProcessor`, with `use_fast=False` where that is not the default. All of this was checked "
        f"with transformers 4.57."
    )


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json: `granvit.data.images.to_square` and the encoder's normalisation in transformers' words."""
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": side,
        "resample": next(number for number, name in RESAMPLE.items() if name == vision.resize),
        "do_center_crop": False,
        "crop_size": side,  # read all the same, for the number of tokens
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


def _llava(work: Work, tower: Tower, for_transformers_4: bool, report: Report) -> tuple[Plan, dict[str, Any], dict[str, str]]:
    """The plan of LLaVA's files, the card's words, and the texts of the processor and the tokenizer.

    `ValueError` for the level `final`, unless the LLaVA is stated to be for transformers 4.57.
    """
    vision, language, config = work.vision, work.source.language, work.checkpoint.config
    assert language is not None  # a run's source states its model
    if vision.level == "final":
        if not for_transformers_4:
            raise ValueError(
                f"{work.source.path}: {FINAL_DIFFERS}. --for-transformers-4 writes it all the same; --as encoder is read alike"
            )
        work.notes.append(f"load it with transformers 4.57 alone: {FINAL_DIFFERS}")
        work.remarks.append(f"**Load it with transformers 4.57 alone**: {FINAL_DIFFERS}.")
    chat = load_chat(config, language)
    tokenizer, image_token, image_id, about_image_token = _image_token(chat, language.vocab)
    appended = list(range(language.vocab, image_id + 1))
    if appended:
        work.source.language = language.model_copy(update={"vocab": image_id + 1})
        tables = [name for name in (EMBEDDING, HEAD) if name in work.source.tensors.entries]
        work.add({}, dict.fromkeys(tables, image_id + 1))
    work.record["top"] = {"from": "blank" if _above(vision) else "trained"}
    plan = _plan(work, LLAVA, report)
    assert plan.config is not None
    plan.config["image_token_index"] = image_id
    template = TEMPLATES[chat.family]
    texts = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": _json({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "eos_token": template.end,
            "pad_token": template.pad,
            "extra_special_tokens": {"image_token": image_token},
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
        }),
        "processor_config.json": _json({
            "processor_class": "LlavaProcessor",
            "image_token": image_token,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(vision.class_token),
            "vision_feature_select_strategy": plan.config["vision_feature_select_strategy"],
        }),
        "chat_template.jinja": chat.jinja(image_token),
        "generation_config.json": _json({
            "do_sample": False,
            "eos_token_id": chat.stop_token,
            "pad_token_id": chat.pad_token,
            "max_new_tokens": config.eval.max_new_tokens,
            **({"suppress_tokens": appended} if appended else {}),
        }),
    }  # fmt: skip
    blank = "blocks and the closing norm above it, which nothing reads, are zeros and norms of one"
    mixes = [run.checkpoint.config.stage_spec.mix for run in work.runs]
    questions = [f"`{question}`" for task, question in QUESTIONS.items() if any(mix.get(task) for mix in mixes)]
    work.remarks += [
        f"Ask one question about one picture, in the words of the training: {', '.join(questions)}. "
        f"Boxes are `[x1, y1, x2, y2]`, divided by the picture's own width and height, with three decimals.",
        f"The chat template is that of the training (`{chat.family}`), its system message `{SYSTEM}` included.",
        about_image_token,
        f"The projector reads `hidden_states[{plan.config['vision_feature_layer']}]`" + (f"; {blank}." if plan.fillers else "."),
        _about_pixels(vision),
    ]
    about = (
        f"A GranViT run as `LlavaForConditionalGeneration`: an encoder built like `{tower.loader}` ({vision.image_size} x "
        f"{vision.image_size} pixels, {vision.patches} tokens), a projector of two layers, and a decoder (`{language.name}`). "
        f"GranViT trains an encoder to see regions: the decoder says what is inside a box of a picture, and where something is."
    )
    return plan, {"about": about, "loading": LOAD_LLAVA, "parts": PARTS, "pipeline": "image-text-to-text"}, texts


def _image_token(chat: Chat, vocab: int) -> tuple[Tokenizer, str, int, str]:
    """The tokenizer with a token that stands for the image, that token, its id, and the card's words on it.

    No trained row of the embedding is touched: it is a token that the tokenizer has for it, the first row that no token uses, a
    token that its publisher kept in reserve, or else a new row (an id of `vocab` or above).
    """
    tokenizer = Tokenizer.from_str(chat.tokenizer.to_str())
    if tokenizer.encode("", add_special_tokens=True).ids:  # the template writes all control tokens: none may come twice
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}))
    known = tokenizer.token_to_id(IMAGE_TOKEN) is not None
    spare = sorted((i, text) for text, i in tokenizer.get_vocab(with_added_tokens=True).items() if RESERVED.fullmatch(text))
    if not known and chat.size >= vocab and spare:
        image_id, text = spare[-1]
        return tokenizer, text, image_id, f"`{text}` (id {image_id}), kept in reserve by the publisher, stands for the image."
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if not known and image_id < chat.size:
        raise ValueError(f"{chat.origin}: its ids have gaps, so a new token would take another's; add {IMAGE_TOKEN!r} to it")
    if known:
        why = "the tokenizer's own"
    elif image_id < vocab:
        why = f"new in the tokenizer: the embedding's {vocab} rows had room"
    else:
        why = f"new, with zeros after the training's {vocab} rows of the embedding; never generated (`suppress_tokens`)"
    return tokenizer, IMAGE_TOKEN, image_id, f"`{IMAGE_TOKEN}` (id {image_id}) stands for the image: {why}."


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def command() -> int:
    """`main` of a process of its own, which a SIGTERM ends in order: what is half written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export_hf.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory or one of its checkpoints")
    parser.add_argument("destination", metavar="DST", type=Path, help="the directory that is made; must not exist")
    parser.add_argument("--as", dest="kind", required=True, choices=("encoder", "llava"), help="the encoder alone, or the whole")
    parser.add_argument("--top", choices=("start", "blank"), help="what is above the encoder's features (no default)")
    parser.add_argument("--start-weights", metavar="DIR", type=Path, help="for --top start (default: model.weights_vision)")
    parser.add_argument("--for-transformers-4", action="store_true", help="for --as llava where the projector reads the level "
                        "'final': write what transformers 5 and vLLM misread")  # fmt: skip
    parser.add_argument("--license", metavar="ID", help="for the card, as the hub spells it (default: none is stated)")
    parser.add_argument("--base-model", metavar="ID", action="append", default=[], help="for the card, as often as needed")
    options = parser.parse_args(arguments)
    try:
        with Bar() as bar:
            report = export(
                options.run, options.destination, options.kind, options.top, options.start_weights, options.license,
                options.base_model, options.for_transformers_4, bar,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    if options.license is None:
        print("note: README.md states no license (--license): settle it before you publish")
    return 0
