"""`cdetr benchmark compile`, on this machine's devices with a stand-in for the detector; for TPUs and GPUs the demo."""

import importlib.util
import re
import subprocess
import sys

import flax.linen as nn
import jax
import pytest
from jax.experimental import topologies

from cdetr_jax import build
from cdetr_jax.cli import benchmark_compile, main
from cdetr_jax.cli.benchmark_compile import Chip, Shape
from cdetr_jax.cli.settings import read_config
from cdetr_jax.structs import Predictions
from cdetr_jax.training import memory
from cdetr_jax.training.memory import Compiled
from cdetr_jax.training.parallel import Trainer
from cdetr_jax.training.step import new_rng

COMMAND = ["benchmark", "compile", "--config=configs/demo.py"]
HIDDEN = 7
PARAMETERS = 3 * HIDDEN + HIDDEN + HIDDEN * 2 * 5 * 7 + 2 * 5 * 7  # of the stand-in


class StandIn(nn.Module):
    """2 layers, 5 queries, 3 classes."""

    num_queries: int = 5
    class_loss: str = "focal"

    @nn.compact
    def __call__(self, images, sizes_hw, train=False):
        x = nn.tanh(nn.Dense(HIDDEN, name="backbone")(images.mean((1, 2)) / 255.0))
        x = nn.Dense(2 * 5 * 7, name="heads")(x).reshape(-1, 2, 5, 7).swapaxes(0, 1)
        return Predictions(logits=x[..., :3], boxes_cxcywh=nn.sigmoid(x[..., 3:]))


