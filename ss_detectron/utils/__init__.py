"""What several rooms share: random numbers, processes, and which files are trusted."""
