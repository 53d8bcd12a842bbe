"""Run, compare and reproduce post-training quantisation: `python run.py --help`. The installed command is `lsiq`."""

from lsiq.cli.main import main

if __name__ == "__main__":
    main()
