"""``python -m dat_lightning`` is ``dat-lightning``."""

from dat_lightning.cli import main

if __name__ == "__main__":
    main()
