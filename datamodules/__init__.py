"""From a shop's files to batches: prepare a catalogue, read it, make training examples."""
