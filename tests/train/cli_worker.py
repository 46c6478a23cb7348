"""One rank of a command: ``cli_worker.py VERB ...``."""

from dist_decoder.commands.cli import main

if __name__ == "__main__":
    main()
