"""The references: who writes them, what a writer may read, and what the teacher reads."""
