"""Captions of images and their regions by a vision-language model: what is asked, about which pixels, and a local model.

The paper (section 3) wrote them with Qwen2.5-VL-7B and does not print its prompts. The prompts here are ours. They ask for what
the paper's questions (`granvit.data.prompts`) are answered with: a paragraph about the image, at most ten words about a region.

A region is shown as a crop, not as a box drawn on the image: the model sees small regions at full resolution and cannot describe
the drawing. The crop is wider than the box by `margin` of the box's sides on each side, as far as the image reaches.
"""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from granvit.data.annotate.annotator import Failed, KnownImage, Result, fingerprint, needed
from granvit.data.annotate.model_directory import loaded, loaded_model, model_files
from granvit.data.prompts import GLOBAL, Box

GLOBAL_PROMPT = f"{GLOBAL}. Answer with the description alone."
REGION_PROMPT = "Describe the main content of this image in no more than 10 words. Answer with the description alone."
SHORTEST = 28  # pixels: the side of the patch that Qwen2.5-VL makes one token of
LONGEST = 200  # times as long as wide: Qwen2.5-VL's processor refuses more

Answer = str | Failed


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt about an image, or about one box of it. The answer has at most `max_tokens` tokens."""

    pixels_HW3: np.ndarray
    box: Box | None
    prompt: str
    max_tokens: int

    def picture(self, margin: float, max_pixels: int) -> Image.Image:
        """The image or crop, reduced to at most `max_pixels` pixels. `Failed` if it is too narrow for the model."""
        shown = self.pixels_HW3
        if self.box is not None:
            height, width = shown.shape[:2]
            left, right = _widened(self.box[0], self.box[2], margin, width)
            top, bottom = _widened(self.box[1], self.box[3], margin, height)
            shown = shown[top:bottom, left:right]
        height, width = shown.shape[:2]
        if max(width, height) > LONGEST * min(width, height):
            raise Failed("image or crop is too narrow for the model")
        picture = Image.fromarray(shown)
        reduced = (max_pixels / (width * height)) ** 0.5
        if reduced < 1:
            size = max(int(width * reduced), 1), max(int(height * reduced), 1)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return picture


def _widened(start: float, end: float, margin: float, length: int) -> tuple[int, int]:
    """A box's side in whole pixels: with its margin and at least `SHORTEST` long, as far as the image's side reaches."""
    extra = max(margin * (end - start) * length, (SHORTEST - (end - start) * length) / 2, 0.0)
    first, last = max(int(start * length - extra), 0), min(int(np.ceil(end * length + extra)), length)
    return min(first, length - 1), max(last, first + 1)


@dataclass(frozen=True, kw_only=True)
class Captioner(ABC):
    """Asks about each image with `global_prompt` and about each of its regions with `region_prompt`; None asks nothing.

    Answers replace the captions known before, as the paper regenerates them. A part whose question fails has no caption and is in
    the result's `refused`. Answers are stripped; otherwise they are the model's text as it is: `<|im_end|>` in it is text.
    `max_pixels` is the size that larger images and crops are reduced to, 1280 tokens of Qwen2.5-VL by default.
    """

    finds_regions: ClassVar[bool] = False
    global_prompt: str | None = GLOBAL_PROMPT
    region_prompt: str | None = REGION_PROMPT
    global_tokens: int = 512
    region_tokens: int = 64
    margin: float = 0.1
    max_pixels: int = 1280 * 28 * 28

    def _settings(self) -> dict[str, Any]:
        """What answers depend on, besides the model."""
        return {
            "captioner": 1,
            "prompts": [self.global_prompt, self.region_prompt],
            "tokens": [self.global_tokens, self.region_tokens],
            "margin": self.margin,
            "max_pixels": self.max_pixels,
        }

    @abstractmethod
    def _answers(self, asked: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """The answers to the questions about each image. A `Failed` says why there is none."""

    def annotate(self, batch: Sequence[KnownImage]) -> list[Result]:
        asked = [self._questions(image) for image in batch]
        return [self._merged(image, answers) for image, answers in zip(batch, self._answers(asked), strict=True)]

    def _questions(self, image: KnownImage) -> list[Question]:
        questions = []
        if self.global_prompt is not None:
            questions.append(Question(image.pixels_HW3, None, self.global_prompt, self.global_tokens))
        if self.region_prompt is not None:
            prompt, tokens = self.region_prompt, self.region_tokens
            questions += [Question(image.pixels_HW3, region.box, prompt, tokens) for region in image.regions]
        return questions

    def _merged(self, image: KnownImage, answers: Sequence[Answer]) -> Result:
        answers, refused = list(answers), []
        global_caption = image.global_caption
        if self.global_prompt is not None:
            answer = answers.pop(0)
            global_caption = None if isinstance(answer, Failed) else answer
            if isinstance(answer, Failed):
                refused.append(("global", str(answer)))
        regions = list(image.regions)
        for number, answer in enumerate(answers):
            regions[number] = replace(regions[number], caption="" if isinstance(answer, Failed) else answer)
            if isinstance(answer, Failed):
                refused.append((f"region {number}", str(answer)))
        return Result(tuple(regions), global_caption, tuple(refused))


def plain_text(text: str) -> str:
    """An answer without white space around it. `Failed` if nothing is left or it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Failed("answer is not valid Unicode") from None
    if not text.strip():
        raise Failed("answer is empty")
    return text.strip()


