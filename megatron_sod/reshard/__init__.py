"""Moving the student's new weights from trainer shards into the engines, and proving it."""