def tables(out):
    """Rows of each table by their first two columns, each a dict by the header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", out, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        assert all(len(row) == len(header) for row in rows), "a table that is not one"
        found.append({tuple(row[:2]): dict(zip(header, row, strict=True)) for row in rows})
    return found


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(build, "make_model", lambda *_: StandIn())
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the other tests go on sharing compilations


def test_tables_and_what_is_in_them(capsys, monkeypatch, stand_in):
    seen, programs_table = [], benchmark_compile.programs_table
    monkeypatch.setattr(
        benchmark_compile, "programs_table", lambda shapes: seen.extend(shapes) or programs_table(shapes)
    )
    monkeypatch.setitem(benchmark_compile.CHIPS, "cpu", Chip(memory_gib=0.001, gb_per_s=1, tflop_per_s=1))
    main.run([*COMMAND, "--config.data.train_shapes=((32,40),(40,32))", "--config.train.accumulation_steps=2"])
    out = capsys.readouterr().out
    programs, shapes = tables(out)
    for_all = ("cost", "loss", "add", "apply")
    assert set(programs) == {
        *[(name, shape) for name in ("forward", "backward") for shape in ("32x40", "40x32")],
        *[(name, "all") for name in for_all],
        ("detect", "96x96"),
    }
    pictures = {name: row["pictures"] for (name, _), row in programs.items()}
    assert (pictures["forward"], pictures["detect"]) == ("4", "10")  # 16 in 2 micro-batches, and 20, on 2 devices
    assert set(shapes) == {("32x40", "training"), ("40x32", "training"), ("96x96", "evaluation")}
    row = shapes["32x40", "training"]
    assert row["fits"] == "yes"
    assert float(row["bound, ms"]) <= float(row["with traffic, ms"])
    assert int(row["largest batch"].removeprefix("~")) >= 4

    compiled = seen[0].programs
    assert compiled["apply"].all_reduced == 4 * PARAMETERS
    assert compiled["forward"].arguments == 4 * PARAMETERS + 4 * 32 * 40 * 3  # what a program does not read is left out
    assert compiled["backward"].outputs == 4 * PARAMETERS + 4 * 8  # with a pointer to each of its 4 arrays
    assert compiled["add"].arguments == 2 * 4 * PARAMETERS
    assert 3 * 4 * PARAMETERS < compiled["apply"].aliased < compiled["apply"].arguments  # parameters and both moments


def test_all_reduced_bytes():
    text = """
      %a = (f32[3,5]{1,0:T(8,128)S(1)}, bf16[7]{0}, /*index=2*/f32[]) all-reduce(%x, %y, %z), channel_id=1
      %b = ((s32[2]{0}), s32[2]{0}) all-reduce-start(%w), channel_id=2
      %d = s32[2]{0} all-reduce-done(%b)
      %c = f32[9] get-tuple-element(%a), index=0, metadata={op_name="all-reduce"}
    """
    assert memory.all_reduced_bytes(text) == 4 * 15 + 2 * 7 + 4 + 4 * 2


def program(**sizes):
    nothing = dict.fromkeys(("seconds", "arguments", "outputs", "aliased", "temporaries", "code", "all_reduced"), 0)
    return Compiled(**nothing | {"flops": 0.0, "moved": 0.0} | sizes)


def test_what_a_step_takes_at_least():
    chip = Chip(memory_gib=1, gb_per_s=2, tflop_per_s=3)
    programs = {
        "forward": program(flops=3e12, arguments=2 * 10**8, moved=4e9),  # 1 s of FLOPs, 0.1 of arguments, 2 of traffic
        "apply": program(arguments=10**9, outputs=10**9, moved=2e9),  # 1 s of arguments and outputs
    }
    assert benchmark_compile.step_seconds(programs, 1, chip) == pytest.approx((2, 3))
    assert benchmark_compile.step_seconds(programs, 3, chip) == pytest.approx((4, 7))


def test_in_how_few_parts_a_step_fits(stand_in):
    config = read_config("demo", [])
    functions = build.make_step_functions(config, 3, build.make_schedules(config, 10))
    trainer = Trainer(functions, jax.devices()[:1])
    state = trainer.shapes(jax.eval_shape(lambda: functions.init(new_rng(0), (32, 32))))

    def parts(available):
        return memory.parts_that_fit(trainer, state, 6, (64, 96), 4, available, num_shapes=2)

    whole, all_at_once = parts(1e12)
    assert whole == 1
    assert all_at_once > 6 * 64 * 96 * 3 + 3 * 4 * PARAMETERS
    in_two, half = parts(all_at_once - 1)
    assert in_two == 2
    assert half < all_at_once
    assert parts(half) == (2, half)
    one_by_one, least = parts(0)
    assert (one_by_one, least < half) == (6, True)  # what does not fit either, but there is no less


def test_what_does_not_fit():
    class TooLarge:
        lowered = None

        @property
        def compiled(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")

    compiled = memory.compile_program(TooLarge())
    shape = Shape((32, 40), 4, {"forward": compiled, "backward": program(arguments=2**20)})
    (programs,) = tables(benchmark_compile.programs_table([shape]))
    (shapes,) = tables(
        benchmark_compile.shapes_table([shape], state=None, accumulation_steps=1, device=jax.devices()[0])
    )
    assert programs["forward", "32x40"]["compiled, s"] == "too large"
    assert programs["backward", "32x40"]["arguments, MiB"] == "1.0"
    assert shapes["32x40", "training"]["fits"] == "no"


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main.run([*COMMAND, "--topology=v5e:2x2"])
    assert re.search(r"needs libtpu.*pip install 'libtpu[=~<>]", capsys.readouterr().err)


def test_without_the_cuda_plugin(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main.run([*COMMAND, "--topology=h100:8"])
    assert re.search(r"needs JAX's CUDA plugin.*pip install 'jax\[cuda12-local\]==", capsys.readouterr().err)


def test_there_is_no_such_gpu(capsys):
    with pytest.raises(SystemExit):
        main.run([*COMMAND, "--topology=h300"])
    assert re.search("unknown --topology=h300; expected .*v5e:2x2, .*h100", capsys.readouterr().err)


def test_what_a_gpus_kernels_move():
    text = """HloModule jit_f

