"""Playing episodes: one episode, the siblings of a task, and sampling until enough groups are mixed."""
