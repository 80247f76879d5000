"""Weights files as they are found: what is read bit for bit, what is refused and how, and that no half file is left."""

import argparse
import json
import os
import pathlib
import pickle
import sys
import types

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
from huggingface_hub import errors
from safetensors.numpy import save_file

from cdetr_jax.weights import torch_files

# 3e-8 and 6e-5 are below float16's normal numbers, 65504 is its largest; all of them are exact in float16.
HALF = np.array([[1, -2.5, 2**-24], [65504, 2**-14, -0.0]], np.float16)
# Beyond float16's range, and with all of bfloat16's 8 significant bits.
BRAIN = np.array([3.0e38, -1.0078125, 2.0**-130], ml_dtypes.bfloat16)
SINGLE = np.array([np.pi, -1e-42, np.finfo(np.float32).max], np.float32)


def same_bits(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------------------- safetensors


def test_half_precision_is_widened_without_loss(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"half": HALF, "brain": BRAIN, "single": SINGLE, "count": np.array(7)}, path)
    found = torch_files.read(path).state_dict
    assert found.keys() == {"half", "brain", "single", "count"}
    assert same_bits(found["single"], SINGLE)
    assert same_bits(found["half"], HALF.astype(np.float32))
    # A bfloat16 is the upper half of a float32.
    assert same_bits(found["brain"], (BRAIN.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    assert same_bits(found["count"], np.array(7))


def test_a_bfloat16_file_of_another_writer_is_read(tmp_path):
    """The bytes as the format describes them, without safetensors' own writer."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    values = np.array([0x3F80, 0xC020], "<u2").tobytes()  # 1 and -2.5
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values)
    found = torch_files.read(tmp_path / "w.safetensors").state_dict["w"]
    assert found.dtype == np.float32
    assert found.tolist() == [[1, -2.5]]


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_safetensors_is_damaged(kept, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": SINGLE, "b": HALF}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or no safetensors file: .*; fetch or write it"):
        torch_files.read(path)


@pytest.mark.parametrize("content", [b"this is no file of weights", b"\x80\x02}q\x00.", bytes(100)])
def test_what_is_called_safetensors_and_is_none(content, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no safetensors file") as error:
        torch_files.read(path)
    assert str(path) in str(error.value)


def test_a_type_that_numpy_does_not_have_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or no safetensors file"):
        torch_files.read(tmp_path / "w.safetensors")


# ----------------------------------------------------------------------------------------- folders and file names


def test_a_folder_is_read_with_what_it_says_of_itself(tmp_path):
    save_file({"w": SINGLE}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / "config.json").write_text('{"d_model": 16, "id2label": {"0": "Fußgänger"}}', encoding="utf-8")
    file = torch_files.read(tmp_path)
    assert file.path == tmp_path / "model.safetensors"
    assert same_bits(file.state_dict["w"], SINGLE)
    assert file.config == {"d_model": 16, "id2label": {"0": "Fußgänger"}}
    assert file.preprocessor is None
    assert file.extra == {}
    assert torch_files.read(tmp_path / "model.safetensors").config == file.config


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"d_model": 16', "config.json is damaged: "), ("[1, 2]", "config.json holds list, expected an object with")],
)
def test_a_damaged_config_is_named(content, message, tmp_path):
    save_file({"w": SINGLE}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        torch_files.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json")


def test_a_config_that_is_no_text_is_damaged(tmp_path):
    save_file({"w": SINGLE}, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged: "):
        torch_files.read(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        torch_files.read(tmp_path)
    assert str(error.value) == (
        f"the folder {tmp_path} holds neither model.safetensors nor pytorch_model.bin, nor is it the workdir of a run"
    )


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*none\.pth; a hub name is written hf://"):
        torch_files.read(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["weights.npz", "weights", "weights.h5"])
def test_a_suffix_that_is_not_known(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=rf"{name}: expected a \.safetensors, \.pth, \.pt or \.bin file, the folder"):
        torch_files.read(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- the hub


def http_error(kind):
    return kind("404 Client Error", response=types.SimpleNamespace(headers={}, request=None))


def raising(error):
    def snapshot_download(*_, **__):
        raise error

    return snapshot_download


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose every model is this folder. Returns the folder and the calls."""
    calls = []

    def snapshot_download(repository, **settings):
        calls.append((repository, settings["revision"], settings["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path, calls


CONFIGS = ["config.json", "preprocessor_config.json"]


def test_only_the_files_that_are_needed_are_downloaded(hub):
    folder, calls = hub
    save_file({"w": SINGLE}, folder / "model.safetensors")
    assert torch_files.download("hf://microsoft/conditional-detr-resnet-50") == folder
    assert calls == [("microsoft/conditional-detr-resnet-50", None, [*CONFIGS, "model.safetensors"])]


def test_the_revision_is_asked_for_and_the_pickle_only_where_there_is_nothing_else(hub):
    folder, calls = hub
    assert torch_files.download("hf://owner/model@refs/pr/3") == folder
    assert calls == [
        ("owner/model", "refs/pr/3", [*CONFIGS, "model.safetensors"]),
        ("owner/model", "refs/pr/3", [*CONFIGS, "pytorch_model.bin"]),
    ]


@pytest.mark.parametrize(
    "name", ["hf://", "hf://model", "hf://owner/", "hf:///model", "hf://owner/model/file", "hf://@v"]
)
def test_what_is_no_hub_name(name, hub):
    with pytest.raises(ValueError, match=r"is no hub name; expected hf://owner/model, or hf://owner/model@revision"):
        torch_files.download(name)
    assert hub[1] == []


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("Cannot reach the hub.\nMore lines."),
        errors.OfflineModeIsEnabled("Cannot reach the hub."),
        ConnectionError("Cannot reach the hub."),
    ],
)
def test_without_a_network_it_says_what_to_do(error, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(OSError, match="could not be downloaded") as raised:
        torch_files.download("hf://owner/model@main")
    assert str(raised.value) == (
        "hf://owner/model@main is not in the cache and could not be downloaded (Cannot reach the hub.). Without a "
        "network: fetch it elsewhere with `hf download owner/model --local-dir FOLDER`, copy the folder here, and name "
        "it instead of hf://owner/model@main"
    )


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(TimeoutError()))
    with pytest.raises(OSError, match=r"could not be downloaded \(TimeoutError\)"):
        torch_files.download("hf://owner/model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, r"the hub has no model owner/model \(or it is private\); check the name"),
        (errors.RevisionNotFoundError, "the hub's model owner/model has no revision v9"),
    ],
)
def test_a_model_that_the_hub_does_not_have(kind, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(http_error(kind)))
    with pytest.raises(OSError, match=message):
        torch_files.download("hf://owner/model@v9")


def test_a_model_that_may_not_be_read_is_not_called_a_missing_network_alone(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(http_error(errors.HfHubHTTPError)))
    with pytest.raises(OSError, match=r"could not be downloaded \(404 Client Error\)"):
        torch_files.download("hf://owner/model")


# --------------------------------------------------------------------------------------------------------- writing


def test_a_written_folder_is_what_transformers_reads(tmp_path):
    state_dict = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": SINGLE}
    torch_files.write_hub_folder(tmp_path / "new" / "folder", state_dict, {"id2label": {"0": "Fußgänger"}}, {"size": 7})
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    found = torch_files.read(folder)
    assert found.state_dict.keys() == {"a", "b"}
    assert all(same_bits(found.state_dict[name], array) for name, array in state_dict.items())
    assert found.config == {"id2label": {"0": "Fußgänger"}}
    assert found.preprocessor == {"size": 7}
    assert "Fußgänger" in (folder / "config.json").read_text(encoding="utf-8")


def test_a_transposed_array_is_written_as_it_is_seen(tmp_path):
    """Safetensors' writer takes the memory as it lies."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch_files.write_hub_folder(tmp_path, {"w": np.ascontiguousarray(array.T)}, {}, {})
    assert torch_files.read(tmp_path).state_dict["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_no_half_file(earlier, tmp_path, monkeypatch):
    if earlier:
        torch_files.write_hub_folder(tmp_path, {"w": SINGLE}, {}, {})

    def full_disk(_, path, **__):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device\nos error 28")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match=r"could not write .*/model\.safetensors: .*No space left on device; free some"):
        torch_files.write_hub_folder(tmp_path, {"w": 2 * SINGLE[:2]}, {}, {})
    left = {"config.json", "preprocessor_config.json"} | ({"model.safetensors"} if earlier else set())
    assert set(os.listdir(tmp_path)) == left
    if earlier:
        assert same_bits(torch_files.read(tmp_path).state_dict["w"], SINGLE)


def test_a_stop_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    def stopped(_, path, **__):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        torch_files.write_hub_folder(tmp_path, {"w": SINGLE}, {}, {})
    assert set(os.listdir(tmp_path)) == {"config.json", "preprocessor_config.json"}


# -------------------------------------------------------------------------------------------------- without PyTorch


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin"])
def test_a_pickle_without_pytorch(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(
        ModuleNotFoundError, match=r"PyTorch is not installed: `pip install cdetr_jax\[torch\]`, or use"
    ):
        torch_files.read(tmp_path if name == "pytorch_model.bin" else tmp_path / name)


def test_writing_a_pickle_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"new/w\.pth is a PyTorch file, and PyTorch is not installed"):
        torch_files.write_pickle(tmp_path / "new" / "w.pth", {"w": SINGLE}, {})
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------- with PyTorch


def test_a_whole_checkpoint_of_the_authors(tmp_path):
    torch = pytest.importorskip("torch")
    content = {
        "model": {"w": torch.from_numpy(SINGLE.copy()), "bn.num_batches_tracked": torch.tensor(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"base_lrs": [1e-4], "last_epoch": 50},
        "epoch": 49,
        "args": argparse.Namespace(dilation=True, nheads=8, backbone="resnet50", masks=False, lr=1e-4),
    }
    torch.save(content, tmp_path / "w.pth")
    file = torch_files.read(tmp_path / "w.pth")
    assert file.state_dict.keys() == {"w", "bn.num_batches_tracked"}
    assert same_bits(file.state_dict["w"], SINGLE)
    assert file.extra == {"args": {"dilation": True, "nheads": 8, "backbone": "resnet50", "masks": False, "lr": 1e-4}}
    assert file.config is None


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin"])
def test_a_bare_table_of_tensors(name, tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)  # not contiguous, and with a gradient
    torch.save({"w": tensor}, tmp_path / name)
    file = torch_files.read(tmp_path / name)
    assert file.state_dict["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert file.extra == {}


def test_a_checkpoint_in_the_old_format_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(
        {"model": {"w": torch.from_numpy(SINGLE.copy())}}, tmp_path / "w.pth", _use_new_zipfile_serialization=False
    )
    assert same_bits(torch_files.read(tmp_path / "w.pth").state_dict["w"], SINGLE)


def test_half_precision_tensors_are_widened_without_loss(tmp_path):
    torch = pytest.importorskip("torch")
    brain = torch.tensor(BRAIN.astype(np.float32)).bfloat16()
    torch.save({"half": torch.from_numpy(HALF.copy()), "brain": brain, "count": torch.tensor(7)}, tmp_path / "w.pth")
    found = torch_files.read(tmp_path / "w.pth").state_dict
    assert same_bits(found["half"], HALF.astype(np.float32))
    assert same_bits(found["brain"], BRAIN.astype(np.float32))
    assert same_bits(found["count"], np.array(7))


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_by_torch(content, path):
    pytest.importorskip("torch").save(content, path)


def save_in_the_old_format(content, path):
    pytest.importorskip("torch").save(content, path, _use_new_zipfile_serialization=False)


def save_by_pickle(content, path):
    pytest.importorskip("torch")
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("place", ["alone", "beside", "among"])
@pytest.mark.parametrize("save", [save_by_torch, save_in_the_old_format, save_by_pickle])
def test_code_in_a_pickle_does_not_run(save, place, tmp_path):
    trap = Trap(tmp_path / "sprung")
    save(
        {"alone": trap, "beside": {"model": {}, "args": trap}, "among": {"model": {"w": trap}}}[place],
        tmp_path / "w.pth",
    )
    with pytest.raises(ValueError, match=r"w\.pth (holds more than tensors and plain values|is damaged or no PyTorch)"):
        torch_files.read(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


def test_the_trap_is_one(tmp_path):
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("place", ["alone", "beside"])
def test_code_in_a_pickle_is_said_to_be_the_reason(place, tmp_path):
    trap = Trap(tmp_path / "sprung")
    save_by_torch({"alone": trap, "beside": {"model": {}, "args": trap}}[place], tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds more than tensors and plain values, perhaps code") as error:
        torch_files.read(tmp_path / "w.pth")
    assert str(error.value).endswith("; use a file with the weights alone")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.0, 0.2, 0.7, 0.99])
def test_a_truncated_pickle_is_damaged(part, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save({"model": {"w": torch.arange(1000.0)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"w\.pth is damaged or no PyTorch file: .*; fetch or write it again") as error:
        torch_files.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"w": 3}, {"model": {"w": [1.0]}}, {"model": [1, 2], "epoch": 3}, 7])
def test_a_pickle_without_weights(content, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w\.pth holds no weights: expected a table of names and tensors, bare or under"
    ):
        torch_files.read(tmp_path / "w.pth")


def test_what_is_written_as_a_pickle_is_read_with_equal_bits(tmp_path):
    torch = pytest.importorskip("torch")
    state_dict = {"a": SINGLE, "b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.float32(3)}
    extra = {
        "cdetr_jax": {"model": {"width": 16}, "classes": [None, {"id": 3, "name": "Fußgänger"}], "sides_px": [1, 2]}
    }
    torch_files.write_pickle(tmp_path / "new" / "w.pth", state_dict, extra)
    assert os.listdir(tmp_path / "new") == ["w.pth"]
    file = torch_files.read(tmp_path / "new" / "w.pth")
    assert file.extra == extra
    assert file.state_dict.keys() == state_dict.keys()
    assert all(same_bits(file.state_dict[name], np.asarray(array)) for name, array in state_dict.items())
    content = torch.load(tmp_path / "new" / "w.pth", weights_only=True)  # as facebookresearch/detr loads it
    assert content["model"]["b"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_full_disk_leaves_no_half_pickle(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    def full_disk(_, path):
        pathlib.Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0: ...")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"could not write .*/w\.pth: .*unexpected pos 64 vs 0; free some space and run"):
        torch_files.write_pickle(tmp_path / "w.pth", {"w": SINGLE}, {})
    assert os.listdir(tmp_path) == []
