"""Reading and writing published weight files: safetensors, PyTorch's pickles, the hub and its folders."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401, with it NumPy knows bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from cdetr_jax.files import whole_file

HUB_PREFIX = "hf://"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")


class WeightsFile(NamedTuple):
    """A file of weights as it was found.

    Attributes:
      path: of the file.
      state_dict: float32 arrays (floating ones) under their published names.
      config: the folder's `config.json`; None if there is none.
      preprocessor: the folder's `preprocessor_config.json`; None if there is none.
      extra: what a pickle says beside the weights: `args` of the authors' training script, `cdetr_jax` of ours.
    """

    path: Path
    state_dict: dict[str, np.ndarray]
    config: dict[str, Any] | None
    preprocessor: dict[str, Any] | None
    extra: dict[str, Any]


def download(name: str) -> Path:
    """The local folder with a hub model's files: downloaded once, then taken from huggingface_hub's cache.

    Args:
      name: `hf://owner/model`, or `hf://owner/model@revision`.
    Raises: ValueError, if the name is none; OSError, if the model is not there, or the network is not.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(
            f"{name} is no hub name; expected {HUB_PREFIX}owner/model, or {HUB_PREFIX}owner/model@revision"
        )

    def fetch(*files: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
        )

    try:
        folder = fetch(CONFIG, PREPROCESSOR, SAFETENSORS)
        return folder if (folder / SAFETENSORS).exists() else fetch(CONFIG, PREPROCESSOR, PICKLE)
    except errors.RepositoryNotFoundError as error:
        raise OSError(f"the hub has no model {repository} (or it is private); check the name, or log in") from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"the hub's model {repository} has no revision {revision}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"{name} is not in the cache and could not be downloaded ({reason}). Without a network: fetch it elsewhere "
            f"with `hf download {repository} --local-dir FOLDER`, copy the folder here, and name it instead of {name}"
        ) from error


def read(path: str | os.PathLike) -> WeightsFile:
    """Reads a weights file, or a folder in the hub's layout.

    `.safetensors` need no PyTorch. `.pth`, `.pt` and `.bin` need it, and only tensors and plain values are unpickled:
    code in such a file does not run.
    Raises: FileNotFoundError; ModuleNotFoundError, if PyTorch is needed and missing; ValueError, if the file is
      damaged, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (SAFETENSORS, PICKLE) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"the folder {path} holds neither {SAFETENSORS} nor {PICKLE}, nor is it the workdir of a run"
            )
        path = found[0]
    elif not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}; a hub name is written {HUB_PREFIX}owner/model")
    if path.suffix == ".safetensors":
        state_dict, extra = _read_safetensors(path), {}
    elif path.suffix in PICKLE_SUFFIXES:
        state_dict, extra = _read_pickle(path)
    else:
        raise ValueError(
            f"{path}: expected a .safetensors, .pth, .pt or .bin file, the folder of a hub model, or a run's workdir"
        )
    return WeightsFile(
        path, state_dict, _read_json(path.with_name(CONFIG)), _read_json(path.with_name(PREPROCESSOR)), extra
    )


def write_hub_folder(
    folder: str | os.PathLike,
    state_dict: Mapping[str, np.ndarray],
    config: dict[str, Any],
    preprocessor: dict[str, Any],
) -> None:
    """Writes the hub's three files, the weights last: a folder that has them is whole."""
    folder = Path(folder)
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        with whole_file(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with _weights_file(folder / SAFETENSORS) as temporary:
        # transformers refuses a file that does not say what it was made for.
        safetensors.numpy.save_file(dict(state_dict), temporary, metadata={"format": "pt"})


def write_pickle(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray], extra: dict[str, Any]) -> None:
    """Writes the authors' layout, `{"model": weights, **extra}`.

    Raises: ModuleNotFoundError, without PyTorch.
    """
    torch = _torch(path)
    model = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    with _weights_file(path) as temporary:
        torch.save({"model": model, **extra}, temporary)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: _as_float32(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:  # the last two: a type NumPy lacks
        raise ValueError(f"{path} is damaged or no safetensors file: {error}; fetch or write it again") from error


def _read_pickle(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    torch = _torch(path)
    try:
        # The authors' checkpoints hold their command line, a plain argparse.Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds, some without a common base
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ValueError(
                f"{path} holds more than tensors and plain values, perhaps code, and was not loaded: "
                f"{_first_line(error)}; use a file with the weights alone"
            ) from error
        raise ValueError(
            f"{path} is damaged or no PyTorch file: {_first_line(error)}; fetch or write it again"
        ) from error
    extra: dict[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        extra = {name: content[name] for name in ("args", "cdetr_jax") if name in content}
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{path} holds no weights: expected a table of names and tensors, bare or under 'model'")
    if isinstance(extra.get("args"), argparse.Namespace):
        extra["args"] = vars(extra["args"])
    return {name: _as_float32(_to_numpy(torch, tensor)) for name, tensor in content.items()}, extra


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Half-precision weights are widened, which loses nothing; integers (counters) stay."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32, copy=False)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object with fields")
    return content


def _torch(path: str | os.PathLike) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a PyTorch file, and PyTorch is not installed: `pip install cdetr_jax[torch]`, or use the "
            "model's .safetensors"
        ) from error
    return torch


@contextmanager
def _weights_file(path: str | os.PathLike) -> Iterator[Path]:
    """As `whole_file`, with one kind of error where the writers make several of an OSError."""
    try:
        with whole_file(path) as temporary:
            yield temporary
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise OSError(
            f"could not write {path}: {_first_line(error)}; free some space and run the command again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
