"""`cdetr benchmark compile`: what a recipe's programs take on a chip, by compiling them where there may be none.

Compiled for a topology that libtpu or the CUDA plugin describes, nothing runs: sizes, FLOPs and bytes are XLA's own
analysis of each program, and times are bounds from the chip's published peak rates.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies

from cdetr_jax import build
from cdetr_jax.cli.data_flag import config_of
from cdetr_jax.config_check import check_config, count_train_devices
from cdetr_jax.training.memory import GIB, MIB, Compiled, compile_program, memory_needs
from cdetr_jax.training.parallel import Program, Trainer
from cdetr_jax.training.step import TrainState, new_rng

NOTES = """
All of one chip. GB moved is XLA's count for all operations of a program, also of what stays in the chip's inner memory;
a loop's body counts once. Residuals go from forward to backward, with the predictions.
The peak is an estimate: the state; arguments, outputs and temporaries of the program that needs most besides; the code
of all programs above; with accumulation also the residuals and gradients of another micro-batch. What the runtime takes
itself is not in it, nor are pictures on their way. The largest batch is one too: all that is not state, gradients or
code is taken as proportional to the pictures (?: a program's temporaries all stay in the inner memory). --batch
compiles it.
A step, or an evaluation batch, takes longer than its bound, which is the time of each program's FLOPs at the chip's
published peak, or of its arguments and outputs once to or from memory at the published rate. With traffic, it is all GB
moved to or from memory. The all-reduce, the matching on the host and the reading of pictures come on top of either."""
GPU_NOTES = """
For a GPU that is not there XLA cannot try kernels out: it takes cuBLAS for all products and cuDNN's default for the
convolutions, without their workspaces, and tells no size of code. FLOPs are those of the program before it is
optimised. Float32 products run at half of the peak (TF32) or less. JAX takes three quarters of a GPU's memory, which is
what has to hold the peak; XLA_PYTHON_CLIENT_MEM_FRACTION changes that."""


class Chip(NamedTuple):
    """What one JAX device has: a chip, or half of one of TPU v3 and TPU7x.

    Attributes:
      memory_gib: what libtpu 0.0.42 lets a program use of it, from its message about one that does not fit; of a GPU
        three quarters, as JAX takes by default.
      gb_per_s, tflop_per_s: peak rates of memory and, in bfloat16, of the matrix units, as published in
        https://docs.cloud.google.com/tpu/docs/ v3, v4, v5e, v5p, v6e and tpu7x, and in NVIDIA's data sheets (without
        sparsity). A product of float32 arrays is one of bfloat16 as long as model.matmul_precision is not higher (6 of
        them with `highest`): it counts as one.
    """

    memory_gib: float
    gb_per_s: float
    tflop_per_s: float


CHIPS = {
    "TPU v3": Chip(15.48, 450, 61.5),
    "TPU v4": Chip(30.75, 1200, 275),
    "TPU v5 lite": Chip(15.75, 819, 197),
    "TPU v5": Chip(95.74, 2765, 459),
    "TPU v6 lite": Chip(31.25, 1638, 918),
    "TPU7x": Chip(94.75, 3690, 1153.5),
}


class Gpu(NamedTuple):
    """A GPU as XLA's compiler has to know it, by its data sheet and the CUDA programming guide's table of capabilities.

    Attributes:
      kind: JAX's name of it.
      gb_per_s, tflop_per_s: as of a `Chip`.
      capability: major and minor.
      cores, units: streaming multiprocessors, and float32 units of one.
      threads, shared_bytes: of one multiprocessor.
    """

    kind: str
    gb_per_s: float
    tflop_per_s: float
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared_bytes: int
    ghz: float
    cache_bytes: int
    memory_bytes: int

    def describe(self) -> str:
        """As a GpuTargetConfigProto."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 8 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              core_count: {self.cores}
              fpus_per_core: {self.units}
              threads_per_core_limit: {self.threads}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_bytes - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              clock_rate_ghz: {self.ghz}
              l2_cache_size: {self.cache_bytes}
              memory_bandwidth: {int(self.gb_per_s * 1e9)}
              device_memory_size: {self.memory_bytes}
            }}"""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 2039, 312, (8, 0), 108, 64, 2048, 167936, 1.41, 40 * MIB, 85100068864),
    "l4": Gpu("NVIDIA L4", 300, 121, (8, 9), 58, 128, 1536, 102400, 2.04, 48 * MIB, 24152899584),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 3352, 989, (9, 0), 132, 128, 2048, 233472, 1.98, 50 * MIB, 84942979072),
    "h200": Gpu("NVIDIA H200", 4800, 989, (9, 0), 132, 128, 2048, 233472, 1.98, 50 * MIB, 151397597184),
}
CHIPS |= {gpu.kind: Chip(0.75 * gpu.memory_bytes / GIB, gpu.gb_per_s, gpu.tflop_per_s) for gpu in GPUS.values()}
TOPOLOGIES = (
    "v3:2x2, v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, and more chips, such as v5e:4x4, or a GPU: "
    "a100, l4, h100, h200, and more of them, such as h100:8, or h100:2x8 of 2 hosts"
)

# Its recursion overflows the stacks of 1 and 2 MB that libtpu gives its threads by default.
_STACKS = ("default_thread_stack_size", "fibers_default_thread_stack_size", "xla_internal_thread_stack_size_bytes")


class Shape(NamedTuple):
    """A padded shape, how many pictures of it a chip gets, and its programs; None: too large for the chip."""

    shape_hw: tuple[int, int]
    batch: int
    programs: dict[str, Compiled | None]


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints a table of the programs and one of the padded shapes.

    Raises: ValueError, if the config, its data or the topology are wrong; FileNotFoundError, if it has no padded shapes
      and its pictures are missing; ModuleNotFoundError without libtpu.
    """
    config = config_of(arguments.config, arguments.data, fields)
    check_config(config)
    devices = _devices(arguments.topology)
    jax.config.update("jax_enable_compilation_cache", False)  # the times of compilations are asked for
    parts, batch = config.train.accumulation_steps, config.train.batch_size
    processes = len({device.process_index for device in devices})
    if arguments.batch is None:
        devices = devices[: processes * count_train_devices(batch, parts, len(devices) // processes, processes)]
    train_batch = arguments.batch or batch // parts // len(devices)
    eval_batch = arguments.batch or -(-config.eval.batch_size // len(devices))
    train_shapes, eval_shapes = _shapes(config, arguments.shapes, len(devices))
    functions = build.make_step_functions(config, config.model.num_classes or 91, build.make_schedules(config, 1000))
    trainer = Trainer(functions, devices)
    state = trainer.shapes(jax.eval_shape(lambda: functions.init(new_rng(0), (64, 64))))

    known: dict[Any, Compiled | None] = {}
    shapes = []
    for shape_hw in train_shapes:
        programs = trainer.train_programs(state, train_batch, shape_hw, arguments.targets, parts > 1)
        shapes.append(Shape(shape_hw, train_batch, compile_all(programs, shape_hw, known)))
    for shape_hw in eval_shapes:
        programs = [trainer.detect_program(state.eval_variables, eval_batch, shape_hw, arguments.targets)]
        shapes.append(Shape(shape_hw, eval_batch, compile_all(programs, shape_hw, known)))

    print(
        f"{arguments.config or arguments.data}, {config.model.compute_dtype}, "
        f"{len(devices)} x {devices[0].device_kind}, "
        f"jax {jax.__version__}\n\n{programs_table(shapes)}\n\n{shapes_table(shapes, state, parts, devices[0])}"
    )
    print(NOTES)
    if arguments.topology != "local" and devices[0].platform == "gpu":
        print(GPU_NOTES)


def _devices(topology: str) -> list[jax.Device]:
    """Devices to compile for: those of this machine, or TPUs or GPUs, of which none need be there."""
    if topology == "local":
        return jax.local_devices()
    if gpus := re.fullmatch(rf"({'|'.join(GPUS)})(?::(?:(\d+)x)?(\d+))?", topology):
        name, hosts, of_each = gpus.groups(default="1")
        arguments = _gpu_arguments(GPUS[name], f"1x{hosts}x{of_each}")
    elif re.match(r"v\d|tpu", topology):
        arguments = _tpu_arguments(topology)
    else:
        raise ValueError(f"unknown --topology={topology}; expected one such as {TOPOLOGIES}")
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(**arguments).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"unknown --topology={topology}: {error}; expected one such as {TOPOLOGIES}") from None


def _tpu_arguments(topology: str) -> dict[str, Any]:
    """Of `get_topology_desc`. Raises: ModuleNotFoundError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        wanted = [line.split(";")[0] for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
        raise ModuleNotFoundError(
            f"--topology={topology} needs libtpu, which compiles for TPUs on any Linux machine: "
            f"pip install '{(wanted or ['libtpu'])[0]}'"
        )
    stacks = [f"--{name}={128 * MIB}" for name in _STACKS]
    os.environ |= {
        "LIBTPU_INIT_ARGS": " ".join([*stacks, os.environ.get("LIBTPU_INIT_ARGS", "")]),
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # changes nothing, but its absence is complained of
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # also while another process computes on the TPU
    }
    settings = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # both cores are one device
    if re.fullmatch(r"\w+:1(x1)*", topology):
        settings["chips_per_host_bounds"] = [1, 1, 1]
    return {"topology_name": topology, "platform": "tpu", **settings}


def _gpu_arguments(gpu: Gpu, shape: str) -> dict[str, Any]:
    """The same; the shape is slices x hosts x GPUs of each. Raises: ModuleNotFoundError without the CUDA plugin."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ModuleNotFoundError(
            "--topology of a GPU needs JAX's CUDA plugin, which compiles on any Linux machine, also without CUDA: "
            f"pip install 'jax[cuda12-local]=={jax.__version__}'"
        )
    # No CUDA need be there, and no GPU to choose a Triton kernel's tiles with.
    os.environ |= {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false",
    }
    return {"platform": "cuda", "topology": shape, "target_config": gpu.describe()}


def _shapes(
    config: ml_collections.ConfigDict, chosen: Sequence[tuple[int, int]], device_count: int
) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
    """The padded shapes of training and of evaluation."""
    if chosen:
        return chosen, chosen
    has_eval = config.eval.every_epochs > 0
    shapes = config.data.train_shapes, config.data.eval_shapes if has_eval else ()
    try:
        if not shapes[0]:
            shapes = build.make_plan_settings(config, build.make_source(config, "train")).shapes, shapes[1]
        if not shapes[1] and has_eval:
            plan = build.make_eval_plan(config, build.make_source(config, "eval"), device_count)
            shapes = shapes[0], [tuple(shape) for shape in np.unique(plan.shapes_hw, axis=0).tolist()]
    except (FileNotFoundError, ValueError) as error:
        error.add_note("the padded shapes come from the pictures; without them name shapes: --shapes=800x1344,1344x800")
        raise
    return shapes


def compile_all(
    programs: Iterable[Program], shape_hw: tuple[int, int], known: dict[Any, Compiled | None]
) -> dict[str, Compiled | None]:
    """Compiles what is not `known` yet, with a line of progress each, up to the first that is too large."""
    compiled = {}
    for program in programs:
        arguments = [(x.shape, x.dtype) for x in jax.tree.leaves(program.arguments)]
        key = (program.name, str(arguments))
        if key not in known:
            print(f"compiling {program.name} for {_hxw(shape_hw)} ...", end=" ", flush=True, file=sys.stderr)
            known[key] = compile_program(program)
            print(f"{known[key].seconds:.1f} s" if known[key] else "too large for the chip", file=sys.stderr)
        compiled.setdefault(program.name, known[key])  # of the two that add, that of gradients
        if known[key] is None:
            break
    return compiled


def programs_table(shapes: Sequence[Shape]) -> str:
    """One row for each program; those that are the same for all shapes come once."""
    header = "program|shape|pictures|compiled, s|arguments, MiB|outputs, MiB|temporaries, MiB|code, MiB|GFLOP|GB moved"
    rows: dict[Any, list[str]] = {}
    for shape_hw, batch, programs in shapes:
        for name, compiled in programs.items():
            shape = _hxw(shape_hw) if name in ("forward", "backward", "detect") else "all"
            row = [name, shape, str(batch)]
            if compiled is None:
                row += ["too large"]
            else:
                sizes = [compiled.arguments, compiled.outputs, compiled.temporaries, compiled.code]
                row += [f"{compiled.seconds:.1f}", *[f"{size / MIB:.1f}" for size in sizes]]
                row += [f"{compiled.flops / 1e9:.1f}", f"{compiled.moved / 1e9:.2f}"]
                row += [f"{compiled.all_reduced / MIB:.1f}"]
            rows[tuple(row[:3])] = row
    return _table([*header.split("|"), "all-reduced, MiB"], rows.values())


def shapes_table(shapes: Sequence[Shape], state: TrainState, accumulation_steps: int, device: jax.Device) -> str:
    """One row for each padded shape: whether it fits, and how fast it can be at best. `state`: see `train_programs`."""
    header = "shape|for|pictures|residuals, GiB|peak, GiB|fits|spare, GiB|largest batch|bound, ms|with traffic, ms"
    chip = CHIPS.get(device.device_kind)
    is_here = device in jax.local_devices() and device.platform != "tpu"
    own = (device.memory_stats() or {}).get("bytes_limit") if is_here else None
    available = own or (chip.memory_gib * GIB if chip else None)
    code = sum({id(c): c.code for shape in shapes for c in shape.programs.values() if c}.values())
    rows = []
    for shape_hw, batch, programs in shapes:
        row = [_hxw(shape_hw), "evaluation" if "detect" in programs else "training", str(batch)]
        if None in programs.values():
            rows.append([*row, "", "", "no"])
            continue
        needs = memory_needs(programs, state, accumulation_steps)
        peak = code + max(map(sum, needs))
        row += [f"{programs['forward'].outputs / GIB:.2f}" if "forward" in programs else "", f"{peak / GIB:.2f}"]
        if available:
            largest = min(int((available - code - fixed) / (growing / batch)) for fixed, growing in needs if growing)
            # Temporaries that all are in the inner memory say nothing of those of a large batch.
            known = all(programs[name].temporaries for name in ("forward", "backward", "detect") if name in programs)
            row += ["yes" if peak <= available else "no", f"{(available - peak) / GIB:.2f}"]
            row += [f"~{max(largest, 0)}" if known else "?"]
        if chip:
            row += [f"{1000 * seconds:.1f}" for seconds in step_seconds(programs, accumulation_steps, chip)]
        rows.append(row)
    return _table(header.split("|"), rows)


def step_seconds(programs: dict[str, Compiled], accumulation_steps: int, chip: Chip) -> tuple[float, float]:
    """What a step, or an evaluation batch, takes at least; and if all that is moved goes to or from memory."""
    bound = traffic = 0.0
    for name, program in programs.items():
        times = {"apply": 1, "detect": 1, "add": accumulation_steps - 1}.get(name, accumulation_steps)
        least = max(
            program.flops / chip.tflop_per_s / 1e12, (program.arguments + program.outputs) / chip.gb_per_s / 1e9
        )
        bound += times * least
        traffic += times * max(least, program.moved / chip.gb_per_s / 1e9)
    return bound, traffic


def _hxw(shape_hw: tuple[int, int]) -> str:
    return "{}x{}".format(*shape_hw)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown with aligned columns; a row may end early."""
    lines = [list(header), *[[*row, *[""] * (len(header) - len(row))] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]])
    return "\n".join(
        f"| {line[0]:{widths[0]}} | {' | '.join(map(str.rjust, line[1:], widths[1:]))} |" for line in lines
    )
