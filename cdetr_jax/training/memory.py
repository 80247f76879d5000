"""What the programs of a step take of a device's memory: XLA's own analysis, by compiling them and running nothing."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.extend.core

from cdetr_jax.training.parallel import Program, Trainer
from cdetr_jax.training.step import TrainState

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one chip; sizes in bytes.

    Attributes:
      arguments, outputs: `aliased` is part of both, written in the place of arguments.
      code: of the program itself, which lies in the chip's memory as well.
      moved: what all its operations read and write.
      all_reduced: what the chips sum up.
    """

    seconds: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    moved: float
    all_reduced: int


def compile_program(program: Program) -> Compiled | None:
    """None, if the compiler says that the program is too large for the device's memory."""
    program.lowered  # noqa: B018  traced before the clock starts
    start = time.perf_counter()
    try:
        compiled = program.compiled
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or _cost_without_device(program, text)
    return Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        moved=cost.get("bytes accessed", 0.0),
        all_reduced=all_reduced_bytes(text),
    )


def _cost_without_device(program: Program, text: str) -> dict[str, float]:
    """For a GPU that is not there, whose plugin counts nothing.

    FLOPs are those of the program before it is optimised, as afterwards its calls of cuBLAS and cuDNN tell none, and
    those that our own kernels tell.
    """
    from jaxlib import _jax  # as `Lowered.cost_analysis` does for devices that are there

    client = jax.local_devices(backend="cpu")[0].client
    flops = _jax.hlo_module_cost_analysis(client, program.lowered.compiler_ir("hlo").as_hlo_module())["flops"]
    flops += _kernels_flops(program.traced.jaxpr.jaxpr)
    return {"flops": flops, "bytes accessed": moved_bytes(text)}


def _kernels_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Of all Pallas kernels that are called."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            flops += equation.params["cost_estimate"].flops
        else:  # one of the branches of a choice, such as that of the platform
            inner = [_kernels_flops(jaxpr) for jaxpr in jax.extend.core.jaxprs_in_params(equation.params)]
            flops += max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
    return flops


def moved_bytes(text: str) -> int:
    """What the kernels of a compiled GPU program read and write, without the workspaces of cuBLAS and cuDNN."""
    instructions = re.findall(
        r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", text[text.index("\nENTRY ") :], re.MULTILINE
    )
    moved, sizes = 0, {}
    for name, types, operation, operands in instructions:
        is_call = operation == "custom-call"
        sizes[name] = _bytes_of_types(re.sub(r", [su]8\[\d+\]\S*\)$", "", types) if is_call else types)
        if operation not in ("parameter", "constant", "bitcast", "tuple", "get-tuple-element"):
            read = sum(sizes[operand] for operand in re.findall(r"%([\w.-]+)", operands))
            moved += sizes[name] + (sizes[name] if "slice" in name else read)
    return moved


def all_reduced_bytes(text: str) -> int:
    """What a compiled program's all-reduces take, from its text."""
    return sum(map(_bytes_of_types, re.findall(r"= (.*?) all-reduce(?:-done)?\(", text)))


def _bytes_of_types(types: str) -> int:
    """Of arrays as XLA writes them: `(f32[2,3]{1,0}, bf16[4])`."""
    return sum(
        math.prod(map(int, filter(None, sides.split(",")))) * int(bits) // 8
        for bits, sides in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", types.replace("pred[", "u8["))
    )


def memory_needs(programs: Mapping[str, Compiled], state: TrainState, accumulation_steps: int) -> list[tuple[int, int]]:
    """Bytes of one chip while each program runs, without code: those that stay, and those that grow with the batch."""
    whole = bytes_of(state)
    if "detect" in programs:
        detect = programs["detect"]
        return [(whole, detect.arguments - bytes_of(state.eval_variables) + detect.outputs + detect.temporaries)]
    forward, backward, apply = (programs[name] for name in ("forward", "backward", "apply"))
    network, grads = bytes_of(state.network), backward.outputs
    pictures = forward.arguments - network
    # The next micro-batch's forward is queued before this one's backward, whose gradients are added to the sum.
    more = accumulation_steps > 1
    return [
        (whole + more * grads, pictures + forward.outputs + forward.temporaries + more * forward.outputs),
        (
            whole + grads + more * grads,
            pictures + backward.arguments - network + backward.temporaries + more * forward.outputs,
        ),
        (apply.arguments + apply.outputs - apply.aliased + apply.temporaries, 0),
    ]


def parts_that_fit(
    trainer: Trainer,
    state: TrainState,
    pictures: int,
    shape_hw: tuple[int, int],
    targets: int,
    available: float,
    num_shapes: int = 1,
) -> tuple[int, int | None]:
    """In how few micro-batches a step fits a device: compiled in one, then in as many as the sizes ask for.

    Args:
      state: its shapes, see `Trainer.shapes`.
      pictures: of a step, on one device.
      shape_hw: the largest padded shape, in pixels.
      targets: T.
      available: bytes.
      num_shapes: of padded shapes: the programs of each lie in the device's memory.
    Returns: micro-batches, which divide the pictures, and the peak in bytes, an estimate. If nothing fits it is that of
      one picture at a time, or None, if the compiler refuses that.
    """
    parts = 1
    while True:
        programs: dict[str, Compiled | None] = {}
        for program in trainer.train_programs(state, pictures // parts, shape_hw, targets, parts > 1):
            programs[program.name] = compile_program(program)
            if programs[program.name] is None:
                break
        needs, peak = [], None
        if None not in programs.values():
            needs = memory_needs(programs, state, parts)
            code = sum(num_shapes * compiled.code for compiled in programs.values())
            peak = code + max(map(sum, needs))
        if parts == pictures or (peak is not None and peak <= available):
            return parts, peak
        more = (n for n in range(parts + 1, pictures) if pictures % n == 0)
        fitting = (n for n in more if all(code + a + b * parts / n <= available for a, b in needs))
        parts = next(fitting, pictures)


def bytes_of(tree: Any) -> int:
    """Of what every device has alike."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
