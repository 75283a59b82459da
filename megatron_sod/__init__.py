"""Step-wise on-policy distillation of small tool-using agents on Megatron-Core."""

__version__ = "0.1.0"
