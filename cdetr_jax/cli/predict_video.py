"""The objects in a video: every frame drawn, and a line for each with its time."""

import fractions
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cdetr_jax.files import growing_text

Item = TypeVar("Item")

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def check_for_videos(videos: Sequence[Path], output: Any) -> None:
    """Raises ModuleNotFoundError without PyAV; ValueError, if a video would be written over or cannot be written."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{videos[0]} is a video: reading it needs `pip install cdetr_jax[video]`") from error
    if not isinstance(output, Path):
        raise ValueError(f"videos are written to a local folder, and --output={output} is none")
    for path in videos:
        if (output / f"{path.stem}.mp4").resolve() == path.resolve():
            raise ValueError(f"{path} would be written over; name another --output")
        if sum(path.stem == other.stem for other in videos) > 1:
            raise ValueError(f"two videos are called {path.stem}; give them one after the other, to two folders")


def find_in_video(path: Path, find: Callable[[list[np.ndarray]], list[Any]], batch: int, output: Path) -> str:
    """Writes `NAME.mp4` with what was found drawn into it, and `NAME.jsonl` with a line a frame.

    Args:
      find: from frames, uint8 [H, W, 3], to their `Objects`.
      batch: frames a call.
    Returns: what to tell the user.
    Raises: ValueError, if it cannot be read; then what was found before is there.
    """
    import av
    from tqdm import tqdm

    frames, objects_found = 0, 0
    drawn_path, lines_path = output / f"{path.stem}.mp4", output / f"{path.stem}.jsonl"
    try:
        with av.open(str(path)) as video, growing_text(lines_path) as add_line, av.open(str(drawn_path), "w") as drawn:
            stream = video.streams.video[0]
            codec = "h264" if "libx264" in av.codecs_available else "mpeg4"
            target = None
            decoded = tqdm(video.decode(stream), total=stream.frames or None, disable=None)
            for part in parts(((frame.time, frame.to_ndarray(format="rgb24")) for frame in decoded), batch):
                for (time_s, _), objects in zip(part, find([frame for _, frame in part]), strict=True):
                    picture = np.asarray(objects.draw())
                    picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # colours go by twos
                    if target is None:
                        target = drawn.add_stream(codec, rate=stream.average_rate or fractions.Fraction(25))
                        target.height, target.width = picture.shape[:2]
                        target.pix_fmt = "yuv420p"
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    drawn.mux(target.encode(frame))
                    add_line(as_json_line({"frame": frames, "time_s": time_s}, objects))
                    frames += 1
                    objects_found += len(objects)
            if target is None:
                raise ValueError("it has no frame")
            drawn.mux(target.encode(None))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: cannot read this video ({type(error).__name__}: {error})") from error
    return f"{path}: {objects_found} objects in {frames} frames -> {drawn_path}, {lines_path}"


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
