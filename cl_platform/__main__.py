"""``python -m cl_platform``: the commands beside training."""

from cl_platform.cli.app import main

if __name__ == "__main__":
    main()
