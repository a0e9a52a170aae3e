"""Exports, loaded by transformers as their model cards say, against the PyTorch twin on the same checkpoint and a photograph."""
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from PIL import Image
from tokenizers import processors

from granvit.checkpoint.export import export, main
from granvit.checkpoint.history import history
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import newest_checkpoint
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.checkpoint.tensors import TensorSet
from granvit.config import language_config, vision_config
from granvit.data.batch import PromptBatch, prompt_batch
from granvit.data.chat import TEMPLATES, Chat, byte_tokenizer, load_chat, train_tokenizer
from granvit.data.images import to_square
from granvit.data.prompts import question_text
from granvit.init import initial_value
from granvit.models import LanguageConfig, VisionConfig, parameter_shapes
from granvit.stages import ANSWER
from tests.helpers import run_config
from tests.toy import ToyEngine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
skimage_data = pytest.importorskip("skimage.data")

import pt_granvit  # noqa: E402
from pt_granvit.engine import Engine  # noqa: E402 (these need torch)
from pt_granvit.generate import greedy  # noqa: E402
from pt_granvit.vision import VisionEncoder  # noqa: E402

SIGLIP_TINY, CLIP_TINY = vision_config("tiny-vision"), vision_config("tiny-clip")
QWEN = language_config("tiny-language")
LLAMA = LanguageConfig(**{**QWEN.model_dump(), "tied_head": False, "qkv_bias": False, "chat": "llama-3"})
AIMV2_TINY = SIGLIP_TINY.model_copy(update={
    "norm": "rms", "norm_eps": 1e-5, "patch_norm": True, "gated_mlp": True, "activation": "silu", "bias": False,
})  # fmt: skip
INTERNVIT_TINY = SIGLIP_TINY.model_copy(update={
    "class_token": True, "layer_scale": True, "activation": "gelu", "closing_norm": False,
})  # fmt: skip
QUESTION = question_text("bbox2caption", box=(0.1, 0.2, 0.5, 0.9))


def changed(config, **fields):
    """The configuration with other fields; an encoder with another level is built up to that level."""
    derived = {"built_level"} if "level" in fields else set()
    return type(config)(**{**config.model_dump(exclude=derived), **fields})


