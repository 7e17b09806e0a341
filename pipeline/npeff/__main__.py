"""``python -m npeff`` is the ``npeff`` command."""

from npeff.cli.main import main

if __name__ == "__main__":
    main()
