"""``python -m dist_decoder`` is ``dist-decoder``; ``torchrun -m dist_decoder`` works too."""

from dist_decoder.commands.cli import main

if __name__ == "__main__":
    main()
