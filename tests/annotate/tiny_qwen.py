"""A Qwen2.5-VL with a few random weights, written as its publishers write it, and `transformers serve` with it."""
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers import (
    GenerationConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
)

from granvit.data.chat import byte_tokenizer

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen(directory: Path) -> Path:
    """Writes a model that answers with small letters, up to the limit of tokens, where its answer ends."""
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=byte_tokenizer("qwen2.5"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=VISION_TOKENS,
    )
    tokenizer.chat_template = TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # less likely than one of the letters
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(set(range(len(tokenizer))) - letters - {tokenizer.eos_token_id}),
        forced_eos_token_id=tokenizer.eos_token_id,
        do_sample=True,  # as the published one; the captioners ask for greedy decoding
        temperature=2.0,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4 * 28 * 28).save_pretrained(directory)
    return directory


class ImagesOnly(Qwen2_5_VLProcessor):
    """The processor without its half for videos, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 (as in transformers)

    def __init__(self, image_processor, tokenizer):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)
        self.image_token, self.video_token = VISION_TOKENS[2:]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(VISION_TOKENS[2:])


@contextmanager
def transformers_serve() -> Iterator[str]:
    """The address of a `transformers serve` in a thread, which loads the models that requests name.

    Only the loading is ours: transformers' own needs accelerate and torchvision.
    """
    import uvicorn
    from transformers.commands import serving

    class Command(serving.ServeCommand):
        def _load_model_and_data_processor(self, model_id_and_revision):
            directory = model_id_and_revision.removesuffix("@main")
            images, tokenizer = (kind.from_pretrained(directory) for kind in (Qwen2VLImageProcessor, Qwen2TokenizerFast))
            return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).eval(), ImagesOnly(images, tokenizer)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[uvicorn.Server] = []

    def run(app, **options):  # uvicorn.run, which cannot be stopped from outside
        started.append(uvicorn.Server(uvicorn.Config(app, **options)))
        started[0].run()

    command = Command(serving.ServeArguments(host="127.0.0.1", port=port, log_level="error"))
    with mock.patch.object(serving.uvicorn, "run", run):
        thread = threading.Thread(target=command.run, daemon=True)
        thread.start()
        limit = time.monotonic() + 60
        while not (started and started[0].started):
            assert thread.is_alive() and time.monotonic() < limit
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            started[0].should_exit = True
            thread.join(30)
            assert not thread.is_alive()
