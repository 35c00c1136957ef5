"""The study: calibrate a machine, predict before measuring, explain what was measured, and report it."""
