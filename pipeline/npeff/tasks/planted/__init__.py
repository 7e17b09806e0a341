"""Tasks with known strategies of the model, for tests of the method."""
