"""Megatron GPT models built from Hugging Face configurations."""
