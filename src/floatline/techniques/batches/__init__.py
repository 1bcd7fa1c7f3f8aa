"""What batches are made of: rows, token counts, length buckets, packing rules, and a sampler with a token budget."""
