"""The library under the names of others: change an import, keep the call. Nothing here imports the other library."""
