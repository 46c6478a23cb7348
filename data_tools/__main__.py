"""``python -m data_tools`` is ``data-tools``."""

from data_tools.cli import main

if __name__ == "__main__":
    main()
