"""The objects in a video, or in what a camera or stream shows now: frames drawn, and a line for each with its time."""

import collections
import concurrent.futures
import contextlib
import datetime
import fractions
import itertools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from cdetr_jax.files import growing_text

Item = TypeVar("Item")

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
SOFTWARE = "cdetr predict"  # what a drawing of ours says of its origin
TICKS = 60_000  # a second, in the drawn video: whole for the usual rates, and all that MPEG-4 allows
WAIT_S = 10  # for the next frame of a stream


def is_live(source: Path | str) -> bool:
    """Whether it is a camera, `camera` or `camera:1`, or the address of a stream; a file is never."""
    return isinstance(source, str) and bool(re.fullmatch(r"camera(:\d+)?|(rtsps?|rtmps?|rtp|udp|tcp|srt)://.+", source))


def is_video(source: Path | str) -> bool:
    """Whether it is live, or called as a video file is."""
    return is_live(source) or str(source).partition("?")[0].lower().endswith(VIDEOS)


def check_for_video(source: Path | str, output: Any) -> None:
    """Raises ModuleNotFoundError without PyAV; ValueError, if a video cannot be written to `output`."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{source} is a video: reading it needs `pip install cdetr_jax[video]`") from error
    if not isinstance(output, Path):
        raise ValueError(f"videos are written to a local folder, and --output={output} is none")


def is_drawn_video(path: Path) -> bool:
    """Whether a file is what was drawn from a video file. What was live cannot be had again, and does not count."""
    import av

    try:
        with av.open(str(path)) as video:
            return video.metadata.get("comment") == SOFTWARE
    except (av.FFmpegError, OSError):
        return False


def find_in_video(source: Path | str, find: Callable[[list[np.ndarray]], list[Any]], batch: int, path: Path) -> str:
    """Writes a video with what was found drawn into it to `path`, and beside it a `.jsonl` with a line a frame.

    Times are in seconds since the first frame. A live source runs until it ends or Ctrl-C or SIGTERM comes, and frames
    that come faster than they are looked at are skipped.

    Args:
      find: from frames, uint8 [H, W, 3], to their `Objects`.
      batch: frames a call; of a live source it is one.
    Returns: what to tell the user.
    Raises: ValueError, if it cannot be read, or not to its end; then what was found before is there.
    """
    import av
    from tqdm import tqdm

    live, shown = is_live(source), re.sub("//.*@", "//", str(source))  # without user and password
    lines_path = path.with_suffix(".jsonl")
    frames, seen, objects_found, first_s = 0, 0, 0, None
    try:
        with (
            _asked_to_stop() if live else contextlib.nullcontext() as stop,
            av.open(**_input(source)) as video,
            growing_text(lines_path) as add_line,
        ):
            if not video.streams.video:
                raise ValueError("it shows nothing")
            stream = video.streams.video[0]
            rate = stream.average_rate or fractions.Fraction(25)
            decoded = video.decode(stream)
            if live:
                print(f"{shown}: until Ctrl-C, or its end -> {path}, {lines_path}", flush=True)
            with (
                _newest(decoded, stop) if live else contextlib.nullcontext(enumerate(decoded)) as numbered,
                _growing_video(path, rate, "" if live else SOFTWARE) as add_picture,
                tqdm(total=stream.frames or None, unit=" frames", disable=None) as progress,
            ):
                for part in parts(numbered, 1 if live else batch):
                    now = {"utc": datetime.datetime.now(datetime.UTC).isoformat()} if live else {}
                    images = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for _, frame in part]
                    for (number, frame), objects in zip(part, find(images), strict=True):
                        time_s = float(number / rate) if frame.time is None else frame.time
                        first_s = time_s if first_s is None else first_s
                        add_picture(np.asarray(objects.draw()), time_s - first_s)
                        said = {"frame": number, "time_s": round(time_s - first_s, 6), **now}
                        add_line(as_json_line(said, objects))
                        frames, seen, objects_found = frames + 1, number + 1, objects_found + len(objects)
                    progress.update(len(part))
            if not frames and not (stop and stop.is_set()):
                raise ValueError("it has no frame")
    except (av.FFmpegError, ValueError) as error:
        cause = f"nothing came for {WAIT_S} s" if isinstance(error, av.error.ExitError) else error
        cause = f"{type(error).__name__}: {cause}".replace(str(source), shown)
        if frames:
            cause += f"; what was found in the {frames} frames before is in {path} and {lines_path}"
        raise ValueError(f"{shown}: cannot read this {'source' if live else 'video'} ({cause})") from error
    skipped = f" ({seen - frames} of {seen} skipped, to be in time)" if live else ""
    return f"{shown}: {objects_found} objects in {frames} frames{skipped} -> {path}, {lines_path}"


def _input(source: Path | str) -> dict[str, Any]:
    """The arguments of `av.open`. Raises: ValueError, if Windows has no such camera."""
    if not is_live(source):
        return {"file": str(source)}
    if not source.startswith("camera"):
        return {"file": source, "options": {"rtsp_flags": "prefer_tcp"}, "timeout": WAIT_S}
    number = int(source.partition(":")[2] or 0)
    if sys.platform == "darwin":
        return {"file": f"{number}:none", "format": "avfoundation", "options": {"framerate": "30"}, "timeout": WAIT_S}
    if sys.platform == "win32":
        from av.device import enumerate_input_devices

        cameras = [each for each in enumerate_input_devices("dshow") if "video" in each.media_types]
        if number >= len(cameras):
            raise ValueError(f"there are {len(cameras)} cameras, counted from 0")
        return {"file": f"video={cameras[number].name}", "format": "dshow", "timeout": WAIT_S}
    return {"file": f"/dev/video{number}", "format": "v4l2", "timeout": WAIT_S}


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second one ends the process at once."""
    stop = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        stop.set()
        os.write(2, b"\nstopping after this frame (once more: at once)\n")  # not `print`, which may be in the middle

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python


