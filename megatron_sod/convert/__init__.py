"""How Hugging Face tensors and Megatron parameters correspond, and moving between them."""
