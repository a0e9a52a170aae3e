"""Exports a run for transformers: the encoder as a vision model, or the whole model as LLaVA, with all files for loading it.

    python scripts/export_hf.py RUN DST --as encoder|llava [--top start|blank] [--start-weights DIR] [--license ID] ...

RUN is a run's directory (its newest checkpoint) or one checkpoint (RUN/checkpoints/step_0001000); it is not changed. DST must not
exist. Besides the weights it gets config.json, preprocessor_config.json and a model card, README.md; for LLaVA also the
tokenizer, the processor, the chat template and generation_config.json.

The projector usually reads the output of the second-to-last block, and a run builds no block above it. A vision model of
transformers needs all blocks and a closing norm. --top selects where these come from: `start` takes them from the weights that
the run started from (for SigLIP also the pooling head), `blank` makes the blocks identities and omits the head. The features are
the same with both; config.json (key `granvit`) and the card say which hidden state they are. LLaVA does not use what is above the
features, so it is always blank there.

If the projector reads the level `final`, a LLaVA is only exported with --for-transformers-4: transformers 5 and vLLM read that
hidden state before the closing norm and give other answers without an error. Other levels and encoders do not have this problem.

Exit status: 0 done, 2 refused (DST is not created).
"""
import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from granvit.checkpoint.card import Exported, model_card, short_path
from granvit.checkpoint.contents import EMBEDDING, HEAD, RESAMPLE, open_contents, read_contents
from granvit.checkpoint.convert import Plan, ProgressCallback, Report, make_plan, run_command, write_plan
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
from granvit.checkpoint.tensors import JoinedTensors, Members, set_digest, shape_differences, write_synced
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
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")  # Llama 3: unused tokens
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


@dataclass(frozen=True)
class Tower:
    """A vision model of transformers: its layout, its class (`loader`), and our level for the indices of its hidden states.

    The level `final` is read as `last_hidden_state`, which is the output of the closing norm in all versions; `hidden_states[-1]`
    is so only in 4.57. `last_alone`: transformers 4.57 returns only the last hidden state. If there is no closing norm and the
    blocks above the features are blank, it equals the features.
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


class Extended(JoinedTensors):
    """Tensors from several sets. `rows` maps tensors to a number of rows: they are extended to it with zeros."""

    def __init__(self, members: Members, rows: dict[str, int]):
        super().__init__(members)
        self.rows = rows
        for name, length in rows.items():
            self.entries[name] = self.entries[name] | {"shape": (length, *self.entries[name]["shape"][1:])}

    def read(self, name: str) -> np.ndarray:
        array = super().read(name)
        if name not in self.rows:
            return array
        grown = np.zeros(self.entries[name]["shape"], array.dtype)
        grown[: len(array)] = array
        return grown


@dataclass
class Work:
    """The state of an export: the checkpoint, its history, and the tensors to write (`source`; `pooling`: SigLIP's pooling head).

    `record` goes into config.json under `granvit`, `remarks` into the card, and the command prints `notes`.
    """

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
        """Adds `members` to the tensors to write and extends those in `rows` (see `Extended`)."""
        own = self.source.tensors
        self.source.tensors = Extended({name: (own, name) for name in own.entries} | members, rows)


def tower_of(vision: VisionConfig) -> Tower:
    """The vision model of transformers with this encoder's architecture; `ValueError` if there is none."""
    reasons = []
    for tower in TOWERS:
        try:
            tower.layout.write_config(vision, None)
            return tower
        except ValueError as error:
            reasons.append(f"{tower.loader}: {error}")
    raise ValueError(f"encoder {vision.name!r} has the architecture of no vision model known here ({'; '.join(reasons)})")


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
    """Exports a checkpoint, or the newest one of a run, from the directory `run` to the directory `destination`.

    `top` selects the encoder's blocks above its level (only for `kind` encoder), `start_weights` is the directory of the weights
    that the first run started from (default: the one in its configuration). `license_id` and `base_models` go into the card's
    front matter. `for_transformers_4` permits a LLaVA that other programs read wrongly (`FINAL_DIFFERS`). `ValueError` (one line)
    for invalid input, `OSError` from reading and writing; then `destination` is not created.
    """
    run, destination, began = Path(run), Path(destination), time.perf_counter()
    if os.path.lexists(destination):
        raise ValueError(f"{destination}: exists already; remove it or choose another name")
    if destination.suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"{destination}: an export is a directory, not a {destination.suffix} file")
    if kind == "llava" and top is not None:
        raise ValueError("--top belongs to --as encoder: LLaVA does not use blocks above the features")
    if start_weights is not None and top != "start":
        raise ValueError("--start-weights belongs to --top start")
    if kind == "encoder" and for_transformers_4:
        raise ValueError("--for-transformers-4 belongs to --as llava: all versions read an encoder in the same way")
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
    return report


