"""Used by all ops and backends: the LM head, statistics, sequences, the loss family, checks, registration."""
