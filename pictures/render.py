"""Render the pictures of this folder from the Noto emoji in `@svgmoji/noto` (npm). Needs `pip install resvg-py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import resvg_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from models.tiny.fluent import fetch_package, members  # noqa: E402

NOTO = ("@svgmoji/noto", "3.2.0", "svgmoji-noto-3.2.0.tgz",
        "4bd1ef9824efaa08f124541a4c3420899a273333169aada20761384f9c7a35d0")  # fmt: skip
# name → (id in the sprite, background as sRGB)
PICTURES = {
    "owl": ("1F989", "#d8ecff"), "parrot": ("1F99C", "#ffffff"), "penguin": ("1F427", "#ffffff"),
    "duck": ("1F986", "#ffffff"), "eagle": ("1F985", "#d8ecff"), "flamingo": ("1F9A9", "#e2f6ea"),
    "swan": ("1F9A2", "#b9d7f2"), "rooster": ("1F413", "#fff3d6"), "cat": ("1F408", "#ffffff"),
    "turtle": ("1F422", "#fff3d6"),
}  # fmt: skip
SIZE, INNER = 256, 208


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the npm tarballs (default: data)")
    tarball = fetch_package(parser.parse_args().data, NOTO)
    ((_, sprite),) = members(tarball, ("/sprites/all.svg",))
    drawings = {node.get("id"): node for node in ElementTree.fromstring(sprite)}
    margin = (((SIZE - INNER) // 2,) * 2,) * 2 + ((0, 0),)
    for name, (key, colour) in PICTURES.items():
        png = resvg_py.svg_to_bytes(
            svg_string=ElementTree.tostring(drawings[key], "unicode"), width=INNER, height=INNER
        )
        rgba = np.asarray(cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_UNCHANGED), np.float32)
        background = np.array([int(colour[i : i + 2], 16) for i in (5, 3, 1)], np.float32)
        alpha = np.pad(rgba[..., 3:] / 255, margin)
        picture = np.pad(rgba[..., :3], margin) * alpha + background * (1 - alpha)
        cv2.imwrite(str(HERE / f"{name}.png"), picture.round().astype(np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