def _open(run: Path) -> Work:
    """The checkpoint and its history; `ValueError` if there is none, or its model does not use the image."""
    source = open_source(run)
    if source.vision is None:
        raise ValueError(f"{run}: not a run's directory, nor one of its checkpoints (parity/convert.py converts other files)")
    checkpoint = open_checkpoint(source.path)
    stage = checkpoint.config.stage_spec
    if stage.zero_image_tokens:
        raise ValueError(f"{source.path}: stage {stage.name!r} trains a decoder without images: there is no GranViT to export")
    runs, missing_origin = history(checkpoint)
    work = Work(checkpoint, runs, missing_origin, source)
    work.record = {
        "stage": stage.name,
        "step": checkpoint.step,
        "parts": {name: part.hash for name, part in checkpoint.parts.items()},
    }
    if missing_origin is not None:
        work.notes.append(f"no checkpoint in {missing_origin} (model.init_from): the card begins with the next run")
    return work


def _plan(work: Work, target: Layout, report: Report) -> Plan:
    """The conversion's plan for `work.source`, with `work.record` in its config.json."""
    contents = read_contents(work.source, *detect(work.source, None))
    plan = make_plan(work.source, contents, target, report)
    report.notes = work.notes  # replaces the conversion's notes, which the export has dealt with
    assert plan.config is not None  # a run's source states its model
    plan.config["granvit"] = plan.config.get("granvit", {}) | work.record
    return plan


def _encoder(
    work: Work, tower: Tower, top: Top | None, start_weights: Path | None, report: Report
) -> tuple[Plan, dict[str, Any], dict[str, str]]:
    """The plan of the encoder's files, the content of the card, and an empty dict of further text files."""
    built, path = work.vision, work.checkpoint.path
    state = next((index for index, level in tower.states.items() if level == built.level), None)
    if state is None:
        shown_levels = ", ".join(tower.states.values())
        raise ValueError(f"{path}: its projector reads the level {built.level!r}; {tower.loader} returns only {shown_levels}")
    above = _above(built)
    if above and top is None:
        raise ValueError(
            f"{path}: the run built {built.built_layers} of {built.layers} blocks, {tower.loader} needs all; --top start takes "
            f"the rest from the weights that the run started from, --top blank makes it blocks that return their input"
        )
    if tower.last_alone and state != -1 and not (above and top == "blank"):
        remedy = "use --top blank, which makes it the features" if above else "this run has trained blocks above the features"
        raise ValueError(
            f"{path}: its projector reads hidden_states[{state}], but {tower.loader} returns only the last; {remedy}"
        )
    last_alone = tower.last_alone or built.level == "final"
    shown_as = "last_hidden_state" if last_alone else f"hidden_states[{state}]"
    features = shown_as + ("[:, 1:]" if built.class_token else "")
    work.record |= {"features": features, "level": built.level, "top": {"from": top if above else "trained"}}
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
        plan.dtypes |= {f"vision_model.{name}": work.source.tensors.dtype(name) for name in work.pooling}
        plan.config["vision_use_head"] = True
    if tower.layout is SIGLIP:
        plan.config["granvit"]["pooling_head"] = "start" if work.pooling else "left out"
    without_class = ", the class token left out" if built.class_token else ""
    work.remarks += [
        f"The features are `{features}`, the input that the projector was trained on: {built.patches} patches row by "
        f"row{without_class}.",
        *_about_top(work, tower, above, start),
        _about_pixels(built),
    ]
    about = (
        f"The vision encoder of a GranViT run as `{tower.loader}`: {built.image_size} x {built.image_size} pixels, patches of "
        f"{built.patch_size}, width {built.width}, {built.layers} blocks. GranViT trains an encoder on regions: a language "
        f"model describes the content of a box from its features. The projector and the decoder are not in this folder."
    )
    load = LOAD_ENCODER.format(features=features, options="" if last_alone else ", output_hidden_states=True")
    return plan, {"about": about, "loading": load, "parts": ("vision",), "pipeline": "image-feature-extraction"}, {}


