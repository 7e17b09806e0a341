"""``python -m npeff`` is the ``npeff`` command."""

from npeff.cli.entry import command

if __name__ == "__main__":
    command()
