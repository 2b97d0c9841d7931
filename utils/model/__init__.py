"""How a backbone is updated: replica, optimiser, schedule, precision, averaged copy, compilation, modes."""