def write_run(directory: Path, vision: VisionConfig = SIGLIP_TINY, language: LanguageConfig = QWEN, start=(), **sections) -> Path:
    """A run's directory with a checkpoint after step 2: visible random weights (over them `start`), trained ones moved."""
    config = run_config(output=str(directory), eval={"max_new_tokens": 6}, **sections)
    shapes, rng = parameter_shapes(vision, language), np.random.default_rng(0)
    values = {n: initial_value(n, s, 0) + 0.2 * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    values |= {name: value for name, value in dict(start).items() if name in shapes}
    writer = CheckpointWriter(directory, config, vision, language)
    engine = ToyEngine(config, vision, language, writer.record_start(values.items()))
    if config.runtime.compute == "bfloat16":
        engine.weights |= {n: w.astype(ml_dtypes.bfloat16) for n, w in engine.weights.items() if n not in engine.trained}
    for name in engine.trained:
        engine.weights[name] = engine.weights[name] + np.float32(0.01)
    writer.save(engine, 2, {"questions": 8, "skipped": 0})
    return directory


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.open(Path(skimage_data.__file__).parent / "chelsea.png").convert("RGB")  # 451 x 300


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A SigLIP as its publisher ships it, both towers, and the encoder's tensors under our names."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    towers = {"vision_config": sizes | {"image_size": 32, "patch_size": 8}, "text_config": sizes | {"vocab_size": 64}}
    model = transformers.SiglipModel(transformers.SiglipConfig(**towers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("published") / "siglip-tiny"
    model.save_pretrained(directory)
    return directory, {SIGLIP.canonical(n): v.numpy() for n, v in model.state_dict().items() if SIGLIP.canonical(n)}


def as_the_card_says(directory: Path, **given) -> dict:
    """Runs the card's Python code; returns its variables."""
    code = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", str(directory)), given)
    return given


def square(photograph: Image.Image, vision: VisionConfig) -> np.ndarray:
    return to_square(np.asarray(photograph), vision)[None]


def assert_loads_whole(loader, directory: Path) -> None:
    _, info = loader.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def refused(capsys, *arguments) -> str:
    """Runs the command, which must refuse in one line with exit status 2; returns the line."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    "vision, top, features",
    [
        (SIGLIP_TINY, "blank", "hidden_states[-2]"),
        (changed(SIGLIP_TINY, level="final"), None, "last_hidden_state"),
        (changed(SIGLIP_TINY, built_level="final"), None, "hidden_states[-2]"),
        (CLIP_TINY, "blank", "hidden_states[-2][:, 1:]"),
        (changed(CLIP_TINY, level="last"), "blank", "hidden_states[-1][:, 1:]"),
        (AIMV2_TINY, "blank", "hidden_states[-2]"),
        (changed(AIMV2_TINY, level="final"), None, "last_hidden_state"),
        (INTERNVIT_TINY, "blank", "last_hidden_state[:, 1:]"),
        (changed(INTERNVIT_TINY, level="last"), None, "last_hidden_state[:, 1:]"),
    ],
)
def test_an_encoder_loads_whole_and_its_features_are_ours(tmp_path, photograph, vision, top, features):
    run, out = write_run(tmp_path / "run", vision), tmp_path / "encoder"
    export(run, out, "encoder", top)
    assert_loads_whole(transformers.AutoModel, out)
    found = as_the_card_says(out, picture=photograph)
    ours = VisionEncoder(vision, torch.float32)
    state = {n.removeprefix("vision."): torch.from_numpy(v) for n, v in newest_checkpoint(run).tensors("model")}
    ours.load_state_dict({n: state[n] for n in ours.state_dict()})
    pixels = torch.from_numpy(square(photograph, vision))
    with torch.no_grad():
        torch.testing.assert_close(found["processor"](photograph, return_tensors="pt")["pixel_values"], ours.normalise(pixels))
        torch.testing.assert_close(found["features"], ours.encode(pixels)[0], rtol=1e-5, atol=1e-5)
    record = json.loads((out / "config.json").read_text())["granvit"]
    assert record["features"] == features and record["top"]["from"] == (top or "trained")
    assert f"`{features}`" in (out / "README.md").read_text()


def test_the_top_is_that_of_the_start_weights_and_they_must_be_those(tmp_path, published, capsys):
    directory, values = published
    model = {"init": "pretrained", "weights_vision": str(directory)}
    first = write_run(tmp_path / "first", start=values, model=model)
    moved = dict(newest_checkpoint(first).tensors("model"))
    run = write_run(tmp_path / "second", start=moved, stage="stage2", model={"init_from": str(first)})
    export(run, tmp_path / "out", "encoder", "start")
    assert_loads_whole(transformers.SiglipVisionModel, tmp_path / "out")
    theirs, written = TensorSet(directory), TensorSet(tmp_path / "out")
    tower = {name: shape for name, shape in theirs.shapes.items() if name.startswith("vision_model.")}
    assert written.shapes == tower  # the pooling head is there too
    for name in tower:
        above = any(part in name for part in (".layers.2.", "post_layernorm", ".head."))
        expected = theirs.read(name) if above else moved[SIGLIP.canonical(name)]
        np.testing.assert_array_equal(written.read(name), expected, err_msg=name)
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    top = tree["granvit"]["top"]
    assert tree["vision_use_head"] and (top["from"], top["weights"], len(top["tensors"])) == ("start", "siglip-tiny", 18)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "are those of the start weights, `siglip-tiny`" in card and "pooling head is that of the start weights" in card

    other = tmp_path / "other"
    changed_model = transformers.SiglipModel.from_pretrained(directory)
    with torch.no_grad():
        changed_model.vision_model.embeddings.patch_embedding.bias[3].add_(1)
    changed_model.save_pretrained(other)
    arguments = (run, tmp_path / "refused", "--as", "encoder", "--top", "start", "--start-weights")
    assert str(other) in refused(capsys, *arguments, other)
    assert str(tmp_path / "nowhere") in refused(capsys, *arguments, tmp_path / "nowhere")
    first.rename(tmp_path / "moved-away")
    error = refused(capsys, *arguments[:-1])
    assert "--start-weights DIR" in error and "model.init_from" in error
    assert main([str(argument) for argument in (*arguments, directory)]) == 0
    assert "could not be checked" in capsys.readouterr().out


def test_an_encoder_that_a_bfloat16_run_froze_goes_out_as_it_came_in(tmp_path, published):
    directory, values = published
    model, runtime = {"init": "pretrained", "weights_vision": str(directory)}, {"compute": "bfloat16"}
    run = write_run(tmp_path / "run", start=values, stage="stage2", model=model, runtime=runtime)
    export(run, tmp_path / "out", "encoder", "start")
    assert_loads_whole(transformers.AutoModel, tmp_path / "out")
    found = TensorSet(tmp_path / "out").read("vision_model.embeddings.patch_embedding.weight")
    np.testing.assert_array_equal(found, values["vision.embeddings.patch_embedding.weight"])


def llama3_tokenizer(path: Path) -> Path:
    """A file like Llama 3's: reserved tokens, and a post-processor that would add the first control token a second time."""
    tokenizer = byte_tokenizer("llama-3")
    tokenizer.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(4)])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    "vision, language, image_token",
    [
        pytest.param(SIGLIP_TINY, QWEN, "<image>", id="siglip-qwen2-tied-spare-row"),
        pytest.param(changed(SIGLIP_TINY, level="final"), changed(QWEN, vocab=259), "<image>", id="siglip-qwen2-tied-new-row"),
        pytest.param(CLIP_TINY, changed(LLAMA, vocab=261), "<image>", id="clip-llama-untied-new-row"),
        pytest.param(CLIP_TINY, LLAMA, "<|reserved_special_token_3|>", id="clip-llama-untied-reserved"),
        pytest.param(AIMV2_TINY, QWEN, "<image>", id="aimv2-qwen2-tied-spare-row"),
    ],
)
def test_llava_answers_as_the_run_does(tmp_path, photograph, vision, language, image_token):
    model = {}
    if "reserved" in image_token:
        model["tokenizer"] = str(llama3_tokenizer(tmp_path / "tokenizer.json"))
        language = changed(language, vocab=Chat.from_file(model["tokenizer"], "llama-3").size)
    run, out = write_run(tmp_path / "run", vision, language, stage="stage2", model=model), tmp_path / "llava"
    export(run, out, "llava", for_transformers_4=vision.level == "final")
    assert_loads_whole(transformers.LlavaForConditionalGeneration, out)
    found = as_the_card_says(out, picture=photograph, question=QUESTION)

    checkpoint = newest_checkpoint(run)
    engine = Engine(checkpoint.config, vision, language, checkpoint.tensors("model"), stage=ANSWER)
    chat = load_chat(checkpoint.config, language)
    prompts = prompt_batch(square(photograph, vision), [QUESTION], chat, vision)
    expected_ids = prompts.token_ids_BS.copy()
    image_id = found["processor"].tokenizer.convert_tokens_to_ids(image_token)
    np.put_along_axis(expected_ids, prompts.image_positions_BN, image_id, 1)
    np.testing.assert_array_equal(found["inputs"]["input_ids"], expected_ids)
    prompt = found["processor"].apply_chat_template([found["turn"]], add_generation_prompt=True)
    again = found["processor"](images=photograph, text=prompt, return_tensors="pt")  # no control token comes twice
    np.testing.assert_array_equal(again["input_ids"], expected_ids)
    assert found["model"].config.image_token_id == image_id
    assert found["model"].generation_config.eos_token_id == chat.stop_token
    assert found["model"].generation_config.suppress_tokens == ([image_id] if image_id >= language.vocab else None)

    with torch.no_grad():
        theirs = found["model"](**found["inputs"]).logits[..., : language.vocab]
        logits = prompt_logits(engine, prompts)
    torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-4)  # found: 1e-5, as far as either is from float64
    tokens = greedy(engine.model, prompts, 6, chat.stop_token, "cpu")[0].tolist()
    generated = found["model"].generate(**found["inputs"])[0, prompts.token_ids_BS.shape[1] :].tolist()
    assert generated == tokens[: len(generated)] and (len(generated) == 6 or generated[-1] == chat.stop_token)
    assert found["answer"] == chat.decode(tokens)


