"""Process groups, and what Megatron-Core needs to run without CUDA."""