@dataclass(frozen=True, kw_only=True)
class LocalCaptioner(Captioner):
    """Qwen2.5-VL in the local `directory`, in the dtype of its file, on `device` (granvit/data/annotate/device.py);
    greedy decoding.

    `together` questions about ONE image are answered in one pass. Questions about different images are not, because padding
    changes the rounding, and an answer would depend on the batch. `device` is not part of `version`, though devices round
    differently.
    """

    directory: str | Path
    device: str = "cpu"
    together: int = 8

    @cached_property
    def version(self) -> str:
        settings = self._settings() | {"local": 1, "together": self.together}
        return fingerprint(settings, ["transformers"], model_files(self.directory))

    @cached_property
    def _model(self) -> Any:
        model_files(self.directory)
        transformers = needed("transformers", "torch")
        # Of the class: with a text_config, as save_pretrained writes it, the object's own model_type is that of the text model.
        kind = type(loaded(transformers.AutoConfig, self.directory)).model_type
        if kind != "qwen2_5_vl":
            raise ValueError(f"directory {self.directory}: model_type is {kind}, not qwen2_5_vl; serve other models with vLLM")
        return loaded_model(transformers.Qwen2_5_VLForConditionalGeneration, self.directory, self.device, "auto")

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = loaded(needed("transformers").AutoTokenizer, self.directory, padding_side="left")
        if tokenizer.chat_template is None:
            raise ValueError(f"directory {self.directory}: its tokenizer has no chat template")
        return tokenizer

    @cached_property
    def _processor(self) -> Any:
        # Not AutoProcessor, which also loads the processor of videos and so needs torchvision.
        return loaded(needed("transformers").AutoImageProcessor, self.directory, use_fast=False)

    def _answers(self, asked: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        return [self._about_one_image(questions) for questions in asked]

    def _about_one_image(self, questions: Sequence[Question]) -> list[Answer]:
        answers: list[Answer] = []
        for _, group in groupby(questions, key=lambda question: (question.prompt, question.max_tokens)):
            alike = list(group)
            for start in range(0, len(alike), self.together):
                answers += self._pass(alike[start : start + self.together])
        return answers

    def _pass(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to questions of the same prompt and length."""
        pictures: list[Image.Image | Failed] = []
        for question in questions:
            try:
                pictures.append(question.picture(self.margin, self.max_pixels))
            except Failed as error:
                pictures.append(error)
        shown = [picture for picture in pictures if not isinstance(picture, Failed)]
        told = iter(self._generated(questions[0], shown) if shown else [])
        return [picture if isinstance(picture, Failed) else next(told) for picture in pictures]

    def _generated(self, question: Question, pictures: list[Image.Image]) -> list[Answer]:
        model, tokenizer, processor = self._model, self._tokenizer, self._processor
        content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        if text.count(token) != 1:
            raise ValueError(f"directory {self.directory}: chat template and prompt have {text.count(token)} {token}, not one")
        try:
            arrays = [np.asarray(picture) for picture in pictures]
            images = processor(images=arrays, input_data_format="channels_last", return_tensors="pt")
            counts = (images["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
            texts = tokenizer([text.replace(token, token * count) for count in counts], padding=True, return_tensors="pt")
            inputs = {**images.to(model.device), **texts.to(model.device)}
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            generated = model.generate(**inputs, **greedy, max_new_tokens=question.max_tokens)
        except Exception as error:  # the size of these images can be the cause
            return [Failed(f"captioning failed ({type(error).__name__})")] * len(pictures)
        answers: list[Answer] = []
        for ids in generated[:, inputs["input_ids"].shape[1] :].tolist():
            try:
                answers.append(self._text(ids))
            except Failed as error:
                answers.append(error)
        return answers

    def _text(self, ids: list[int]) -> str:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        if end is None:
            raise Failed("answer is too long")
        return plain_text(self._tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
