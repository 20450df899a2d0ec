"""``python -m fpe.bench`` and the ``fpe`` command."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs; ``gpu`` runs with PyTorch and pandas alone."""
    if sys.argv[1:2] == ["gpu"]:
        from .device.cli import main as gpu

        sys.exit(gpu(sys.argv[2:]))
    try:
        from .cli import cli
    except ImportError as error:
        sys.exit(f"fpe: {error}. The command line needs: pip install 'fixed-parameter-expansion[bench]'")
    cli()


if __name__ == "__main__":
    main()
