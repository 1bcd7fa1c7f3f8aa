"""Several processes: groups, what ranks tell each other, shards, and whole parameters again."""
