"""Shared pieces: collectives, checkpoints, schedules, logging, errors. Importing does nothing."""
