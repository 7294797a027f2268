"""Compile the TensorRT plugins, or say what there is.

python -m plugins build                                        for the TensorRT and the GPU of this machine
python -m plugins build --flavour 8.6 --arch 90 --include DIR  with TensorRT's headers from DIR
python -m plugins list
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plugins.build import FLAVOURS, build
from plugins.load import LIB


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    make = argparse.ArgumentParser(
        prog="plugins", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = make.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="compile the plugins", allow_abbrev=False).add_argument
    add("--flavour", choices=FLAVOURS, help="which TensorRT (the one of this interpreter, else of the headers)")
    add("--arch", default="", help="compute capabilities, such as 80,90 (the GPU's; without one, all)")
    add("--include", type=Path, help="the folder of TensorRT's headers (TENSORRT_INCLUDE, TENSORRT_ROOT, the system's)")
    add("--output", type=Path, default=LIB, help="(%(default)s)")
    add("--force", action="store_true", help="compile even if the library that is there fits")
    add("--verbose", action="store_true", help="show what the compiler says: registers and spills of each kernel")
    add = commands.add_parser("list", help="what is compiled", allow_abbrev=False).add_argument
    add("--output", type=Path, default=LIB, help="(%(default)s)")
    return make


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 2 for what cannot be done, 130 when stopped."""
    try:
        options = parser().parse_args(argv)
        if options.command == "build":
            names = [name.strip().removeprefix("sm") for name in options.arch.split(",") if name.strip()]

            def say(text: str) -> None:
                if options.verbose or "\n" not in text:
                    print(text)

            build(options.flavour, names, options.include, options.output, options.force, say)
        else:
            for notes in sorted(options.output.glob("*.json")):
                about = json.loads(notes.read_text(encoding="utf-8"))
                capabilities = ", ".join(about["architectures"])
                print(f"{notes.with_suffix('.so')}: TensorRT {about['tensorrt']}, {capabilities}, CUDA {about['cuda']}")
    except KeyboardInterrupt:
        print("plugins: stopped; what was there before is unchanged.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"plugins: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
