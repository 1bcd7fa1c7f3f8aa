"""The parts of the chunked loss: the output head, logits that are not there yet, and cross-entropy in chunks."""
