"""Choose an index by predicted and measured recall, memory and latency."""