def prompt_logits(engine: Engine, prompts: PromptBatch) -> torch.Tensor:
    """Our logits at every position of one prompt."""
    ids, at = (torch.from_numpy(array).long() for array in (prompts.token_ids_BS, prompts.image_positions_BN))
    inputs, _ = engine.model.inputs(torch.from_numpy(prompts.pixels_B3RR), torch.ones(1), ids, at)
    positions = torch.arange(ids.shape[1])[None]
    return engine.model.language.head(engine.model.language(inputs, positions, torch.zeros_like(ids)))


def test_the_processor_has_our_ids_for_every_question(tmp_path, photograph):
    texts = ["a red circle and a word", QUESTION]
    tokenizer = train_tokenizer(texts, 300, "qwen2.5", ["Describe the content", "[0."])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    language = changed(QWEN, vocab=Chat(tokenizer, "qwen2.5").size)
    run = write_run(tmp_path / "run", language=language, model={"tokenizer": str(tmp_path / "tokenizer.json")})
    export(run, tmp_path / "out", "llava")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    chat = load_chat(newest_checkpoint(run).config, language)
    unusual = question_text("caption2bbox", caption="ein Straßenschild — 交通, 42 ")
    for question in (QUESTION, unusual, "[0.1, 0.25]\n", "é"):
        turn = {"role": "user", "content": [{"type": "image", "image": photograph}, {"type": "text", "text": question}]}
        ids = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True)[0]
        image = [language.vocab] * SIGLIP_TINY.patches  # the row after the training's last
        assert ids == [*chat.prefix_before, *image, *chat.prefix_after, *chat.question_ids(question)]
        assert processor.tokenizer.decode(ids) == processor.apply_chat_template([turn], add_generation_prompt=True).replace(
            "<image>", "<image>" * SIGLIP_TINY.patches
        )


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_chat_template_goes_on_after_an_answer_as_it_began(family):
    chat = Chat(byte_tokenizer(family), family)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(family), chat_template=chat.jinja("<image>"))
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}]},
        {"role": "assistant", "content": 'a "quoted"\nanswer'},
        {"role": "user", "content": "two"},
    ]
    render = lambda turns, ask: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)  # noqa: E731
    template = TEMPLATES[family]
    before, after = ("".join(text for text, _ in pieces) for pieces in (template.before_image, template.after_question))
    opening = f"{before}<image>\none{after}"
    again = before[before.index(template.end) :]
    assert render(turns[:1], True) == opening
    assert render(turns[:1], False) == opening.removesuffix(after) + template.end
    assert render(turns[:2], False) == opening + 'a "quoted"\nanswer' + template.end
    assert render(turns, True) == opening + 'a "quoted"\nanswer' + again + "two" + after
    with pytest.raises(Exception, match="the system message is part of the template"):
        render([{"role": "system", "content": "x"}], True)


