"""What a run leaves behind for people: metrics, tables, a report, progress."""
