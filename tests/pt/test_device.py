"""The PyTorch package on the stand-in device: every stage runs, no tensor is left on the host, and few reads make it wait."""
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from granvit.checkpoint.run_writer import CheckpointWriter  # noqa: E402
from granvit.config import Bucket, RunConfig, resolve_models  # noqa: E402
from granvit.data.batch import Batch, Packer, Question, join  # noqa: E402
from granvit.engine import StepInputs  # noqa: E402
from granvit.evaluate import Evaluator, evaluation_file  # noqa: E402
from granvit.stages import STAGES  # noqa: E402
from parity.capture import KERNELS, Request, compute  # noqa: E402
from parity.fixture import make_fixture, random_batch, start_values  # noqa: E402
from pt_granvit import introspect  # noqa: E402
from pt_granvit import vision as vision_module  # noqa: E402
from pt_granvit.engine import Engine  # noqa: E402
from pt_granvit.vision import VisionEncoder  # noqa: E402
from tests.conftest import random_record  # noqa: E402
from tests.helpers import run_config  # noqa: E402
from tests.pt.stand_in import DeviceTensor, attached  # noqa: E402

READS_PER_STEP = 1  # how often the host waits for a value in one training step
ON_DEVICE = {"device": "npu", "compute": "bfloat16"}
SMALL_CROPS = {"distill": {"crop_size": 16}}  # the teacher's positions are resampled
MIXED = "Expected all tensors to be on the same device"


@pytest.fixture
def device():
    with attached() as found:
        yield found


def make_engine(config: RunConfig) -> Engine:
    models = resolve_models(config)
    return Engine(config, *models, start_values(*models, seed=0).items())


def on_device(**sections) -> RunConfig:
    return run_config(**{**sections, "runtime": {**ON_DEVICE, **sections.get("runtime", {})}})


