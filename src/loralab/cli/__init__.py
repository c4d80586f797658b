"""The command line. `main` is the entry point; one file per family of commands."""

from loralab.cli.app import main as main
