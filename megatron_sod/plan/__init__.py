"""What a run would need and how long it would take, computed before anything is started."""
