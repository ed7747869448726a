"""``python -m cl_platform``: the commands of ``cl-platform``."""

import sys


def main() -> None:
    """Hand over to the command line; ``doctor`` works also where that cannot be imported."""
    try:
        from cl_platform.cli.app import main as command
    except ImportError as error:
        if sys.argv[1:2] != ["doctor"]:
            raise
        from cl_platform.cli.findings import print_findings

        sys.exit(print_findings("--json" in sys.argv, error))
    command()


if __name__ == "__main__":
    main()
