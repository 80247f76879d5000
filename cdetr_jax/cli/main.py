"""The `cdetr` command: help texts, then one call into the command that was asked for."""

import argparse
import difflib
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterable

from cdetr_jax.cli.arguments import (
    head,
    height_x_width,
    name,
    names,
    pictures_a_call,
    point,
    query,
    score,
    several_seeds,
    several_sizes,
    some_of,
    whole,
)
from cdetr_jax.cli.environment import keep_compiled_programs, keep_freed_memory
from cdetr_jax.cli.processes import add_processes

# Epilogues are printed as they are: at most 79 characters a line.
WEIGHTS_HELP = """\
SOURCE is one of
  runs/demo                   the workdir of a run
  runs/demo/checkpoints/1000  one of its checkpoints
  hf://microsoft/conditional-detr-resnet-50
                              a model of the hub, downloaded once (add
                              @REVISION for another one)
  folder/, model.safetensors  the same as local files
  ConditionalDETR_r50.pth     a file of the authors', or of
                              facebookresearch/detr (needs PyTorch)"""

CONFIG_HELP = """\
--config takes a recipe by its name (`cdetr configs` lists them), with a
schedule after a colon where it has several (conditional_detr_r50:108), or a
file of your own. Every field can be set on the command line, for example
  --config.optimizer.lr=2e-4  --config.train.batch_size=8  --config.seed=1
`cdetr configs RECIPE` lists the fields; configs/common.py says what they mean,
and cdetr_jax/models/detector.py those of the model. Of a field that is set
twice the last value counts."""


