"""The command line of `imbsam-fast pack`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..settings.arguments import UsageError, number, require_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `imbsam-fast pack`."""
    parser.description = (
        "Pack small images into an archive that trains from memory: train.npz and test.npz in one "
        "directory are what `imbsam-fast train packed --data-dir DIRECTORY` reads; validation.npz "
        "beside them chooses best.pt."
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE",
        help="a folder with a folder of images for each class, or a list: `path label` lines or "
        "iNaturalist's JSON")  # fmt: skip
    add("out", type=Path, metavar="OUT.npz", help="the archive; one that is there is replaced")
    add("--image-root", type=Path, metavar="DIR",
        help="what the paths of a list are relative to (default: where the list is)")  # fmt: skip
    add("--image-size", type=number(1, kind=int), metavar="N",
        help="make every image N x N pixels, the shorter side resized and the centre cropped, and "
        "store it as lossless WebP (default: files as they are, all of one size)")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """0; 2 with one line on stderr where the user has to change something."""
    try:
        require_extras(["numpy", "torchvision"])
        _main(args)
    except UsageError as error:
        print(f"imbsam-fast pack: error: {error}", file=sys.stderr)
        return 2
    return 0


def _main(args: argparse.Namespace) -> None:
    # With torch, which --help and a mistyped option need not wait for.
    from .images import DataError
    from .pack import pack

    if args.out.suffix != ".npz":
        raise UsageError(f"OUT.npz is '{args.out}', expected a name that ends in .npz")
    if args.image_root is not None and args.source.is_dir():
        raise UsageError(
            f"--image-root is '{args.image_root}', expected none: '{args.source}' is a folder"
        )
    try:
        packed = pack(args.source, args.out, args.image_root, args.image_size)
    except DataError as error:
        raise UsageError(str(error)) from error
    height, width = packed.size
    print(
        f"{args.out}: {packed.images:,} images of {height}x{width} pixels in {packed.classes} "
        f"classes, {packed.bytes / 1e6:.1f} MB; in memory "
        f"{3 * height * width * packed.images / 1e6:.1f} MB"
    )
