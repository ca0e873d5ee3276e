"""Small copies of photographs, blurred and compressed: a rough substitute for frames of a video.

python benchmarks/shrink.py --photos REAL/queries --side 112 --output SMALL
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2

from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.progress import show_progress

BLUR = 0.6  # pixels of the small picture, standard deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a folder or a csv of pictures")
    parser.add_argument("--side", type=int, required=True, help="longer side in pixels; smaller photos are not enlarged")
    parser.add_argument("--quality", type=int, default=60, help="of the JPEG files, 1 to 100 (default: 60)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the copies, which keep the names of the photos")
    arguments = parser.parse_args()
    if arguments.side < 1 or not 1 <= arguments.quality <= 100:
        parser.error(f"--side {arguments.side} --quality {arguments.quality}: type a side of 1 or more, and 1 to 100")
    catalog = open_catalog(arguments.photos)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(show_progress(catalog.ids, f"shrinking {len(catalog)} photos", len(catalog), 0)):
        photo = cv2.cvtColor(catalog.read(row).rgb, cv2.COLOR_RGB2BGR)
        height, width = photo.shape[:2]
        scale = min(1.0, arguments.side / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(cv2.GaussianBlur(photo, (0, 0), BLUR / scale), size, interpolation=cv2.INTER_AREA)
        file = arguments.output / f"{name}.jpg"
        if not cv2.imwrite(str(file), small, [cv2.IMWRITE_JPEG_QUALITY, arguments.quality]):
            raise OSError(f"could not write '{file}'; type --output with a folder that can be written to")


if __name__ == "__main__":
    main()
