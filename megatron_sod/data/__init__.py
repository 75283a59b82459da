"""Prompts, chat format, packing, and the tiny world the demo runs in."""