def test_the_card_tells_the_runs_and_what_they_measured(tmp_path, published):
    directory, values = published
    data = {"sources": [{"path": "data_store/scenes", "rate": 0.5}, {"path": str(tmp_path / "private")}]}
    model = {"init": "pretrained", "weights_vision": str(directory), "weights_language": "weights/decoder"}
    first = write_run(tmp_path / "stage-one", start=values, model=model, data=data)
    moved = dict(newest_checkpoint(first).tensors("model"))
    run = write_run(tmp_path / "stage-two", start=moved, stage="stage2", model={"init_from": str(first)})
    lines = [{"step": s, "loss": s / 2, "loss_caption": s / 4, "loss_distill": 0.0} for s in (1, 2, 3)]  # 3: after the checkpoint
    lines[2:2] = [{"step": 2, "held_out": {"loss": 9.0}}]  # an evaluation is not a step
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (run / "eval").mkdir()
    for step, score in ((1, 0.1), (2, 0.25), (3, 0.9)):
        table = {"caption2bbox": {"samples": 12.0, "acc_iou50": score}}
        (run / "eval" / f"step_{step:07d}.json").write_text(json.dumps({"step": step, "table": table, "predictions": []}))
    export(run, tmp_path / "out", "llava", license_id="cc-by-4.0", base_models=["google/siglip2-so400m-patch16-512"])
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["granvit"], "license": "cc-by-4.0",
        "base_model": ["google/siglip2-so400m-patch16-512"],
    }  # fmt: skip
    stages = card.split("### ")
    assert stages[1].startswith("1. stage1 (`stage-one`)") and stages[2].startswith("2. stage2 (`stage-two`)")
    assert "`data_store/scenes` (0.5 of its regions), `private`" in stages[1] and "learning rate 0.01" in stages[1]
    assert "self-distillation: weight 1, EMA rate 0.9" in stages[1] and "metrics.jsonl is missing" in stages[1]
    assert "mean of the last 2 steps: loss 0.75, loss_caption 0.375" in stages[2]
    assert "after step 2:" in stages[2] and "| caption2bbox | 12 | acc_iou50 0.25 |" in stages[2]
    rows = {row.split(" | ")[0].strip("| "): row for row in card.splitlines() if row.startswith("|")}
    begun, ended = newest_checkpoint(first).parts, newest_checkpoint(run).parts
    assert f"| `siglip-tiny` | `{begun['vision'].start[:16]}` | moved {begun['vision'].distance:.4g} | frozen |" in rows["vision"]
    assert "| `weights/decoder` |" in rows["language"] and f"`{ended['language'].hash[:16]}` |" in rows["language"]
    assert "| random, seed 0 |" in rows["projector"]
    assert str(tmp_path) not in card and not history(newest_checkpoint(run))[0][0].went_on


