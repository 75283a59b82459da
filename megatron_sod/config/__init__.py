"""Configuration: the schema holds every default, the loader merges, the report lists problems."""

from megatron_sod.config.load import load_config

__all__ = ["load_config"]
