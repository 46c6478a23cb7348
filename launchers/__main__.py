"""``python -m launchers`` is ``dist-launch``."""

from launchers.cli import main

if __name__ == "__main__":
    main()