def test_a_run_whose_origin_went_on_says_so(tmp_path):
    first = write_run(tmp_path / "first")
    run = write_run(tmp_path / "second", stage="stage2", model={"init_from": str(first)})  # starts from what `first` started from
    export(run, tmp_path / "out", "encoder", "blank")
    assert "the next run did not start from this run's newest checkpoint" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_refused(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert "--top blank" in refused(capsys, run, out, "--as", "encoder")
    assert "random weights" in refused(capsys, run, out, "--as", "encoder", "--top", "start")
    assert "--top" in refused(capsys, run, out, "--as", "llava", "--top", "blank")
    assert "--start-weights" in refused(capsys, run, out, "--as", "llava", "--start-weights", run)
    assert str(run) in refused(capsys, run, run, "--as", "llava")
    assert "--for-transformers-4" in refused(capsys, run, out, "--as", "encoder", "--for-transformers-4")
    assert "a.safetensors" in refused(capsys, run, tmp_path / "a.safetensors", "--as", "llava")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert str(tmp_path / "empty") in refused(capsys, tmp_path / "empty", out, "--as", "llava")
    blind = write_run(tmp_path / "blind", stage="pretrain_text")
    assert "pretrain_text" in refused(capsys, blind, out, "--as", "encoder", "--top", "blank")
    last = write_run(tmp_path / "last", changed(SIGLIP_TINY, level="last"))
    assert "reads the level 'last'" in refused(capsys, last, out, "--as", "encoder", "--top", "blank")
    assert "vision level 'last'" in refused(capsys, last, out, "--as", "llava")
    for name, above, remedy in (
        ("built", {"built_level": "last"}, "has trained blocks above"), ("not-built", {}, "use --top blank"),
    ):  # fmt: skip
        internvit = write_run(tmp_path / name, changed(INTERNVIT_TINY, **above))
        error = refused(capsys, internvit, out, "--as", "encoder", "--top", "start")
        assert "hidden_states[" in error and remedy in error
        assert "InternViT" in refused(capsys, internvit, out, "--as", "llava")
    odd = write_run(tmp_path / "odd", changed(SIGLIP_TINY, norm="rms"))
    assert "SiglipVisionModel: " in refused(capsys, odd, out, "--as", "encoder", "--top", "blank")
    export(run, tmp_path / "done", "encoder", "blank")
    assert str(tmp_path / "done") in refused(capsys, tmp_path / "done", out, "--as", "llava")
    assert not out.exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_llava_that_other_readers_misread_is_stated(tmp_path, capsys):
    run, out = write_run(tmp_path / "run", changed(SIGLIP_TINY, level="final")), tmp_path / "out"
    error = refused(capsys, run, out, "--as", "llava")
    assert "transformers 5 and vLLM" in error and "--for-transformers-4" in error and not out.exists()
    assert main([str(run), str(out), "--as", "llava", "--for-transformers-4"]) == 0
    assert "note: load it only with transformers 4.57" in capsys.readouterr().out
    assert "**Load it only with transformers 4.57**" in (out / "README.md").read_text()


def test_a_model_is_the_same_from_a_run_from_its_own_directory_and_from_an_export(tmp_path):
    run = write_run(tmp_path / "run", CLIP_TINY, LLAMA)
    expected = dict(newest_checkpoint(run).tensors("model"))
    export(run, tmp_path / "exported", "llava")
    pt_granvit.GranViT.from_pretrained(run, device="cpu").save_pretrained(tmp_path / "saved")
    for name in ("run", "saved", "exported"):
        loaded = pt_granvit.GranViT.from_pretrained(tmp_path / name, device="cpu")
        found = {n: p.detach().numpy() for n, p in loaded.named_parameters()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    ms_granvit = pytest.importorskip("ms_granvit")
    model = ms_granvit.GranViT.from_pretrained(tmp_path / "saved", device="cpu")
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), expected.pop(parameter.name), err_msg=parameter.name)
    assert not expected


