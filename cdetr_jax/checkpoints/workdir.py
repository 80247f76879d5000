"""What a workdir says of its run beside the checkpoints: the config and what each class logit stands for."""

import json
import os
from typing import Any

import ml_collections

from cdetr_jax.files import as_path, whole_file
from cdetr_jax.structs import Category

CONFIG, CLASSES = "config.json", "classes.json"


def save_config(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> None:
    """Writes `workdir/config.json`."""
    write_json(as_path(workdir) / CONFIG, config.to_dict())


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads `workdir/config.json`, locked.

    Raises: FileNotFoundError, if the folder is not a run's.
    """
    return ml_collections.ConfigDict(_read(workdir, CONFIG)).lock()


def save_classes(workdir: str | os.PathLike, classes: tuple[Category | None, ...]) -> None:
    """Writes `workdir/classes.json`: one entry a logit, null where it stands for nothing."""
    write_json(as_path(workdir) / CLASSES, classes_as_json(classes))


def classes_as_json(classes: tuple[Category | None, ...]) -> list[dict[str, Any] | None]:
    """One entry a logit, null where it stands for nothing."""
    return [category and {"id": category.id, "name": category.name} for category in classes]


def load_classes(workdir: str | os.PathLike) -> tuple[Category | None, ...]:
    """Reads `workdir/classes.json`.

    Raises: FileNotFoundError, if the folder is not a run's.
    """
    return tuple(entry and Category(**entry) for entry in _read(workdir, CLASSES))


def _read(workdir: str | os.PathLike, name: str) -> Any:
    path = as_path(workdir) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {workdir} is not the workdir of a run; train one with `cdetr train`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or use another workdir") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes all of it or nothing, also if the process is killed."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
