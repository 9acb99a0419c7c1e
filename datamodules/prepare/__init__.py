"""Prepare a catalogue: files to records, records to rows, rows and pictures to shards."""
