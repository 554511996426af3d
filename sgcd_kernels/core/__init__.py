"""What the ops and the backends share: the LM head, statistics, sequences, the loss family, checks, registration."""
