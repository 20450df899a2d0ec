"""``python -m fpe.bench`` and the ``fpe`` command."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs; ``gpu`` runs with PyTorch and pandas alone."""
    if sys.argv[1:2] == ["gpu"]:
        from .gpu.cli import main as gpu

        try:
            sys.exit(gpu(sys.argv[2:]))
        except KeyboardInterrupt:
            print("\nfpe gpu: stopped. What is done is kept; the same command goes on from there.", file=sys.stderr)
            sys.exit(130)
    try:
        from .cli import cli
    except ImportError as error:
        sys.exit(f"fpe: {error}. The command line needs: pip install 'fixed-parameter-expansion[bench]'")
    cli()


if __name__ == "__main__":
    main()
