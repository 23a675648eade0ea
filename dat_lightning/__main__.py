"""``python -m dat_lightning`` is ``dat-lightning``."""


def main() -> None:
    """Runs the command line; nothing that imports torch is loaded before."""
    from dat_lightning.cli import main as run

    run()


if __name__ == "__main__":
    main()
