"""Training steps of whole Llama models."""
