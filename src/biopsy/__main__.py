"""``python -m biopsy``: the command line, run by a chosen interpreter."""

from biopsy.cli import main

if __name__ == "__main__":
    main()
