"""One optimizer step over packed micro-batches with Megatron's own schedules and optimizer."""