def _above(vision: VisionConfig) -> Shapes:
    """The parameters of the whole tower that the run did not build."""
    built = vision_shapes(vision)
    return {name: shape for name, shape in vision_shapes(vision.with_all_blocks).items() if name not in built}


def _find_start(work: Work, given: Path | None) -> Path:
    """The publisher's directory that the first run started from; `ValueError` names the place if it is missing."""
    first = work.runs[0].checkpoint
    instead = "name the directory with --start-weights DIR, or use --top blank"
    if given is None and work.missing_origin is not None:
        raise ValueError(
            f"--top start: the first run's configuration names the start weights, but that run, {work.missing_origin} "
            f"(model.init_from of {first.path}), is missing; {instead}"
        )
    if work.missing_origin is None and first.config.model.init == "random":
        raise ValueError(f"--top start: {first.path} started from random weights (model.init); use --top blank")
    path = given or Path(first.config.model.weights_vision)
    if not path.is_dir():
        key = "--start-weights" if given else f"model.weights_vision of {first.path}"
        raise ValueError(
            f"--top start: no directory {path} ({key}, current directory: {Path.cwd()}); the start weights' config.json and "
            f"safetensors files belong there; {instead}"
        )
    return path


def _take_top(work: Work, tower: Tower, path: Path, above: Shapes) -> None:
    """Adds the start weights' blocks above the level, closing norm and pooling head to the tensors to write.

    `ValueError` if they have another architecture or are not the weights that the first run started from.
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
        work.notes.append(f"whether the first run started from {path} could not be checked: {work.missing_origin} is missing")
    work.add({name: (start.tensors, contents.names[name]) for name in above}, {})
    work.source.vision = work.vision.with_all_blocks
    if tower.layout is SIGLIP:
        work.pooling = {m[1]: (start.tensors, name) for name in contents.left_out if (m := POOLING.fullmatch(name))}


def _about_top(work: Work, tower: Tower, above: Shapes, start: Path | None) -> list[str]:
    """Sentences for the card on the blocks above the features."""
    blocks = work.vision.layers - work.checkpoint.vision.built_layers
    sentences = []
    if above:
        which = f"The last of {work.vision.layers} blocks and the closing norm" if blocks else "The closing norm's weights"
        if start is not None:
            how = f"those of the start weights, `{short_path(start)}`: they were not trained together with the blocks below"
        else:
            how = "zeros, with norm weights of 1: these blocks return their input unchanged"
        sentences.append(f"{which}, which were not part of the training, are {how}.")
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
    """preprocessor_config.json for transformers: `granvit.data.images.to_square`, then the encoder's normalisation."""
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": side,
        "resample": next(number for number, name in RESAMPLE.items() if name == vision.resize),
        "do_center_crop": False,
        "crop_size": side,  # the number of tokens is computed from it
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


