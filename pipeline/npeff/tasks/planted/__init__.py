"""Tasks whose strategies are known, to test the method on."""
