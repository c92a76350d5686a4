"""The command `moejax`, and `python -m moejax`."""

import os

from moejax.machine import with_large_pages


def main() -> None:
    """`cli.main`, in a process whose memory comes in large pages."""
    # Before JAX is imported, whose libraries warn of things that users can do nothing about; errors they still tell.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with_large_pages()
    from moejax.cli import main

    main()


if __name__ == "__main__":
    main()
