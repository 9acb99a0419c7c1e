"""The commands of `index.py`: from a model and a catalogue to search results."""
