"""Tasks around Hugging Face models: one module per family, each with its options and what its examples are."""
