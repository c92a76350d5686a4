"""What each command does: opens files, calls the library, prints and writes the figures."""