def _llava(work: Work, tower: Tower, for_transformers_4: bool, report: Report) -> tuple[Plan, dict[str, Any], dict[str, str]]:
    """The plan of LLaVA's files, the content of the card, and the text files of the processor and the tokenizer.

    `ValueError` for the level `final` without `for_transformers_4`.
    """
    vision, language, config = work.vision, work.source.language, work.checkpoint.config
    assert language is not None  # a run's source states its model
    if vision.level == "final":
        if not for_transformers_4:
            raise ValueError(
                f"{work.source.path}: {FINAL_DIFFERS}. --for-transformers-4 writes it nevertheless; --as encoder is safe"
            )
        work.notes.append(f"load it only with transformers 4.57: {FINAL_DIFFERS}")
        work.remarks.append(f"**Load it only with transformers 4.57**: {FINAL_DIFFERS}.")
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
    blank = "the unused blocks and the closing norm above it are zeros, with norm weights of 1"
    mixes = [run.checkpoint.config.stage_spec.mix for run in work.runs]
    questions = [f"`{question}`" for task, question in QUESTIONS.items() if any(mix.get(task) for mix in mixes)]
    work.remarks += [
        f"Ask one question about one picture, with the wording of the training: {', '.join(questions)}. "
        f"Boxes are `[x1, y1, x2, y2]`, divided by the picture's own width and height, with three decimals.",
        f"The chat template is that of the training (`{chat.family}`), its system message `{SYSTEM}` included.",
        about_image_token,
        f"The projector reads `hidden_states[{plan.config['vision_feature_layer']}]`" + (f"; {blank}." if plan.fillers else "."),
        _about_pixels(vision),
    ]
    about = (
        f"A GranViT run as `LlavaForConditionalGeneration`: an encoder built like `{tower.loader}` ({vision.image_size} x "
        f"{vision.image_size} pixels, {vision.patches} tokens), a projector of two layers, and a decoder (`{language.name}`). "
        f"GranViT trains an encoder on regions: the decoder describes the content of a box, and locates what is described."
    )
    return plan, {"about": about, "loading": LOAD_LLAVA, "parts": PARTS, "pipeline": "image-text-to-text"}, texts


def _image_token(chat: Chat, vocab: int) -> tuple[Tokenizer, str, int, str]:
    """A tokenizer with an image token, that token, its id, and a sentence about it for the card.

    No trained row of the embedding is used for it. The token is the tokenizer's own `<image>`, else a new token in an unused row,
    else a token that the publisher reserved, else a new token with a new row (an id of `vocab` or above).
    """
    tokenizer = Tokenizer.from_str(chat.tokenizer.to_str())
    if tokenizer.encode("", add_special_tokens=True).ids:  # remove it: the template already has all control tokens
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}))
    known = tokenizer.token_to_id(IMAGE_TOKEN) is not None
    spare = sorted((i, text) for text, i in tokenizer.get_vocab(with_added_tokens=True).items() if RESERVED.fullmatch(text))
    if not known and chat.size >= vocab and spare:
        image_id, text = spare[-1]
        return tokenizer, text, image_id, f"`{text}` (id {image_id}), reserved by the publisher, stands for the image."
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if not known and image_id < chat.size:
        raise ValueError(f"{chat.origin}: its ids have gaps: a new token would get the id of another; add {IMAGE_TOKEN!r} to it")
    if known:
        why = "the tokenizer's own"
    elif image_id < vocab:
        why = f"new in the tokenizer: the embedding's {vocab} rows had room"
    else:
        why = f"new, with rows of zeros after the embedding's {vocab} trained rows; never generated (`suppress_tokens`)"
    return tokenizer, IMAGE_TOKEN, image_id, f"`{IMAGE_TOKEN}` (id {image_id}) stands for the image: {why}."


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory or one of its checkpoints")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to create; must not exist")
    parser.add_argument("--as", dest="kind", required=True, choices=("encoder", "llava"), help="the encoder, or the whole model")
    parser.add_argument("--top", choices=("start", "blank"), help="source of the blocks above the encoder's features")
    parser.add_argument("--start-weights", metavar="DIR", type=Path, help="for --top start (default: model.weights_vision)")
    parser.add_argument("--for-transformers-4", action="store_true", help="for --as llava if the projector reads the level "
                        "'final': export it although transformers 5 and vLLM read it wrongly")  # fmt: skip
    parser.add_argument("--license", metavar="ID", help="for the card, as the hub spells it (default: none is stated)")
    parser.add_argument("--base-model", metavar="ID", action="append", default=[], help="for the card, as often as needed")
    options = parser.parse_args(arguments)
    status = run_command(lambda bar: export(
        options.run, options.destination, options.kind, options.top, options.start_weights, options.license,
        options.base_model, options.for_transformers_4, bar,
    ))  # fmt: skip
    if status == 0 and options.license is None:
        print("note: README.md states no license; choose one with --license before you publish")
    return status
