"""A report as one HTML file with its pictures inside: opens in any browser, without a network."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cdetr_jax.files import write_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.numbers td { white-space: nowrap; }
tbody tr:nth-child(even) { background: #f6f6f6; }
img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .6em 1em; overflow-x: auto; }
.table { overflow-x: auto; }
"""


class Page:
    """Collects titles, text, tables and pictures from top to bottom; `save` writes them."""

    def __init__(self, title: str):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's title."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def command(self, text: str) -> None:
        """A command, or other text whose lines stay as they are."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], of: str = "numbers") -> None:
        """A table of numbers, on the right of their columns but for the first, or of words, on the left."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in rows)
        self._parts.append(
            f'<div class="table {of}"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, picture: Path | Image.Image, caption: str) -> None:
        """A PNG or JPEG file, or a picture, with a line under it that is also its text for who cannot see it."""
        if isinstance(picture, Path):
            kind, data = "jpeg" if picture.suffix.lower() in (".jpg", ".jpeg") else "png", picture.read_bytes()
        else:
            file = io.BytesIO()
            picture.save(file, "PNG")
            kind, data = "png", file.getvalue()
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        text = html.escape(caption)
        self._parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')

    def save(self, path: Path) -> None:
        """Writes the file whole, or not at all."""
        write_text(
            path,
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
            + "\n".join(self._parts)
            + "\n</body></html>\n",
        )
