"""Entry of ``gkd-train`` and ``python -m gkd_fast.train``."""

import sys

EXTRA = ("accelerate", "jsonargparse", "matplotlib", "rich", "sklearn", "torchvision")


def main() -> int:
    """Runs the command line, or says what to install for it."""
    try:
        from gkd_fast.train import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        print(f"gkd-train needs the package {error.name}: pip install 'gkd_fast[train]'", file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
