"""Before a run: reading configs, checking the installation, and what the run needs."""
