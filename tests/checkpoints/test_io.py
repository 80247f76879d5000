"""Checkpoints that were damaged, could not be written, or were evaluated."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from cdetr_jax.checkpoints import io
from cdetr_jax.checkpoints.io import CHECKSUMS, Checkpoints, DamagedCheckpointError

POSITION = {"epoch": 3, "batch": 1, "pictures": "ab12"}


def state_of(step):
    """Noise, which does not become shorter when it is compressed."""
    noise = np.random.default_rng(step).normal(size=(2, 64, 31)).astype(np.float32)
    return {"params": {"a": noise[0], "b": noise[1]}, "constants": {"c": np.arange(3.0)}, "step": np.int32(step)}


TEMPLATE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_of(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=9)
    for step in (2, 4):
        checkpoints.save(step, state_of(step), POSITION)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "w")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)


def change_position(folder):
    path = folder / "position" / "metadata"
    path.write_text(path.read_text().replace('"epoch": 3', '"epoch": 4'))


DAMAGE = {
    "eight bytes": lambda folder: overwrite(largest(folder / "state")),
    "cut data": lambda folder: cut(largest(folder / "state")),
    "cut metadata": lambda folder: cut(folder / "state" / "_METADATA"),
    "cut manifest": lambda folder: cut(folder / "state" / "manifest.ocdbt"),
    "no data": lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "another position": change_position,
    "cut position": lambda folder: cut(folder / "position" / "metadata"),
    "no position": lambda folder: shutil.rmtree(folder / "position"),
    "nothing": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


def test_what_was_saved_comes_back(saved):
    checkpoints = Checkpoints(saved, read_only=True)
    state, position = checkpoints.restore(4, TEMPLATE)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))
    assert position == POSITION
    weights = checkpoints.restore_weights(2)
    jax.tree.map(np.testing.assert_array_equal, weights, {n: state_of(2)[n] for n in ("params", "constants")})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore: "Event loop is closed"
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(how, workdir, monkeypatch):
    DAMAGE[how](workdir / "checkpoints" / "4")
    checkpoints = Checkpoints(workdir)
    warnings = []
    monkeypatch.setattr(io.absl_logging, "warning", lambda text, *values: warnings.append(text % values))
    for read in (lambda step: checkpoints.restore(step, TEMPLATE), checkpoints.restore_weights):
        with pytest.raises(DamagedCheckpointError, match=r"the checkpoint .*checkpoints/4 is damaged \(.*\)$"):
            read(4)
        assert checkpoints.first_whole([4, 2], read)[0] == 2
    assert all(warning.endswith("falling back to the checkpoint of step 2") for warning in warnings)
    assert len(warnings) == 2
    checkpoints.set_aside(4)
    assert checkpoints.steps() == [2]
    checkpoints.save(4, state_of(4), POSITION)
    checkpoints.close()
    assert Checkpoints(workdir, read_only=True).restore(4, TEMPLATE)[1] == POSITION


def test_without_another_checkpoint_it_says_what_to_do(workdir):
    DAMAGE["eight bytes"](workdir / "checkpoints" / "4")
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(DamagedCheckpointError, match=r"no other checkpoint to fall back to: put back a copy"):
        checkpoints.first_whole([4], checkpoints.restore_weights)


def test_other_shapes_are_no_damage(saved):
    template = TEMPLATE | {"constants": {"c": jax.ShapeDtypeStruct((5,), np.float64)}}
    checkpoints = Checkpoints(saved, read_only=True)
    with pytest.raises(ValueError, match=r"does not fit .*constants/c \(3,\), expected \(5,\)"):
        checkpoints.first_whole([4, 2], lambda step: checkpoints.restore(step, template))


def test_a_checkpoint_from_before_there_were_checksums_is_read(workdir):
    path = workdir / "checkpoints" / "4" / "position" / "metadata"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != CHECKSUMS})
    )
    assert Checkpoints(workdir, read_only=True).restore(4, TEMPLATE)[1] == POSITION


# ------------------------------------------------------------------------------------------------------ the best


def test_the_ap_comes_after_the_checkpoint_and_decides_what_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, precision, kept in ((1, 0.2, [1]), (2, 0.5, [2]), (3, 0.5, [3]), (4, 0.1, [3, 4]), (5, 0.6, [5])):
        checkpoints.save(step, state_of(step), POSITION)
        checkpoints.set_score(step, precision)
        assert checkpoints.steps() == kept
    checkpoints.save(6, state_of(6), POSITION)  # ends before it is evaluated
    checkpoints.close()
    reader = Checkpoints(tmp_path, read_only=True)
    assert (reader.steps(), reader.best_step(), reader.latest_step()) == ([5, 6], 5, 6)
    assert (reader.score(5), reader.score(6)) == (0.6, None)


def test_saving_does_not_ask_jax_whether_to_stop(tmp_path, monkeypatch):
    """JAX compares the numbers that all who ask give it, and names one of them: a run counts, Orbax gives the step."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1000, state_of(1), POSITION)
    checkpoints.close()
    assert asked == []


@pytest.mark.parametrize("looks", [[True, True, False], [True] * 9])
def test_what_is_being_saved_is_finished_if_it_does_not_take_long(looks, tmp_path, monkeypatch):
    checkpoints, now, left = Checkpoints(tmp_path), [0.0], iter(looks)
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: next(left))
    monkeypatch.setattr(io.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(io.time, "sleep", lambda seconds: now.append(now.pop() + 1))
    checkpoints.finish()
    assert now[0] == min(looks.count(True), io.FINISH_S)


# ------------------------------------------------------------------------------------------------- a full disk

FULL = 'RESOURCE_EXHAUSTED: Error writing "params.a/0.0": Failed to write 648276 bytes: No space left on device'


def test_a_save_that_fails_in_the_background_is_told_at_the_next_step(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), POSITION)
    checkpoints._manager.wait_until_finished()
    checkpoints.check()
    checkpoints.save(2, state_of(2), POSITION)
    checkpoints._manager.wait_until_finished()

    def fail():
        raise ValueError(FULL)

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    expected = (
        r"^could not write the checkpoint of step 2 to .*/checkpoints: the disk is full; the earlier ones are whole"
    )
    for call in (checkpoints.check, checkpoints.close):
        with pytest.raises(OSError, match=expected) as error:
            call()
        assert "free some space and run the same command again" in str(error.value)


def test_a_save_that_fails_at_once_says_why(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "/w/checkpoints/1")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(OSError, match=r"of step 1 to .*: PermissionError: .*Permission denied.*mend that and run"):
        checkpoints.save(1, state_of(1), POSITION)