def parser() -> argparse.ArgumentParser:
    """The command line. Imports nothing heavy: help must answer at once."""
    main = argparse.ArgumentParser(
        prog="cdetr", description="Conditional DETR: train a detector, measure it, and find objects in pictures."
    )
    commands = main.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, epilog: str, **settings: object) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def add_data(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--data",
            type=name,
            metavar="FOLDER",
            help="pictures with annotations, as COCO, YOLO or Pascal VOC has them: which, is found out; or tfds:NAME. "
            "Without a recipe all else is chosen to suit them, and shown",
        )

    train = add(
        "train",
        "train a detector, or go on with a run that was stopped",
        CONFIG_HELP + "\n\nexit status:\n"
        "  0   the run is complete\n"
        "  75  Ctrl-C or SIGTERM, and all is saved, or another process was lost; the\n"
        "      same command goes on\n"
        "  else it has failed, or was ended before it could save; the same command goes\n"
        "  on from the last checkpoint\n\n"
        "Several processes start with the same config, code, data and number of devices,\n"
        "in a workdir that all see; differences are refused. A signal to one of them\n"
        "stops all at the same step. When one fails, the others end within 30 seconds.\n\n"
        "examples:\n  cdetr train --data=mine\n  cdetr train --config=demo --workdir=runs/demo",
    )
    train.add_argument("--config", type=name, metavar="RECIPE", help="a name, such as demo, or a file")
    add_data(train)
    train.add_argument(
        "--workdir",
        type=name,
        metavar="DIR",
        help="where checkpoints and metrics go (default: runs/ and the data's name)",
    )
    train.add_argument(
        "--log",
        type=some_of("tensorboard", "csv", "wandb", "mlflow", "none"),
        metavar="NAMES",
        help="where metrics go besides metrics.jsonl, with commas between: tensorboard (default), csv, wandb, mlflow; "
        "or none",
    )
    add_processes(train)

    compare = add(
        "compare",
        "train the variants of a recipe under one budget, and report how they differ",
        "The recipe is a file with get_config() and VARIANTS, each a name and the fields\n"
        "that it changes; GROUPS, if it is there, says which are shown together. The\n"
        "first is the baseline. Every variant is trained with the first seed, then with\n"
        "the next. DIR gets report.html to open, compare.png, compare.md, compare.csv\n"
        "and compare.json; each run has a folder VARIANT/seedK there, a workdir as\n"
        "`cdetr train` leaves it, with its output in train.log.\n\n"
        "Stopped, even with kill -9, it goes on when called again. A variant that fails\n"
        "is named in the report and loses no other; the exit status is then 1.\n\n"
        + CONFIG_HELP
        + "\nA variant's own fields come after these.\n\nexamples:\n"
        "  cdetr compare --config=compare_demo --workdir=runs/compare --jobs=2\n"
        "  cdetr compare --config=ablations_demo --workdir=runs/ablations --seeds=0,1,2\n"
        "  cdetr compare --config=compare_demo --workdir=runs/compare --report-only",
    )
    compare.add_argument(
        "--config", required=True, type=name, metavar="RECIPE", help="a name, such as compare_demo, or a file"
    )
    compare.add_argument("--workdir", required=True, type=name, metavar="DIR", help="where all runs and the report go")
    compare.add_argument(
        "--seeds", type=several_seeds, default=(0,), metavar="K,...", help="seeds of every variant (default: 0)"
    )
    compare.add_argument(
        "--only", type=names, default=(), metavar="NAME,...", help="these variants only (default: all)"
    )
    compare.add_argument(
        "--jobs",
        type=whole(1),
        default=1,
        metavar="N",
        help="runs side by side, each with its share of the CPU's cores (default: 1)",
    )
    compare.add_argument(
        "--ap", type=score, metavar="AP", help="count epochs until this AP (default: the first variant's last one)"
    )
    compare.add_argument("--report-only", action="store_true", help="train nothing; report what is there")

    curve = add(
        "curve",
        "draw training loss and AP of several runs into one picture",
        "example:\n  cdetr curve runs/detr runs/conditional --output=curve.png",
    )
    curve.add_argument("runs", nargs="+", type=name, metavar="DIR", help="workdirs of runs")
    curve.add_argument("--output", required=True, type=name, metavar="FILE", help="picture to write, such as curve.png")

    def add_weights(command: argparse.ArgumentParser, *names: str, **settings: object) -> None:
        command.add_argument(*names, type=name, metavar="SOURCE", help="trained weights, see below", **settings)
        command.add_argument(
            "--checkpoint", choices=("best", "latest"), default="best", help="of a run: best by AP (default), or latest"
        )
        command.add_argument(
            "--dc5",
            action="store_true",
            help="it is a DC5 model; for a .pth of which neither name nor content says so",
        )

    def add_from_eval(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--from-eval",
            type=whole(0),
            default=0,
            metavar="N",
            help="also the first N pictures of the run's evaluation set",
        )

    evaluate = add(
        "evaluate",
        "print COCO's 12 numbers and the AP of every class",
        WEIGHTS_HELP + "\n\n" + CONFIG_HELP + "\n\nexamples:\n"
        "  cdetr evaluate --weights=runs/demo\n"
        "  cdetr evaluate --weights=hf://microsoft/conditional-detr-resnet-50 \\\n"
        "      --config=conditional_detr_r50",
    )
    add_weights(evaluate, "--weights", "--workdir", required=True)
    evaluate.add_argument(
        "--config", type=name, metavar="RECIPE", help="recipe with the pictures to evaluate on; default: the run's own"
    )
    add_data(evaluate)
    evaluate.add_argument(
        "--report",
        type=name,
        metavar="DIR",
        help="also write there where it errs: report.html with precision-recall curves, the score with the best F1, "
        "what is taken for what and the worst pictures; the same as PNG, CSV and JSON",
    )
    add_processes(evaluate)

    data = add(
        "data",
        "look at a data set before it is trained on",
        "Finds out what FOLDER is, as --data of the other commands does, counts pictures,\n"
        "objects and sizes, opens every picture, and names what is wrong by file and\n"
        "line: pictures that are missing or damaged, boxes that are empty, outside or\n"
        "given twice, pictures that several splits share, and what cannot be read.\n\n"
        "exit status:\n"
        "  0  nothing wrong was found\n"
        "  1  something is wrong, or FOLDER is no data set\n\n"
        "example:\n  cdetr data mine --output=look",
    )
    data.add_argument("folder", type=name, metavar="FOLDER", help="COCO, YOLO or Pascal VOC")
    data.add_argument(
        "--output", type=name, metavar="DIR", help="also write a sheet of pictures with their boxes, and all as JSON"
    )

    predict = add(
        "predict",
        "find the objects in pictures, videos or what a camera shows, and draw them",
        "For pictures DIR gets one drawing each, sheet.png with the first 16, and\n"
        "predictions.json in COCO's results format with each picture's file name and\n"
        "each object's class name. Drawings are called as their pictures, with a number\n"
        "where two would meet, or where DIR holds another file of that name: neither a\n"
        "picture nor any other file is written over, but the drawings and results of an\n"
        "earlier call are. A folder is searched with the folders in it, but for DIR.\n"
        "Pictures may have any size; boxes are clipped to them. image_id is the number\n"
        "of the picture, from 1. Pictures of --from-eval keep their ids in the\n"
        "evaluation set, and the others are then numbered from above its largest id.\n"
        "The exit status is 1 where a picture cannot be read, after all others.\n\n"
        "For a video DIR gets NAME.mp4, drawn, and NAME.jsonl, a line a frame with its\n"
        "objects and time_s, the seconds since the first. It needs PyAV: pip install\n"
        "'cdetr_jax[video]'. A camera (camera, or camera:1 for the next one) or stream\n"
        "runs until it ends or Ctrl-C comes, which is its good end: exit status 0. Where\n"
        "frames come faster than they are looked at, some are skipped; utc in the lines\n"
        "says when a frame was seen. A new recording gets a new name.\n\n" + WEIGHTS_HELP + "\n\nexamples:\n"
        "  cdetr predict --weights=runs/demo street.jpg holiday/ --output=found\n"
        "  cdetr predict --weights=runs/demo camera --output=found\n"
        "  cdetr predict --weights=hf://microsoft/conditional-detr-resnet-50 \\\n"
        "      street.jpg --output=found",
    )
    add_weights(predict, "--weights", "--workdir", required=True)
    predict.add_argument(
        "--output", required=True, type=name, metavar="DIR", help="where all of it goes; made if missing"
    )
    predict.add_argument(
        "--threshold", type=score, default=0.5, metavar="SCORE", help="lowest score to keep, 0 to 1 (default: 0.5)"
    )
    add_from_eval(predict)
    predict.add_argument(
        "--classes", type=names, metavar="NAME,...", help="keep objects of these classes only (default: all)"
    )
    predict.add_argument(
        "--save",
        type=some_of("coco", "jsonl", "csv", "yolo"),
        default=["coco"],
        metavar="FORM,...",
        help="how what was found in pictures is written: coco (predictions.json, the default), jsonl (a line a "
        "picture), csv (a row an object), yolo (a text a picture, in labels/)",
    )
    predict.add_argument("--crops", action="store_true", help="also write each object of the pictures, to crops/")
    predict.add_argument(
        "--batch", type=whole(1), metavar="N", help="pictures or frames that run together (default: 8, on a CPU 1)"
    )
    predict.add_argument(
        "pictures",
        nargs="*",
        type=name,
        metavar="PICTURE",
        help="pictures, videos, folders of them, patterns such as 'a/*.jpg', addresses (https://...); or one camera or "
        "stream: camera, rtsp://...",
    )

    attention = add(
        "attention",
        "draw where a detector looks when it finds an object, or measure it",
        "DIR gets a sheet for each object, as the paper's figures 1 and 4: columns are\n"
        "heads; rows are the attention's spatial part, its content part, and both\n"
        "combined, which is what the detector used. Box and reference point are drawn.\n"
        "With a second --weights its rows are below the first's, with the query that\n"
        "fits the same object. Beside each sheet a .npz holds the maps of all layers:\n"
        "spatial, content, combined [layers, heads, rows, columns], size_in_cells (the\n"
        "picture's height and width; the last cells may reach over its sides), query,\n"
        "box_xyxy_px, score, name, point_xy_px, side, model; of the second weights with\n"
        "_2 at the end. Pictures, folders and names of drawings: as `cdetr predict`.\n\n"
        "--measure prints how much of each head's spatial attention is near each side of\n"
        "an object's box and in its middle, beside what a uniform map has, and writes\n"
        "attention.json and attention.csv with all parts. It takes --config and fields\n"
        "as `cdetr evaluate` does.\n\n" + WEIGHTS_HELP + "\n\nexamples:\n"
        "  cdetr attention --weights=runs/demo --from-eval=4 --output=looks\n"
        "  cdetr attention --weights=runs/detr --weights=runs/demo --from-eval=4 \\\n"
        "      --head=all --layer=0 --output=looks\n"
        "  cdetr attention --weights=runs/demo street.jpg --query=40,60,200,180 \\\n"
        "      --output=looks\n"
        "  cdetr attention --weights=runs/demo --measure --output=looks",
    )
    add_weights(attention, "--weights", required=True, action="append")
    attention.add_argument(
        "--output", required=True, type=name, metavar="DIR", help="where all of it goes; made if missing"
    )
    attention.add_argument(
        "--layer", type=whole(-100, 99), default=-1, metavar="K", help="from 0; -1: the last one (default)"
    )
    attention.add_argument(
        "--head", type=head, default="all", metavar="K", help="from 0; all and their mean (default); mean"
    )
    attention.add_argument(
        "--query",
        type=query,
        default="best",
        metavar="WHICH",
        help="best: of the best detections (default); a query's number; left,top,right,bottom of a box in pixels: the "
        "query that fits it best",
    )
    attention.add_argument(
        "--threshold", type=score, default=0.5, metavar="SCORE", help="lowest score of a detection (default: 0.5)"
    )
    attention.add_argument(
        "--objects", type=whole(1), default=3, metavar="N", help="best: at most so many a picture (default: 3)"
    )
    attention.add_argument(
        "--point", type=point, metavar="X,Y", help="the encoder's self-attention from this pixel, instead of a query"
    )
    add_from_eval(attention)
    attention.add_argument("--measure", action="store_true", help="measure over the evaluation set; draw nothing")
    attention.add_argument(
        "--config", type=name, metavar="RECIPE", help="measure: recipe with the pictures to measure on"
    )
    attention.add_argument(
        "pictures", nargs="*", type=name, metavar="PICTURE", help="pictures, folders of them, patterns, or addresses"
    )

    convert = add(
        "convert",
        "write trained weights in another format",
        WEIGHTS_HELP + "\n\nformats:\n"
        "  hub    a folder that transformers loads: model.safetensors, config.json,\n"
        "         preprocessor_config.json\n"
        "  pth    the layout of the authors' files (needs PyTorch)\n"
        "  orbax  a workdir of ours, to predict, evaluate, or start a run from with\n"
        "         --config.init\n\n"
        "example:\n  cdetr convert runs/mine my-detector --to=hub",
    )
    add_weights(convert, "source")
    convert.add_argument("destination", type=name, metavar="DESTINATION", help="folder, or for pth the file, to write")
    convert.add_argument("--to", required=True, choices=("hub", "pth", "orbax"), help="format, see below")
    convert.add_argument(
        "--without-timm", action="store_true", help="hub: name the backbone so that transformers loads it without timm"
    )

    prepare = add(
        "prepare",
        "download a TFDS set once and write it so that it can be read at random",
        "Needs TensorFlow: pip install cdetr_jax[tfds]. Says first how much disk it\n"
        "takes. Interrupted, it goes on when called again. Without a network, put the\n"
        "set's archives under their published names in a folder and name that with\n"
        "--archives. Pictures with a COCO JSON need no preparation: see\n"
        "--config.data.source=coco_folder.\n\n"
        "examples:\n"
        "  cdetr prepare --dataset=coco/2017 --data_dir=data/tfds\n"
        "  cdetr prepare --dataset=coco/2017 --data_dir=data/tfds \\\n      --archives=from_a_disk",
    )
    prepare.add_argument(
        "--dataset", required=True, type=name, metavar="NAME", help="as TFDS has it: coco/2017, voc/2007"
    )
    prepare.add_argument("--data_dir", required=True, type=name, metavar="DIR", help="TFDS's data_dir; made if missing")
    prepare.add_argument(
        "--archives",
        "--manual_dir",
        type=name,
        metavar="DIR",
        help="folder of the archives that are there already, such as train2017.zip; what is missing is downloaded to "
        "it (default: downloads/archives in --data_dir)",
    )
    prepare.add_argument(
        "--any-archives",
        action="store_true",
        help="take archives as they are, also where they are not byte for byte the published ones",
    )

    export = add(
        "export",
        "write a detector as one file that runs without this package",
        WEIGHTS_HELP + "\n\nformats:\n"
        "  stablehlo  a zip for JAX on CPU, CUDA and TPU\n"
        "  onnx       for onnxruntime; needs `pip install 'cdetr_jax[onnx]'`\n"
        "The file is loaded again, timed, and compared with this program's own results.\n\n"
        "example:\n  cdetr export --weights=runs/demo --to=onnx --output=detector.onnx",
    )
    add_weights(export, "--weights", required=True)
    export.add_argument("--to", required=True, choices=("stablehlo", "onnx"), help="format, see below")
    export.add_argument(
        "--output", required=True, type=name, metavar="FILE", help="file to write, such as detector.zip"
    )
    export.add_argument(
        "--batch", type=pictures_a_call, metavar="N", help="pictures a call, a number or any (default: any)"
    )
    export.add_argument(
        "--size",
        type=height_x_width,
        metavar="HxW",
        help="of the padded pictures, in pixels (default: holds all that evaluation makes)",
    )
    export.add_argument(
        "--top-k", type=whole(1), metavar="K", help="detections a picture (default: the detector's own)"
    )

    configs = add(
        "configs",
        "list the recipes that --config takes by name, or the fields of one",
        "examples:\n  cdetr configs\n  cdetr configs conditional_detr_r50:108",
    )
    configs.add_argument("recipe", nargs="?", metavar="RECIPE", type=name, help="a name or file, to see all its fields")

    benchmark = add(
        "benchmark",
        "time a train step and the inference, or the reading of pictures, or compile",
        "  step     (default) the parts of a train step and the inference, on made-up\n"
        "           pictures of one size\n"
        "  input    reading the training pictures: images a second and a core, share of\n"
        "           real pixels, and the time of each stage; with --step against what a\n"
        "           train step on this machine eats, with --plain against a\n"
        "           straightforward loader, in turns\n"
        "  compile  for every padded shape what the recipe's programs take on a chip:\n"
        "           memory, FLOPs, traffic, whether it fits and how fast it can be at\n"
        "           best. Needs no chip: with --topology the programs of TPUs and of\n"
        "           NVIDIA GPUs are compiled on any Linux machine, in minutes each\n"
        "           (pip install 'jax[tpu]' or 'jax[cuda12-local]')\n\n" + CONFIG_HELP + "\n\nexamples:\n"
        "  cdetr benchmark --config=conditional_detr_r50 --size=480x640\n"
        "  cdetr benchmark input --config=conditional_detr_r50 --step\n"
        "  cdetr benchmark compile --config=conditional_detr_r50 \\\n"
        "      --topology=v5e:4x4 --shapes=800x1344",
    )
    benchmark.add_argument("what", nargs="?", choices=("step", "input", "compile"), default="step", help="see below")
    add_data(benchmark)
    benchmark.add_argument("--config", type=name, metavar="RECIPE", help="recipe whose model, or data, is timed")
    benchmark.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help="pictures a step (default: 2); compile: pictures a chip (default: the recipe's)",
    )
    benchmark.add_argument(
        "--size", type=height_x_width, default="480x640", metavar="HxW", help="in pixels (default: 480x640)"
    )
    benchmark.add_argument("--targets", type=whole(1), default=7, metavar="N", help="objects a picture (default: 7)")
    benchmark.add_argument("--steps", type=whole(1), default=10, metavar="N", help="timed steps (default: 10)")
    benchmark.add_argument(
        "--accumulation", type=whole(1), default=1, metavar="N", help="so many such batches a whole step (default: 1)"
    )
    benchmark.add_argument(
        "--trace", type=name, metavar="DIR", help="write a trace of 3 whole steps there, for TensorBoard or Perfetto"
    )
    benchmark.add_argument(
        "--batches", type=whole(1), default=40, metavar="N", help="input: timed batches (default: 40)"
    )
    benchmark.add_argument("--step", action="store_true", help="input: also time train steps at the mean area")
    benchmark.add_argument(
        "--plain", action="store_true", help="input: also time a straightforward loader of one process and thread"
    )
    benchmark.add_argument(
        "--topology",
        type=name,
        default="local",
        metavar="NAME",
        help="compile: TPU chips, such as v5e:4x4, v4:2x2x1 or v6e:1x1; a GPU: a100, l4, h100, h200, several: "
        "h100:8, on two hosts: h100:2x8 (default: this machine's devices)",
    )
    benchmark.add_argument(
        "--shapes",
        type=several_sizes,
        default=(),
        metavar="HxW,...",
        help="compile: these padded shapes only, in pixels (default: all of the recipe's)",
    )
    return main