@pytest.mark.parametrize("package", ["pt_granvit", "ms_granvit"])
def test_a_model_and_each_of_its_parts_are_saved_and_nothing_else_in_the_directory_is_touched(package, tmp_path):
    run = write_run(tmp_path / "run", CLIP_TINY, LLAMA)
    expected = dict(newest_checkpoint(run).tensors("model"))
    model = pytest.importorskip(package).GranViT.from_pretrained(run, device="cpu")
    saved = tmp_path / "saved"
    saved.mkdir()
    stale = [saved / "model-00001-of-00002.safetensors", saved / "model.safetensors.index.json"]
    others = [saved / "model-best.safetensors", saved / "model.safetensors.bak"]
    for path in (*stale, *others):
        path.write_text("an earlier save's, or the user's own")
    for part, module in (("", model), ("vision.", model.vision), ("language.", model.language)):
        module.save_pretrained(saved)
        assert not any(path.exists() for path in stale) and all(path.exists() for path in others)
        found = TensorSet(saved)
        assert found.shapes.keys() == {name for name in expected if name.startswith(part)}
        for name in found.shapes:
            np.testing.assert_array_equal(found.read(name), expected[name], err_msg=name)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "examples:" in (output := capsys.readouterr().out) and "--as llava" in output and "--top start" in output
