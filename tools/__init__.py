"""Small commands, each with ``main(argv)``; what takes several files has a folder."""
