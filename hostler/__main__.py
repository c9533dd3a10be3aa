"""``python -m hostler``: the same as the command ``hostler``."""

from hostler.cli import main

if __name__ == "__main__":
    main()
