"""The command `moejax`, and `python -m moejax`."""

from moejax.machine import with_large_pages


def main() -> None:
    """`cli.main`, in a process whose memory comes in large pages."""
    with_large_pages()
    from moejax.cli import main

    main()


if __name__ == "__main__":
    main()
