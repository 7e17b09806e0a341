"""Tasks with Hugging Face models. Each family of models is a module with its options and its examples."""