%fused (p: f32[2,3]) -> f32[2,3] {
  ROOT %sin = f32[2,3]{1,0} sine(%p)
}

ENTRY %main (x: f32[2,3], y: pred[3]) -> (bf16[2,5], f32[2,3]) {
  %x = f32[2,3]{1,0} parameter(0), metadata={op_name="x"}
  %y = pred[3]{0} parameter(1)
  %call = (bf16[2,5]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul"
  %first = bf16[2,5]{1,0} get-tuple-element(%call), index=0
  %wrapped_slice.1 = bf16[1,5]{1,0} fusion(%first), kind=kLoop, calls=%fused
  %fusion = (f32[2,3]{1,0}, f32[3]{0}) fusion(%x, /*index=1*/%y), kind=kLoop, calls=%fused
  %second = f32[2,3]{1,0} get-tuple-element(%fusion), index=0
  ROOT %tuple = (bf16[2,5]{1,0}, f32[2,3]{1,0}) tuple(%first, %second)
}
"""
    call, part, fusion = 24 + 3 + 20, 10 + 10, 24 + 3 + 24 + 12
    assert memory.moved_bytes(text) == call + part + fusion


def test_unknown_topology(capsys, monkeypatch, stand_in):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU v9")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(benchmark_compile.os, "environ", {})
    with pytest.raises(SystemExit):
        main.run([*COMMAND, "--topology=v9:2x2"])
    assert re.search("unknown --topology=v9:2x2: .*TPU v9; expected one such as .*v5e:2x2", capsys.readouterr().err)


def test_without_pictures_it_says_how_to_name_shapes(capsys, stand_in):
    with pytest.raises(SystemExit):
        main.run(["benchmark", "compile", "--config=configs/conditional_detr_r50.py"])
    assert "--shapes=800x1344" in capsys.readouterr().err


@pytest.mark.chips
@pytest.mark.parametrize(
    ("topology", "package", "batch", "attention"),
    [
        ("v5e:2x2", "libtpu", 2, "einsum"),
        ("v5e:2x2", "libtpu", 2, "fused"),
        ("h100:8", "jax_cuda12_plugin", 64, "einsum"),  # of 2 pictures a GPU's bound rounds to 0
        ("h100:8", "jax_cuda12_plugin", 64, "fused"),
        ("a100", "jax_cuda12_plugin", 64, "fused"),
        ("l4", "jax_cuda12_plugin", 64, "fused"),
    ],
)
def test_the_demo_on_chips_that_are_not_there(topology, package, batch, attention):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: make test-chips")
    arguments = [f"--topology={topology}", f"--batch={batch}", "--shapes=96x96"]
    model = ["--config.model.compute_dtype=bfloat16", f"--config.model.attention={attention}"]
    command = [sys.executable, "-m", "cdetr_jax", *COMMAND, *arguments, *model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs, shapes = tables(done.stdout)
    assert {name for name, _ in programs} == {"forward", "cost", "loss", "backward", "apply", "detect"}
    are_several = ":" in topology
    assert programs["apply", "all"]["all-reduced, MiB"] == ("5.7" if are_several else "0.0")  # all of its parameters
    assert 0.1 * batch < float(programs["backward", "96x96"]["GFLOP"]) < 0.5 * batch
    assert 0.01 < float(programs["backward", "96x96"]["GB moved"]) < 0.5 * batch
    assert [row["fits"] for row in shapes.values()] == ["yes", "yes"]
    assert 0 < float(shapes["96x96", "training"]["bound, ms"]) < 10
    assert 0 < float(shapes["96x96", "training"]["with traffic, ms"]) < 10


@pytest.mark.chips
def test_no_gpu_at_all():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("needs jax_cuda12_plugin: make test-chips")
    done = subprocess.run(
        [sys.executable, "-m", "cdetr_jax", *COMMAND, "--topology=h100:0"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: unknown --topology=h100:0: " in done.stderr
    assert "Traceback" not in done.stderr
