"""The report that people look at: one HTML page of what was measured, every figure with the log behind it."""
