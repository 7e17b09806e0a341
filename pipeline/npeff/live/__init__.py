"""The live view: a web server for one run on this machine."""
