"""``python -m fpe.bench`` and the ``fpe`` command."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        from .cli import cli
    except ImportError as error:
        sys.exit(f"fpe: {error}. The command line needs: pip install 'fixed-parameter-expansion[bench]'")
    cli()


if __name__ == "__main__":
    main()
