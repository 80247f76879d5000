"""Worker processes that read, augment and write pictures where the pipeline finds them. They import no JAX.

Not Grain's: of the 11.5 ms of a core that a picture takes in a thread, Grain's processes made 13.1 (a batch at a time)
to 14.2 (a picture at a time), these 12.3; see BENCHMARKS.md. Here a picture travels through memory that the two sides
share for as long as the worker lives, and a worker that dies says at which picture.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from cdetr_jax.data.plan import ROW
from cdetr_jax.data.sources import Source, open_image
from cdetr_jax.data.transforms import transform_picture
from cdetr_jax.records import Record

_END_S = 5.0  # a worker that has not ended by itself by then is killed


class WorkerDiedError(ChildProcessError):
    """A worker process ended before its time; the message says how, and which pictures it was reading."""


def write_picture(source: Source, row: np.ndarray, out: np.ndarray) -> None:
    """Reads one picture and transforms it as a row of a plan says.

    Args:
      out: uint8 [H, W, 3]; the picture goes into its upper left corner.
    Raises: what `Source.load_image` raises; ValueError, if the picture is not of the size that its record says.
    """
    index = int(row["index"])
    record = source.records[index]
    picture = open_image(source, index)
    if picture.size != (record.width, record.height):
        raise ValueError(
            f"the picture has {picture.width} x {picture.height} pixels, but its record says {record.width} x "
            f"{record.height} (width x height); its boxes would be wrong"
        )
    picture = transform_picture(picture, row)
    out[: picture.height, : picture.width] = np.asarray(picture)


class Workers:
    """Processes that each have a copy of the source, without the objects of its records."""

    def __init__(self, source: Source, processes: int, threads: int, max_pixels: int):
        """Starts them, and does not wait until they are up.

        Args:
          processes: at least 1.
          threads: of each; so many pictures it reads at once.
          max_pixels: of the largest padded shape.
        Raises: ValueError, if the source cannot be sent to another process.
        """
        # Spawned, not forked: JAX has threads, and a fork would copy their locks.
        context = multiprocessing.get_context("spawn")
        self._source = source
        pickled = _pickle_without_objects(source)
        size = 3 * max_pixels
        # One block of memory for all, since multiprocessing then puts it on disk where /dev/shm is too small for it.
        memory = context.RawArray("B", processes * threads * size)
        pixels = np.frombuffer(memory, np.uint8).reshape(-1, size)
        self._channels: list[_Channel] = []
        self._idle: queue.SimpleQueue[_Channel | None] = queue.SimpleQueue()  # None: there are none any more
        for k in range(processes):
            pairs = [context.Pipe() for _ in range(threads)]
            theirs = [pair[1] for pair in pairs]
            arguments = (pickled, theirs, memory, k * threads, size)
            process = context.Process(target=_serve, args=arguments, name=f"picture-{k}", daemon=True)
            try:
                process.start()
            except BaseException:
                self.close()
                raise
            for connection in theirs:
                connection.close()  # so that ours comes to its end when the process does
            for i, (connection, _) in enumerate(pairs):
                self._channels.append(_Channel(process, connection, pixels[k * threads + i]))
                self._idle.put(self._channels[-1])

    def write_picture(self, row: np.ndarray, out: np.ndarray) -> None:
        """As `write_picture`, by one of the workers; called from as many threads as there are workers' threads.

        Raises: WorkerDiedError, too.
        """
        channel = self._idle.get()
        if channel is None:
            self._idle.put(None)  # for the next one who asks
            raise WorkerDiedError("the worker processes have been ended")
        try:
            channel.connection.send_bytes(row.tobytes())
            channel.index = int(row["index"])
            answer = channel.connection.recv()
            channel.index = None
            if not isinstance(answer, Exception):
                height, width = row["size_hw"].tolist()
                out[:height, :width] = channel.pixels[: height * width * 3].reshape(height, width, 3)
                channel.cpu_s += answer
        except (EOFError, ConnectionError):
            raise WorkerDiedError(self._how_it_ended(channel.process)) from None
        finally:
            self._idle.put(channel)
        if isinstance(answer, Exception):
            raise answer

    def _how_it_ended(self, process: Any) -> str:
        reading = sorted({c.index for c in self._channels if c.process is process and c.index is not None})
        names = " and ".join(f"{self._source.records[i].file_name} (picture {i})" for i in reading)
        return (
            f"worker process {process.pid} {_ending(process)}"
            + f" while it read {names}" * bool(names)
            + "; use fewer "
            "config.data.workers, or 0 to read with threads alone"
        )

    def cpu_s(self) -> float:
        """What the reading has cost so far, in seconds of one core."""
        return sum(channel.cpu_s for channel in self._channels)

    def close(self) -> None:
        """Ends the processes, once each has finished its picture; one that does not is killed, and so its reader freed.

        Whoever asks for a picture from now on gets a WorkerDiedError.
        """
        end = time.monotonic() + _END_S
        reading = list(self._channels)
        try:
            while reading:
                reading.remove(self._idle.get(timeout=max(0.0, end - time.monotonic())))
        except queue.Empty:
            for channel in reading:
                channel.process.kill()
            with contextlib.suppress(queue.Empty):
                while reading:
                    reading.remove(self._idle.get(timeout=_END_S))
        for channel in self._channels:
            channel.connection.close()
        for process in dict.fromkeys(channel.process for channel in self._channels):
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._channels.clear()
        self._idle.put(None)


@dataclasses.dataclass(eq=False)
class _Channel:
    """The way to one thread of one worker process, and the memory where it leaves its picture."""

    process: Any
    connection: Connection
    pixels: np.ndarray
    index: int | None = None  # of the picture that it reads
    cpu_s: float = 0.0


def _ending(process: Any) -> str:
    end = time.monotonic() + _END_S
    # Not join: where several threads ask at once, it comes back to all but one of them without an answer.
    while (code := process.exitcode) is None and time.monotonic() < end:
        time.sleep(0.01)
    if code is None:
        return "does not answer any more"
    if code >= 0:
        return f"ended with exit status {code} (see what it wrote above)"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    cause = {"SIGKILL": ", as the system does when memory runs out", "SIGBUS": ", as when shared memory runs out"}
    return f"was ended by signal {-code} ({name}{cause.get(name, '')})"


# ------------------------------------------------------------------------------------------- in the worker process


def _serve(pickled: bytes, connections: Sequence[Connection], memory: Any, first: int, size: int) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then hangs up
    try:
        source = _Unpickler(io.BytesIO(pickled)).load()
    except Exception as error:
        source = _portable(error)  # the answer to every request
    pixels = np.frombuffer(memory, np.uint8).reshape(-1, size)
    threads = [
        threading.Thread(target=_answer, args=(source, connection, pixels[first + i]), daemon=True)
        for i, connection in enumerate(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(source: Source | Exception, connection: Connection, pixels: np.ndarray) -> None:
    while True:
        try:
            row = np.frombuffer(connection.recv_bytes(), ROW)[0]
        except (EOFError, OSError):  # the main process hung up, or is no more
            return
        start = time.thread_time()
        height, width = row["size_hw"].tolist()
        try:
            if isinstance(source, Exception):
                raise source
            write_picture(source, row, pixels[: height * width * 3].reshape(height, width, 3))
            answer = time.thread_time() - start
        except Exception as error:
            answer = _portable(error)
        try:
            connection.send(answer)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot travel another one that says the same; with the worker's stack."""
    error.add_note("In a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ------------------------------------------------------------------------------------ the source, on its way there


class _Sizes(Sequence):
    """Records without their objects, in little memory; made when they are asked for."""

    def __init__(self, records: Sequence[Record]):
        self._names = [record.file_name for record in records]
        self._ids = [record.image_id for record in records]
        self._sizes_hw = np.array([(record.height, record.width) for record in records], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Record:
        height, width = self._sizes_hw[i].tolist()
        nothing = np.zeros(0)
        return Record(
            image_id=self._ids[i],
            file_name=self._names[i],
            height=height,
            width=width,
            boxes_xywh_px=nothing.reshape(0, 4),
            category_ids=nothing.astype(np.int64),
            is_crowd=nothing.astype(bool),
            areas=nothing,
        )


class _Pickler(pickle.Pickler):
    """Leaves out the objects of all records, also of sources in sources: 6 MB go to each worker for COCO, not 60."""

    def persistent_id(self, value: Any) -> _Sizes | None:
        is_records = type(value) is tuple and value and type(value[0]) is Record
        return _Sizes(value) if is_records else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: _Sizes) -> _Sizes:
        return pid


def _pickle_without_objects(source: Source) -> bytes:
    stream = io.BytesIO()
    try:
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(source)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"this source cannot be sent to worker processes ({error}); use --config.data.workers=0, which reads with "
            "threads alone"
        ) from error
    return stream.getvalue()
