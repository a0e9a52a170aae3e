"""The command behind scripts/predict.py: one answer about one picture."""
import argparse
from collections.abc import Sequence
from pathlib import Path

from granvit.checkpoint.run import newest_checkpoint
from granvit.data.batch import prompt_batch
from granvit.data.chat import load_chat
from granvit.data.images import decode, to_views
from granvit.data.prompts import Box, parse_box, question_text
from granvit.exit_status import exit_status
from granvit.launch import load_engine_class
from granvit.logs import log, log_kernels, to_console
from granvit.pictures import draw_boxes
from granvit.stages import ANSWER


def predict_command(arguments: Sequence[str] | None = None) -> int:
    """Prints one answer about one picture; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Asks a trained run about a picture: it describes a region (--box), finds one (--text), or describes it all.",
        epilog='Example: python scripts/predict.py --run runs/demo/stage2 photo.jpg --text "a red circle" --draw answer.png',
    )
    parser.add_argument("image", help="a picture file")
    parser.add_argument("--run", required=True, help="a run's directory; its newest checkpoint is used")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--box", metavar="x1,y1,x2,y2", help="region to describe, relative to the picture's size: 0..1")
    question.add_argument("--text", help="what to find")
    parser.add_argument("--draw", metavar="OUT.png", help="save the picture with the predicted box (green) or --box (blue)")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    options = parser.parse_args(arguments)
    to_console(0)
    return exit_status(lambda: _predict(options), [])


def _asked_box(text: str) -> Box:
    try:
        box = tuple(float(number) for number in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"--box {text!r}: expected x1,y1,x2,y2 relative to the size, 0 <= x1 < x2 <= 1, 0 <= y1 < y2 <= 1")
    return box


def _predict(options: argparse.Namespace) -> None:
    run = Path(options.run)
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"--run {run}: no checkpoint in {run / 'checkpoints'}; name a run that has saved one")
    config, vision, language = checkpoint.config, checkpoint.vision, checkpoint.language
    asked = None if options.box is None else _asked_box(options.box)
    if options.text is not None:
        text = question_text("caption2bbox", caption=options.text)
    else:
        text = question_text("global") if asked is None else question_text("bbox2caption", box=asked)
    try:
        image_HW3 = decode(Path(options.image).read_bytes(), config.data.max_pixels)
    except ValueError as error:
        raise ValueError(f"{options.image}: {error}") from None
    chat = load_chat(config, language)
    if chat.plain and (options.box or options.text):
        raise ValueError(f"--run {run}: {config.stage} was trained on captions without questions; leave out --box and --text")
    Engine = load_engine_class(options.framework)
    engine = Engine(config, vision, language, checkpoint.tensors("model"), stage=ANSWER)
    log_kernels(engine.kernels)
    height, width = image_HW3.shape[:2]
    prompts = prompt_batch(to_views(image_HW3, vision)[None], [text], chat, vision, sizes=[(width, height)])
    answer = chat.decode(engine.generate(prompts, config.eval.max_new_tokens, chat.stop_token)[0])
    print(answer)
    if options.draw:
        predicted = parse_box(answer) if options.text is not None else None
        if options.text is not None and predicted is None:
            log.warning("the answer is not a box: no box is drawn")
        draw_boxes(image_HW3, {"green": predicted, "blue": asked}).save(options.draw)
