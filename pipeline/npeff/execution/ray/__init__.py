"""Workers as Ray actors, runs as Ray jobs. Only this folder imports Ray."""
