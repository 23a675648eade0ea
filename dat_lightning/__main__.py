"""``python -m dat_lightning`` is ``dat-lightning``."""

from dat_lightning.threads import prepare


def main() -> None:
    """Runs the command line; nothing that imports torch is loaded before threads have been decided."""
    prepare()
    from dat_lightning.cli import main as run

    run()


if __name__ == "__main__":
    main()
