"""`cdetr convert`."""

import argparse
import os
from pathlib import Path

from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.files import refuse_to_overwrite


def run(arguments: argparse.Namespace) -> None:
    """Writes the weights, and says what can be done with them.

    Raises: as `load_weights`; ValueError, FileExistsError, if they cannot be written so.
    """
    if arguments.without_timm and arguments.to != "hub":
        raise ValueError(f"--without-timm is of --to=hub, not of --to={arguments.to}")
    destination = arguments.destination
    if arguments.to == "pth" and os.path.isdir(destination):
        raise ValueError(f"the destination {destination} is a folder; name the file to write, such as detector.pth")
    if arguments.to == "hub" and os.path.isfile(destination):
        raise ValueError(f"the destination {destination} is a file; name the folder to write")
    for name in ("model.safetensors", "config.json") if arguments.to == "hub" else [""]:
        refuse_to_overwrite(arguments.source, Path(destination) / name, "the destination")
    set_up_logging()
    from cdetr_jax.weights.load import load_weights
    from cdetr_jax.weights.save import save_hub, save_pth, save_run

    weights = load_weights(arguments.source, arguments.checkpoint, arguments.dc5)
    kind = "ConditionalDetr" if weights.model["decoder"] == "conditional" else "Detr"
    if arguments.to == "hub":
        save_hub(weights, destination, arguments.without_timm)
        needs = "" if arguments.without_timm else ", with timm installed"
        use = f'transformers.{kind}ForObjectDetection.from_pretrained("{destination}"){needs}'
    elif arguments.to == "pth":
        save_pth(weights, destination)
        use = f'torch.load("{destination}")["model"], or cdetr predict --weights={destination}'
    else:
        save_run(weights, destination)
        use = f"cdetr predict --weights={destination}, or cdetr train --config.init={destination}"
    known = sum(category is not None for category in weights.classes)
    print(f"{destination}: {kind}, {weights.model['backbone']}, {known} classes\nload it with {use}")
