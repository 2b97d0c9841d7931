"""The life of one run: its parts and state, steps between updates, folder, checkpoints, log, watchdog, pictures."""
