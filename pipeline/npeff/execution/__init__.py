"""Where workers run: executors that map work over workers, in this process or on Ray."""
