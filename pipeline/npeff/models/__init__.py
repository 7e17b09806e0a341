"""Loading of a run's model and examples on a worker, and predictions of the model."""
