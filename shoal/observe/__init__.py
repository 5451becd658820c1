"""What a run tells: its events, its progress on a terminal, its figures, and how two runs compare."""
