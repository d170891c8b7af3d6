"""A picture of a page, or of some of its parts, by headless Chromium.

`python eval/photograph.py docs/report.html docs/report.png --only accuracy kernels-smnist5k`: without `--only` the page
is taken from its top.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from smpconv_zoo.files import write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The page asks for nothing from the network, and the browser should not either.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1080, help="pixels of the window")
    parser.add_argument("--height", type=int, default=2400, help="pixels of the window, empty ones at the end cut off")
    parser.add_argument("--only", nargs="*", default=[], metavar="ID", help="figures to keep, by their ids")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"{options.out} is left as it is: none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(options.page.read_text(encoding="utf-8").replace("</head>", style(options.only) + "</head>"))
        shot = Path(folder, "shot.png")
        command = [browser, *FLAGS, f"--user-data-dir={folder}/user", f"--window-size={options.width},{options.height}"]
        done = subprocess.run([*command, f"--screenshot={shot}", copy.as_uri()], capture_output=True, timeout=120)
        if done.returncode or not shot.is_file():
            sys.exit(f"{browser} took no picture: {done.stderr.decode(errors='replace').strip()[-500:]}")
        write_whole(options.out, cut(Image.open(shot).convert("RGB")))


def style(ids: list[str]) -> str:
    """Style that leaves the head of the page and the figures of these ids."""
    if not ids:
        return ""
    kept = "".join(f":not(#{name})" for name in ids)
    some = ",".join(f"#{name}" for name in ids)
    return (
        f"<style>article{kept},section:not(:has({some})),footer,nav,.how{{display:none}}"
        "section{margin-top:28px!important;padding-top:22px!important} body{padding-bottom:20px!important}</style>"
    )


def cut(picture: Image.Image) -> bytes:
    """The picture as a PNG file of 256 colours, without empty rows at its end."""
    ground = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    box = ImageChops.difference(picture, ground).getbbox()
    kept = picture.crop((0, 0, picture.width, min(picture.height, (box[3] if box else picture.height) + 24)))
    buffer = io.BytesIO()
    few = kept.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
