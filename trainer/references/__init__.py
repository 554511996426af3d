"""References: their writers, the sanitiser of what a writer may read, and the teacher's prompts."""
