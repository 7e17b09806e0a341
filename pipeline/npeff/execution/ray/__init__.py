"""Workers as Ray actors and runs as Ray jobs. Only this folder imports Ray."""