def on_host(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": "cpu"})})


def rows_for(config: RunConfig) -> Batch:
    vision, language = resolve_models(config)
    return random_batch(vision, language, 2, 2, 64, 16, 0, config.crop_size(vision))


def step_inputs(step: int, batch: Batch, micro_batches: int = 1) -> StepInputs:
    return StepInputs(step, 1e-3, 0.9, micro_batches * batch.tokens, micro_batches * batch.boxes)


def step(engine: Engine, batch: Batch, number: int = 1):
    return engine.step([batch], step_inputs(number, batch))


def close_to(result, expected) -> None:
    """Equal to the result on the host up to bfloat16 rounding (the fused attention adds in another order)."""
    for name, value in vars(expected).items():
        assert getattr(result, name) == pytest.approx(value, rel=0.02, abs=1e-3), name


STEPS = {
    **{stage: {"stage": stage} for stage in STAGES},
    "small crops": SMALL_CROPS,
    "pooled grid": {"distill": {"grid": 2}},
    "cosine": {"distill": {"loss": "cosine"}},
    "recomputation": {"runtime": {"recompute": True}},
    "composed attention": {"runtime": {"kernels": {"attention": "composed"}}},
    "float32": {"runtime": {"compute": "float32"}},
}


@pytest.mark.parametrize("sections", STEPS.values(), ids=STEPS)
def test_a_training_step_runs_and_the_host_waits_as_often_as_stated(device, sections):
    config = on_device(**sections)
    engine, batch = make_engine(config), rows_for(config)
    device.reads.clear()
    result = engine.step([batch, batch], step_inputs(1, batch, 2))
    assert len(device.reads) == READS_PER_STEP, device.reads
    assert all(tensor.device.type == "npu" for tensor in held_by(engine).values())
    close_to(result, make_engine(on_host(config)).step([batch, batch], step_inputs(1, batch, 2)))


def test_a_tiled_step_runs(device, chat):
    config = on_device(vision={"tiling": 4}, data={"regions_per_row": 3}, train={"global_batch": 2})
    vision, _ = resolve_models(config)
    packer = Packer(vision, chat, 3, vision.image_size, 1.0, 10**6)
    asked = [Question("bbox2caption", 1), Question("bbox2caption", 0), Question("global")]
    batch = join([packer.row(random_record(f"r{i}", 2, i), asked, Bucket(length=640, answers=72)) for i in range(2)])
    assert batch.grids_B2 is not None and batch.boxes == 4
    engine = make_engine(config)
    device.reads.clear()
    result = step(engine, batch)
    assert len(device.reads) == READS_PER_STEP, device.reads
    close_to(result, step(make_engine(on_host(config)), batch))


def test_a_value_read_within_a_step_is_counted(device, monkeypatch):
    engine, batch = make_engine(on_device()), rows_for(on_device())
    losses = Engine.losses

    def reading(self, *arguments):
        found = losses(self, *arguments)
        found[0].item()
        return found

    monkeypatch.setattr(Engine, "losses", reading)
    device.reads.clear()
    step(engine, batch)
    assert len(device.reads) == READS_PER_STEP + 1
    assert sum("test_device.py" in line for line in device.reads) == 1


def test_every_way_of_reading_is_counted_and_float64_is_refused(device):
    x = torch.ones(3, device="npu")
    ways = (
        lambda: x.cpu(), lambda: x.tolist(), lambda: x[0].item(), lambda: bool(x[0] > 0), lambda: float(x[0]), x.nonzero,
        lambda: x[x > 0], lambda: torch.zeros(3).copy_(x), lambda: torch.equal(x, x), lambda: x.to("cpu"),
    )  # fmt: skip
    for count, way in enumerate(ways, 1):
        way()
        assert len(device.reads) == count, device.reads
    x.to("npu"), x.add_(1), x[1:].sum(), torch.ones(3).sum().item()
    assert len(device.reads) == len(ways)
    with pytest.raises(TypeError, match="float64"):
        x.double()
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()


def test_a_tensor_that_meets_the_host_in_the_backward_pass_is_found(device):
    class Meets(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            return d * torch.ones(d.shape)

    x = torch.ones(3, device="npu", requires_grad=True)
    Meets.apply(x).sum().backward()
    with pytest.raises(RuntimeError, match=MIXED):
        x.detach()


def held_by(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of the engine by its path: parameters, buffers and attributes of modules, flat buffers, moments."""
    found = {}
    for root, module in (("model", engine.model), ("teacher", engine.teacher)):
        for path, part in () if module is None else module.named_modules():
            for kind in (part._parameters, part._buffers, vars(part)):
                found |= {f"{root}.{path}.{name}": value for name, value in kind.items() if isinstance(value, torch.Tensor)}
    for root, owner in (("trained", engine.trained), ("optimizer", engine.optimizer)):
        found |= {f"{root}.{name}": value for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
    return found


def put(engine: Engine, place: str, tensor: torch.Tensor) -> None:
    """Replaces the tensor at a path of `held_by`."""
    root, *path, name = place.split(".")
    owner = getattr(engine, root)
    owner = owner.get_submodule(".".join(filter(None, path))) if isinstance(owner, nn.Module) else owner
    for kind in (getattr(owner, "_parameters", {}), getattr(owner, "_buffers", {}), vars(owner)):
        if name in kind:
            kind[name] = tensor


def test_any_one_tensor_left_on_the_host_fails_the_step(device):
    config = on_device(**SMALL_CROPS)
    engine, batch = make_engine(config), rows_for(config)
    places = held_by(engine)
    assert {"teacher.embeddings.resample", "model.vision.mean", "optimizer.first_moment", "trained.gradients"} <= places.keys()
    unnoticed = []
    for place, tensor in places.items():
        host = tensor.detach().cpu()
        put(engine, place, nn.Parameter(host, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else host)
        try:
            step(engine, batch)
            unnoticed.append(place)
        except RuntimeError as error:
            assert MIXED in str(error), place
        put(engine, place, tensor)
        engine.trained.gradients.zero_()
    assert not unnoticed
    step(engine, batch)  # all tensors restored


def test_the_two_faults_that_were_there_are_found_when_put_back(device, monkeypatch):
    with monkeypatch.context() as patch:  # the resampling of positions, made by from_numpy
        made = torch.tensor
        wrong = lambda x, **options: torch.from_numpy(x) if isinstance(x, np.ndarray) else made(x, **options)  # noqa: E731
        patch.setattr(vision_module.torch, "tensor", wrong)
        engine = make_engine(on_device(**SMALL_CROPS))
        with pytest.raises(RuntimeError, match=MIXED):
            step(engine, rows_for(on_device(**SMALL_CROPS)))
    fixture = make_fixture(0)
    with monkeypatch.context() as patch:  # operators' modules, built on the host
        build = introspect._operator
        patch.setattr(introspect, "_operator", lambda *arguments: on_the_host(build(*arguments)))
        with pytest.raises((RuntimeError, TypeError), match=f"{MIXED}|incompatible tensor type"):
            compute(fixture, "torch", Request(("ops",), 1, "bfloat16", "npu"))


def on_the_host(operator):
    def run(*inputs):
        with torch.device("cpu"):
            return operator(*inputs)

    return run


def test_generation_and_evaluation_equal_the_hosts(device, chat, store, tmp_path):
    config = on_device(
        stage="stage2",
        data={"buckets": [{"length": 512, "answers": 160}]},
        eval={"source": str(store.path), "rows": 2, "images": 3, "batch": 2, "max_new_tokens": 4},
        runtime={"compute": "float32"},
    )
    fixture, found, losses = make_fixture(0), [], []
    vision, _ = resolve_models(config)
    for name, one in (("device", config), ("host", on_host(config))):
        engine = make_engine(one)
        device.reads.clear()
        tokens = engine.generate(fixture.prompts(), 5, stop_token=-1)
        reads = len(device.reads)
        evaluation = Evaluator(engine, one, vision, chat, tmp_path / name)(1)
        kept = json.loads(evaluation_file(tmp_path / name, 1).read_text())
        found.append((tokens.tolist(), evaluation.table, [p["answer"] for p in kept["predictions"]]))
        losses.append(evaluation.held_out)
        assert reads == (5 if name == "device" else 0)  # one for each token: the host checks for the stop token
    assert found[0] == found[1]
    assert losses[0].keys() >= {"loss"} and losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)


def test_paritys_records_are_made_on_the_device(device):
    """`parity/check.py --record`, one suite of each kind."""
    fixture = make_fixture(0)
    suites = ("ops", "generate", "model", "stage1")
    record = compute(fixture, "torch", Request(suites, 2, "bfloat16", "npu"))
    isolated = compute(fixture, "torch", Request(("isolated",), 2, "bfloat16", "npu", golden=record.suites["model"]))
    expected = compute(fixture, "torch", Request(("ops", "model"), 2, "bfloat16", "cpu"))
    assert record.suites.keys() == {*suites, KERNELS} and isolated.suites["isolated"].keys() == expected.suites["model"].keys()
    assert any(name.endswith("by npu_fusion") for name in record.suites.pop(KERNELS))
    for suite in ("ops", "model"):
        tensors = expected.suites[suite]
        for name, value in tensors.items():
            scale = np.abs(tensors[name.replace("k_proj.bias", "q_proj.bias")]).max()  # the true gradient of a key bias is 0
            np.testing.assert_allclose(record.suites[suite][name], value, atol=0.1 * max(scale, 1e-3), err_msg=f"{suite} {name}")


def test_a_checkpoint_goes_out_and_comes_back_bit_for_bit(device, tmp_path):
    config = on_device(**SMALL_CROPS)
    models, batch = resolve_models(config), rows_for(config)
    writer = CheckpointWriter(tmp_path, config, *models)
    engine = Engine(config, *models, writer.record_start(start_values(*models, seed=0).items()))
    step(engine, batch)
    saved = writer.save(engine, 1, {})
    later = [step(engine, batch, number) for number in (2, 3)]
    again = Engine(config, *models, saved.tensors("model"))
    for group in ("teacher", "first_moment", "second_moment"):
        again.load(group, saved.tensors(group))
    assert [step(again, batch, number) for number in (2, 3)] == later
    for (name, value), (_, other) in zip(engine.tensors("model"), again.tensors("model"), strict=True):
        np.testing.assert_array_equal(value, other, err_msg=name)


def test_an_encoder_built_on_the_device_is_there_whole(device):
    vision, _ = resolve_models(run_config())
    with torch.device("npu"):
        encoder = VisionEncoder(vision, torch.bfloat16, image_size=vision.image_size // 2)
    names = [*dict(encoder.named_parameters()), *dict(encoder.named_buffers())]
    assert "embeddings.resample" in names and "embeddings.resample" not in encoder.state_dict()
    assert all(isinstance(tensor, DeviceTensor) for tensor in (*encoder.parameters(), *encoder.buffers()))


def test_a_pretrained_encoder_is_put_on_the_device_named(device, tmp_path):
    vision, _ = resolve_models(run_config())
    VisionEncoder(vision, torch.float32).save_pretrained(tmp_path)
    on_device, on_cpu = (VisionEncoder.from_pretrained(tmp_path, device=name) for name in ("npu", "cpu"))
    assert all(isinstance(tensor, DeviceTensor) for tensor in (*on_device.parameters(), *on_device.buffers()))
    assert not any(isinstance(tensor, DeviceTensor) for tensor in (*on_cpu.parameters(), *on_cpu.buffers()))
