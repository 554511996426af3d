"""Before a run: reading configs, checking the installation, and estimating what the run needs."""