@contextlib.contextmanager
def _newest(items: Iterable[Item], stop: threading.Event) -> Iterator[Iterator[tuple[int, Item]]]:
    """Gives an iterator of the newest item there is each time it is asked, with its number; it ends at `stop`.

    A thread takes the items as they come; those between are dropped.
    """
    newest: collections.deque[tuple[int, Item]] = collections.deque(maxlen=1)
    changed = threading.Event()

    def take() -> None:
        for numbered in enumerate(items):
            newest.append(numbered)
            changed.set()
            if stop.is_set():
                return

    def give() -> Iterator[tuple[int, Item]]:
        while not stop.is_set():
            over = taking.done()  # asked before the last item is looked for
            if newest:
                yield newest.pop()
            elif over:
                return taking.result()  # raises what ended it
            else:
                changed.wait(0.1)  # so long that the end may come unseen, and a signal under Windows
                changed.clear()
        return None

    with concurrent.futures.ThreadPoolExecutor(1, "camera") as thread:
        taking = thread.submit(take)
        try:
            yield give()
        finally:
            stop.set()


@contextlib.contextmanager
def _growing_video(path: Path, rate: fractions.Fraction, comment: str) -> Iterator[Callable[[np.ndarray, float], None]]:
    """Gives a function that adds a picture [H, W, 3] and the second from which on it is shown.

    A process that is killed leaves all but the last seconds.
    """
    import av

    options = {"movflags": "hybrid_fragmented", "frag_duration": "1000000", "flush_packets": "1"}
    with av.open(str(path), "w", options=options) as video:
        video.metadata["comment"] = comment
        stream = video.add_stream("h264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, TICKS)
        stream.codec_context.max_b_frames = 0  # with them a hybrid file starts late
        last = -1

        def add(picture: np.ndarray, time_s: float) -> None:
            nonlocal last
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # colours go by twos
            if last < 0:
                stream.height, stream.width = picture.shape[:2]
            last = max(last + 1, round(time_s * TICKS))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = last, fractions.Fraction(1, TICKS)
            video.mux(stream.encode(frame))

        try:
            yield add
        finally:
            if last >= 0:
                video.mux(stream.encode(None))


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """So many items at a time, fewer at the end: `itertools.batched` of Python 3.12."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def as_json_line(said: dict[str, Any], objects: Any) -> str:
    """One line of JSON: what is said, the picture's size, and its objects, boxes in pixels."""
    height, width = objects.image.shape[:2]
    columns = (objects.class_ids.tolist(), objects.names, objects.scores.tolist(), objects.boxes_xyxy_px.tolist())
    found = [
        {"class_id": class_id, "class_name": name, "score": score, "box_xyxy": box}
        for class_id, name, score, box in zip(*columns, strict=True)
    ]
    return json.dumps({**said, "height": height, "width": width, "objects": found}, ensure_ascii=False) + "\n"