USERS_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError, NotImplementedError, MemoryError)
TAKES_CONFIG_FIELDS = ("train", "compare", "evaluate", "attention", "benchmark")


def _check_names(main: argparse.ArgumentParser, argv: list[str]) -> None:
    """Ends with what was perhaps meant, at the first command or option that there is not."""
    commands = next(action.choices for action in main._actions if action.choices)
    if not argv:
        main.error(f"name a command: {', '.join(commands)}; see `cdetr --help`")
    command = argv[0]
    if command not in commands:
        if not command.startswith("-"):
            main.error(f"unknown command {command!r}{_suggestion(command, commands)}; see `cdetr --help`")
        return
    known = commands[command]._option_string_actions
    for word in argv[1 : argv.index("--") if "--" in argv else None]:
        option = word.partition("=")[0]
        if re.match("--[a-zA-Z]", word) and option not in known and not option.startswith("--config."):
            meant = _suggestion(option, known)
            commands[command].error(f"unknown argument {word!r}{meant}; see `cdetr {command} --help`")


def _suggestion(word: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {similar[0]}?" if similar else ""


def run(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    A user's mistake is one line and exit status 1; 130 after Ctrl-C, but 75 if a training run has saved all of it.
    """
    is_console_script = argv is None
    argv = sys.argv[1:] if argv is None else argv
    main = parser()
    _check_names(main, argv)
    arguments, rest = main.parse_known_args(argv)
    fields = [field for field in rest if field.startswith("--config.")]
    if getattr(arguments, "log", None):
        fields.append(f"--config.train.log={','.join(arguments.log)}")
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (fields and arguments.command not in TAKES_CONFIG_FIELDS):
        main.error(f"unknown argument {(unknown or fields)[0]!r}; see `cdetr {arguments.command} --help`")
    missing = [name for name in ("config", "workdir") if getattr(arguments, name, "") is None]
    if missing and arguments.command in ("train", "benchmark") and arguments.data is None:
        required = " and ".join(f"--{name}" for name in missing)
        main.error(f"the following arguments are required: {required}, or --data=FOLDER instead")
    keep_compiled_programs()
    keep_freed_memory()
    command = importlib.import_module(f"cdetr_jax.cli.{arguments.command}")
    try:
        command.run(arguments, fields) if arguments.command in TAKES_CONFIG_FIELDS else command.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:  # whoever reads what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has to go somewhere
        _leave(141, "its output is read no further", error)
        sys.exit(141)
    except USERS_ERRORS as error:
        out_of_memory = "out of memory: " if isinstance(error, MemoryError) else ""
        message = out_of_memory + "; ".join([str(error), *getattr(error, "__notes__", [])])
        print(f"cdetr {arguments.command}: error: {message}", file=sys.stderr)
        _leave(1, message, error)
        sys.exit(1)
    except KeyboardInterrupt as stopped:  # a training run says what it saved
        print(f"\n{stopped if stopped.args else 'stopped'}", file=sys.stderr)
        status = getattr(stopped, "exit_status", 130)
        if not hasattr(stopped, "exit_status"):
            _leave(status, "Ctrl-C", stopped)
        if is_console_script and any(thread.name.startswith("compile") for thread in threading.enumerate()):
            sys.stdout.flush()
            if processes := sys.modules.get("cdetr_jax.training.processes"):
                processes.wait_for_all()
            os._exit(status)  # all is saved, and Python would wait until what is being compiled is done
        sys.exit(status)
    except Exception as error:
        _leave(1, f"{type(error).__name__}: {error}", error)
        raise


def _leave(status: int, cause: str, error: BaseException) -> None:
    """Ends a process that is one of several, without waiting for the others; it has imported this to join them."""
    processes = sys.modules.get("cdetr_jax.training.processes")
    if processes and processes.are_several():
        is_unexpected = not isinstance(error, (*USERS_ERRORS, KeyboardInterrupt))
        processes.leave(status, cause, error, with_traceback=is_unexpected)
