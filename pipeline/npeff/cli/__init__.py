"""The ``npeff`` command: parse, call, print."""
